"""Plain LoRA on the operators is stock PEFT's, from every initialisation."""

import copy
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.corda import preprocess_corda

import mica.fast
from tests.support.models import gradients, tiny_llama
from tests.support.quantised_models import TARGETS
from tests.support.stock import assert_same, counted
from tests.support.training import STEPS, batches, train

TOLERANCE = 1e-5
LAYERS = 14


@pytest.fixture(autouse=True)
def _lora():
    mica.fast.enable(lora=True)


def training_of(model):
    """The loss and the gradients of each step."""
    seen = []

    def step(loss, optimizer):
        loss.backward()
        seen.append((loss.detach(), gradients(model)))
        optimizer.step()

    train(model, step=step)
    return seen


# -- initialisations ----------------------------------------------------------------------------------


def initialised(init, before=None, after=None, **config):
    """A tiny Llama with LoRA. ``before(model, config)``, ``after(model)``: what an initialisation demands."""
    model = tiny_llama(initializer_range=0.3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init, **config)
    if before is not None:
        before(model, config)
    model = get_peft_model(model, config)
    if after is not None:
        after(model)
    return model.train()


def corda(model, config):
    with torch.no_grad():
        preprocess_corda(model, config, run_model=lambda: model(input_ids=batches()[0, :1]))  # of one text


def loraga(model, config):
    ids = batches()[0]
    peft.preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())


def eva(model):
    ids = batches()[0]
    peft.initialize_lora_eva_weights(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 8)


BY_NAME = True, False, "gaussian", "pissa", "olora", "orthogonal", "pissa_niter_4"
INITIALISATIONS = {
    **{str(init): partial(initialised, init) for init in BY_NAME},
    "loftq": partial(initialised, "loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
    "eva": partial(initialised, "eva", after=eva, eva_config=peft.EvaConfig(rho=1.0)),
    "corda": partial(initialised, "corda", before=corda, corda_config=peft.tuners.lora.config.CordaConfig()),
    "lora_ga": partial(initialised, "lora_ga", before=loraga, lora_ga_config=peft.LoraGAConfig()),
}


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_every_initialisation_trains_as_on_stock(name):
    """The losses and gradients of all steps, by the operators."""
    if name == "loftq" and not torch.cuda.is_available():
        pytest.skip("PEFT computes LoftQ on an accelerator only")
    model = INITIALISATIONS[name]()
    stock = copy.deepcopy(model)
    seen, counts = counted(lambda: training_of(model))
    assert counts["linear"] == counts["linear_backward"] == LAYERS * STEPS
    with mica.fast.disabled():
        assert_same(seen, training_of(stock), TOLERANCE)
    assert seen[0][0] - seen[-1][0] > 1e-3
