"""PEFT's optimizers over MiCA: LoRA-FA is refused (fault 9), the others work or refuse by themselves."""

import copy
import warnings
from contextlib import nullcontext

import peft.optimizers
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer, lorafa

import mica.fast
from tests.support.models import adapted_layers, assert_same_bases, factors, net, tiny_llama, wrap
from tests.support.moe_models import second
from tests.support.peft_versions import is_at_least
from tests.support.stock import assert_same, both, counted
from tests.support.training import train, trainable
from tests.support.unchanged import unchanged

TOKENS = torch.arange(24).reshape(2, 12)


def lorafa_of(model, module=peft.optimizers):
    return module.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)


@pytest.mark.parametrize("module", [peft.optimizers, lorafa])
@pytest.mark.parametrize("targets", [["up", "down"], ["embed"]])
def test_lora_fa_is_refused_before_anything_is_frozen(module, targets):
    model = net(targets=targets)
    message = r"create_lorafa_optimizer trains only B, but adapter 'default' is MiCA.*an ordinary optimizer"
    with unchanged(model), pytest.raises(ValueError, match=message):
        lorafa_of(model, module)


def test_stock_lora_fa_leaves_nothing_trainable():
    """Fault 9, and not a word of it."""
    model = net(targets=["up", "down"])
    with mica.fast.disabled(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lorafa_of(model)
    assert not trainable(model)


def test_lora_fa_of_other_adapters_is_left_alone():
    model = net(targets=["up"], init_lora_weights=True)
    lorafa_of(model)
    assert [*trainable(model)] == ["base_model.model.up.lora_B.default.weight"]
    mixed = second(net(targets=["up"]), init_lora_weights=True)
    mixed.set_adapter("second")
    lorafa_of(mixed)
    assert [*trainable(mixed)] == ["base_model.model.up.lora_B.second.weight"]
    mixed.set_adapter("default")
    with pytest.raises(ValueError, match="adapter 'default' is MiCA"):
        lorafa_of(mixed)


@pytest.mark.parametrize("stock", [False, True])
def test_lora_plus_trains_a_alone(stock):
    """Its B group is empty and its ratio without effect: A trains at `lr`, an embedding's at its own."""
    model = wrap(tiny_llama(), targets=["q_proj", "embed_tokens"], stock=stock)
    before = copy.deepcopy(model)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-3
    )
    groups = [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
    embeddings = [(2, 1e-2), (1, 1e-3)] if is_at_least("0.21") else [(3, 1e-2), (0, 1e-3)]  # not found before
    assert groups == [*embeddings, (0, 0.16), (0, 0.16)]
    with mica.fast.disabled() if stock else nullcontext():
        train(model, [TOKENS, TOKENS], optimizer=optimizer)
    assert all(factors(layer)[0].any() for layer in adapted_layers(model).values())
    assert_same_bases(model, before)


def adamw_8bit(parameters, **options):
    """It does not count its edits, nor does fused AdamW. Small tensors it leaves in 32 bits."""
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, min_8bit_size=16, **options)


OPTIMIZERS = {  # each of a model
    "fused AdamW": lambda model: torch.optim.AdamW(trainable(model).values(), lr=1e-2, fused=True),
    "AdamW8bit": lambda model: adamw_8bit(trainable(model).values(), lr=1e-2),
    "LoRA-FA": lorafa_of,
    "LoRA+": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_lora_follows_stock(name):
    """Every step and the evaluations between them read B as it is."""
    mica.fast.enable(lora=True)

    def losses():
        model = wrap(tiny_llama(initializer_range=0.3), targets="all-linear", init_lora_weights=True).train()
        optimizer, seen = OPTIMIZERS[name](model), []
        for _ in range(4):
            seen.append(train(model, [TOKENS], optimizer=optimizer))
            with torch.no_grad():
                seen.append(model(input_ids=TOKENS, labels=TOKENS).loss)
        assert seen[-1] < seen[0] - 1e-2
        return seen

    (ours, stock), counts = counted(lambda: both(losses))
    assert counts["linear"] == 8 * 14
    assert_same(ours, stock, 1e-5)
