"""The models of a comparison: each what its method says, all on one base, which stays as it was."""

import argparse
import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer

from mica.cli.compare.methods import METHODS, doubling, options
from mica.cli.compare.models import built
from mica.fast.forward.expert_params import is_wrapper
from tests.support import moe_models
from tests.support.tiny_cli import logits, tiny_llama


@pytest.fixture
def base():
    return tiny_llama().requires_grad_(False)


def model_of(method, base, seed=0, **more):
    args = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "experts": None} | more
    return built(method, base, options(method, argparse.Namespace(**args), seed=seed))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_and_leaves_it_as_it_was(method, base):
    before = copy.deepcopy(base.state_dict())
    modules = [name for name, _ in base.named_modules()]
    expected = logits(base)
    with model_of(method, base) as model:
        torch.testing.assert_close(logits(model), expected)
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
    assert trained["mica"] == trained["random"] == ({"A"}, {4})
    assert trained["lora"] == ({"A", "B"}, {2})
    assert len(names) == len(list(base.parameters()))  # all of them, last
    with model_of("full", base.bfloat16()) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_is_random_is_drawn_by_the_seed(base):
    """LoRA's A, and a random B, which is orthonormal and not MiCA's."""
    found = {}
    for method, which in (("random", "lora_B"), ("mica", "lora_B"), ("lora", "lora_A")):
        for draw, seed in enumerate((0, 1, 0)):
            with model_of(method, base, seed) as model:
                for name, layer in layers(model).items():
                    found[method, draw, name] = getattr(layer, which)["default"].weight.detach()
    for name in {name for *_, name in found}:
        for method in ("random", "lora"):
            first, other, again = (found[method, draw, name] for draw in range(3))
            assert torch.equal(first, again)
            assert not torch.allclose(first, other)
        B, minor = found["random", 0, name], found["mica", 0, name]
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        assert (B.T @ minor).norm() < 1.9  # 2 if it were MiCA's
        assert torch.equal(minor, found["mica", 1, name])


def test_each_expert_has_a_random_b_of_its_own():
    base = moe_models.qwen3_moe().requires_grad_(False)
    with model_of("random", base, experts=True) as model:
        stacks = [layer for layer in layers(model).values() if is_wrapper(layer)]
        assert stacks
        for layer in stacks:
            B = layer.lora_B["default"].weight
            of_expert = B.reshape(len(B), 4, layer.num_experts).permute(2, 0, 1)  # as PEFT reads it
            gram = of_expert.transpose(1, 2) @ of_expert
            torch.testing.assert_close(gram, torch.eye(4).expand_as(gram), rtol=0, atol=1e-5)


def test_an_error_takes_the_adapter_off(base):
    with pytest.raises(ZeroDivisionError), model_of("mica", base):
        raise ZeroDivisionError
    assert not layers(base)


def test_rates_double_and_a_rank_of_one_has_no_half():
    assert doubling(2.5e-4) == (2.5e-4, 5e-4, 1e-3, 2e-3)
    assert options("lora", argparse.Namespace(rank=1, alpha=1)).rank == 1
