"""The models of a comparison: each what its method says, all on one base, which stays as it was."""

import argparse
import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer

import mica.fast
from mica.cli.compare.methods import METHODS, options
from mica.cli.compare.models import built
from tests.support.tiny_cli import logits, tiny_llama


@pytest.fixture
def base():
    return tiny_llama().requires_grad_(False)


def model_of(method, base, seed=0, **more):
    args = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "experts": None} | more
    return built(base, options(method, argparse.Namespace(**args), seed=seed))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_and_leaves_it_as_it_was(method, base):
    before = copy.deepcopy(base.state_dict())
    modules = [name for name, _ in base.named_modules()]
    expected = logits(base)
    with model_of(method, base) as model:
        mica.fast.call_counts.clear()
        torch.testing.assert_close(logits(model), expected)
        assert mica.fast.call_counts["linear"] == len(layers(model))  # on the same operators
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(1.0)  # a training
        assert not torch.allclose(logits(model), expected)
    assert [name for name, _ in base.named_modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_what_is_trained(base):
    trained = {}
    for method in METHODS:
        with model_of(method, base) as model:
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            ranks = {layer.r["default"] for layer in layers(model).values()}
            assert {layer.scaling["default"] for layer in layers(model).values()} <= {2.0}
            trained[method] = {name.rpartition(".lora_")[2][:1] for name in names}, ranks
    assert trained["mica"] == ({"A"}, {4})
    assert trained["lora"] == ({"A", "B"}, {2})
    assert len(names) == len(list(base.parameters()))  # all of them, last
    with model_of("full", base.bfloat16()) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_draws_a_of_lora(base):
    found = []
    for seed in (0, 1, 0):
        with model_of("lora", base, seed) as model:
            found.append([layer.lora_A["default"].weight.detach() for layer in layers(model).values()])
    for first, other, again in zip(*found, strict=True):
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)


def test_an_error_takes_the_adapter_off(base):
    with pytest.raises(ZeroDivisionError), model_of("mica", base):
        raise ZeroDivisionError
    assert not layers(base)


def test_a_rank_of_one_has_no_half():
    assert options("lora", argparse.Namespace(rank=1, alpha=1)).rank == 1
