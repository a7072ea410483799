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


def given(method, seed=0, **more):
    args = argparse.Namespace(rank=4, alpha=8, dropout=0.0, target_modules="all-linear", experts=None)
    return options(method, args, seed=seed, **more)


def layers(model):
    return {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}


def weights(model, which):
    return {name: getattr(layer, which)["default"].weight.detach() for name, layer in layers(model).items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_and_leaves_it_as_it_was(method):
    base = tiny_llama().requires_grad_(False)
    before = copy.deepcopy(base.state_dict())
    modules = [name for name, _ in base.named_modules()]
    expected = logits(base)
    with built(method, base, given(method)) as model:
        torch.testing.assert_close(logits(model), expected)
        for parameter in model.parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.add_(1.0)  # a training
        assert not torch.allclose(logits(model), expected)
    assert [name for name, _ in base.named_modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    torch.testing.assert_close(logits(base), expected, rtol=0, atol=0)


def test_what_is_trained():
    base = tiny_llama().requires_grad_(False)
    trained = {}
    for method in METHODS:
        with built(method, base, given(method)) as model:
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            trained[method] = {name.rpartition(".lora_")[2][:1] for name in names}
            ranks = {layer.r["default"] for layer in layers(model).values()}
            scalings = {layer.scaling["default"] for layer in layers(model).values()}
            assert ranks == {"mica": {4}, "random": {4}, "lora": {2}, "full": set()}[method]
            assert scalings <= {2.0}
    assert (trained["mica"], trained["random"], trained["lora"]) == ({"A"}, {"A"}, {"A", "B"})
    assert len(names) == len(list(base.parameters()))  # all of them, last


def test_a_random_b_is_orthonormal_and_drawn_by_the_seed():
    base = tiny_llama().requires_grad_(False)
    found = {}
    for method, seed in (("random", 0), ("random", 1), ("random", 0), ("mica", 0), ("mica", 1)):
        with built(method, base, given(method, seed)) as model:
            found.setdefault((method, seed), []).append(weights(model, "lora_B"))
    first, again = found["random", 0]
    for name, B in first.items():
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        assert torch.equal(B, again[name])
        assert not torch.allclose(B, found["random", 1][0][name])
        assert (B.T @ found["mica", 0][0][name]).norm() < 1.9  # 2 if it were MiCA's
        assert torch.equal(found["mica", 0][0][name], found["mica", 1][0][name])


def test_each_expert_has_a_random_b_of_its_own():
    base = moe_models.qwen3_moe().requires_grad_(False)
    args = given("random")
    args.experts = True
    with built("random", base, args) as model:
        stacks = [layer for layer in layers(model).values() if is_wrapper(layer)]
        assert stacks
        for layer in stacks:
            B = layer.lora_B["default"].weight
            of_expert = B.reshape(len(B), 4, layer.num_experts).permute(2, 0, 1)  # as PEFT reads it
            gram = of_expert.transpose(1, 2) @ of_expert
            torch.testing.assert_close(gram, torch.eye(4).expand_as(gram), rtol=0, atol=1e-5)


def test_loras_a_is_drawn_by_the_seed():
    base = tiny_llama().requires_grad_(False)
    found = []
    for seed in (0, 1, 0):
        with built("lora", base, given("lora", seed)) as model:
            found.append(weights(model, "lora_A"))
    assert all(torch.equal(A, found[2][name]) for name, A in found[0].items())
    assert not any(torch.equal(A, found[1][name]) for name, A in found[0].items())


def test_all_weights_are_trained_in_float32():
    base = tiny_llama().bfloat16().requires_grad_(False)
    with built("full", base, given("full")) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert base.dtype == torch.bfloat16


def test_an_error_takes_the_adapter_off():
    base = tiny_llama().requires_grad_(False)
    with pytest.raises(ZeroDivisionError), built("mica", base, given("mica")):
        raise ZeroDivisionError
    assert not layers(base)


def test_rates_double():
    assert doubling(2.5e-4) == (2.5e-4, 5e-4, 1e-3, 2e-3)
    for method in METHODS.values():
        assert list(method.rates) == sorted(method.rates)


def test_a_rank_of_one_has_no_half():
    args = given("mica", rank=1)
    assert options("lora", args).rank == 1
