"""Plain LoRA on the operators is stock PEFT's, from every initialisation, whatever is trained of it."""

import copy
from functools import partial

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.corda import preprocess_corda

import mica.fast
from tests.support.models import adapted_layers, factors, gradients, tiny_llama
from tests.support.quantised_models import TARGETS
from tests.support.stock import assert_same, counted
from tests.support.training import STEPS, batches, llama, optimizer_of, train

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-5
LAYERS = 14


@pytest.fixture(autouse=True)
def _lora():
    mica.fast.enable(lora=True)


def training_of(model, optimizer_of=optimizer_of, between=lambda model, step: None):
    """The loss and the gradients of each step; ``between(model, step)`` runs before each."""
    optimizer, seen = optimizer_of(model), []

    def step(loss, optimizer):
        loss.backward()
        seen.append((loss.detach(), gradients(model)))
        optimizer.step()
        between(model, len(seen))

    between(model, 0)
    train(model, step=step, optimizer=optimizer)
    return seen


def follows_stock(model, **options):
    """Losses and gradients of all steps are stock's, and the operators have run."""
    stock = copy.deepcopy(model)
    seen, counts = counted(lambda: training_of(model, **options))
    assert counts["linear"] == LAYERS * STEPS
    # where B alone is trained and x needs no gradient, Python computes dB without this operator
    assert (LAYERS - 3) * STEPS <= counts["linear_backward"] <= LAYERS * STEPS
    with mica.fast.disabled():
        assert_same(seen, training_of(stock, **options), TOLERANCE)
    assert seen[0][0] - seen[-1][0] > 1e-3
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


INITIALISATIONS = {
    **{str(init): partial(initialised, init) for init in (True, False)},
    **{init: partial(initialised, init) for init in ("gaussian", "pissa", "olora", "orthogonal")},
    "pissa_niter_4": partial(initialised, "pissa_niter_4"),
    "loftq": partial(initialised, "loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
    "eva": partial(initialised, "eva", after=eva, eva_config=peft.EvaConfig(rho=1.0)),
    "corda": partial(initialised, "corda", before=corda, corda_config=peft.tuners.lora.config.CordaConfig()),
    "lora_ga": partial(initialised, "lora_ga", before=loraga, lora_ga_config=peft.LoraGAConfig()),
}


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_every_initialisation_trains_as_on_stock(name):
    if name == "loftq" and not torch.cuda.is_available():
        pytest.skip("PEFT computes LoftQ on an accelerator only")
    follows_stock(INITIALISATIONS[name]())


# -- what is trained ----------------------------------------------------------------------------------


def trains(a, b):
    def between(model, step):
        for layer in adapted_layers(model).values():
            for factor, is_trained in zip(factors(layer), (a, b), strict=True):
                factor.requires_grad_(is_trained)

    return between


def of_all(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def in_turn(model, step):
    trains(step % 2 == 0, step % 2 == 1)(model, step)


@pytest.mark.parametrize(
    ("between", "factors_of_step"),
    [
        (trains(True, True), [{"lora_A", "lora_B"}] * STEPS),
        (trains(True, False), [{"lora_A"}] * STEPS),
        (trains(False, True), [{"lora_B"}] * STEPS),
        (in_turn, [{"lora_A"}, {"lora_B"}, {"lora_A"}]),
    ],
    ids=["both", "A", "B", "in turn"],
)
def test_a_frozen_factor_gets_no_gradient(between, factors_of_step):
    """Frozen from the start, or from one step to the next."""
    model = llama(init_lora_weights=False)
    seen = follows_stock(model, optimizer_of=of_all, between=between)
    for (_, grads), expected in zip(seen, factors_of_step, strict=True):
        assert {name.split(".")[-3] for name in grads} == expected
        assert all(grad.any() for grad in grads.values())
