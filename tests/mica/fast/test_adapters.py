"""Several adapters at once, mixed batches, and adapters as files: the results of PEFT's own code."""

import copy
import subprocess
import sys

import pytest
import torch
from models import TARGETS, adapted_layers, bases, gradients, net, randomise, wrap
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from tolerances import RELATIVE, error
from training import batches, llama, on_the_fast_path, train

import mica.fast

pytestmark = pytest.mark.usefixtures("one_thread")

INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3], [5, 6, 11, 12]])
FP32 = 3 * RELATIVE[torch.float32]


def several(second_rank=4, **kwargs):
    """A net with the MiCA adapters "default" and "second", both with values in A."""
    model = net(**kwargs)
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha = second_rank, 3
    model.add_adapter("second", config)
    return randomise(model)


def activate(model, *names):
    model.base_model.set_adapter(list(names))


def output_and_gradients(model, **kwargs):
    model.zero_grad(set_to_none=True)
    out = model(INDICES, **kwargs)
    if out.requires_grad:
        out.float().square().mean().backward()
    return out.detach(), gradients(model)


def as_stock(model, tolerance=FP32, **kwargs):
    """Output and gradients with the backend on and off are the same; returns the output."""
    out, grads = output_and_gradients(model, **kwargs)
    with mica.fast.disabled():
        expected, expected_grads = output_and_gradients(model, **kwargs)
    assert error(out, expected) <= tolerance
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert "lora_B" not in name
        assert "lora_embedding_B" not in name
        assert error(grad, expected_grads[name]) <= tolerance, name
    return out


def path(model):
    return mica.fast.explain(model).counts()


# ---------------------------------------------------------------------------------------------------
# several adapters
# ---------------------------------------------------------------------------------------------------


def test_switching():
    model = several(second_rank=3)
    first = as_stock(model)
    model.set_adapter("second")
    assert path(model) == {"reference": 4}
    second = as_stock(model)
    assert error(second, first) > 0.01
    assert {name for name in gradients(model) if "default" in name} == set()
    with model.disable_adapter():
        base = as_stock(model)
    assert error(base, first) > 0.01
    model.set_adapter("default")
    assert torch.equal(as_stock(model), first)


def test_deleting_and_adding_the_same_name_again():
    model = several()
    first_B = bases(model)
    config = copy.deepcopy(model.peft_config["second"])
    before = as_stock(model)
    model.delete_adapter("second")
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert path(model) == {"reference": 4}
    with model.disable_adapter():
        base = model(INDICES)
    assert error(as_stock(model), base) <= FP32  # a new adapter: A = 0
    for name, B in bases(model, "second").items():
        assert not B.requires_grad
        assert error(B, first_B[name]) <= FP32  # the same weights, the same subspace
    model.delete_adapter("second")
    assert torch.equal(as_stock(model), before)


COMBINATIONS = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
COMBINATIONS += [f"{name}_svd" for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")]


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_weighted_adapter(combination, dtype):
    """The same factors as stock makes of the same adapters, and a layer on the fast path with them."""
    ranks_may_differ = combination == "cat" or "svd" in combination
    model = several(second_rank=3 if ranks_may_differ else 4, dtype=dtype)
    stock = copy.deepcopy(model)

    def add(model):
        torch.manual_seed(7)  # dare_* drop at random
        density = {} if combination in ("linear", "cat", "svd") else {"density": 0.6}
        weights = [0.7, 0.5]
        model.add_weighted_adapter(["default", "second"], weights, "both", combination, **density)
        model.set_adapter("both")

    add(model)
    with mica.fast.disabled():
        add(stock)
    for layer, other in zip(adapted_layers(model).values(), adapted_layers(stock).values(), strict=True):
        ours, theirs = layer.get_delta_weight("both"), other.get_delta_weight("both")
        assert ours.norm() > 0
        assert error(ours, theirs) <= 30 * RELATIVE[torch.float32]
    assert path(model) == {"reference": 4}
    as_stock(model.eval(), 3 * RELATIVE[dtype])
    assert not any(B.requires_grad for B in bases(model, "both").values())


def test_two_active_adapters():
    model = several(second_rank=3)
    first = as_stock(model)
    activate(model, "default", "second")
    both = as_stock(model)
    assert error(both, first) > 0.01
    assert len([name for name in gradients(model) if "second" in name]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names",
    [
        ["default", "second", "__base__"],
        ["__base__", "__base__", "__base__"],
        ["second", "default", "second"],
        ["default", "default", "default"],
    ],
)
def test_mixed_batches(names, dtype):
    model = several(second_rank=3, dtype=dtype).eval()
    mixed = as_stock(model, 3 * RELATIVE[dtype], adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(INDICES)
        else:
            model.set_adapter(name)
            alone = model(INDICES)
        assert error(mixed[row], alone[row]) <= 3 * RELATIVE[dtype]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_dropout(p):
    """In expectation the same, without dropout in evaluation the same: masks come from different generators."""
    model = llama(lora_dropout=p)
    randomise(model)
    ids = batches(1)[0]
    with torch.no_grad():
        sampled = torch.stack([model(ids).logits for _ in range(60)]).mean(0)
        exact = model.eval()(ids).logits
        with mica.fast.disabled():
            stock = model(ids).logits
            sampled_stock = torch.stack([model.train()(ids).logits for _ in range(60)]).mean(0)
    assert error(exact, stock) <= 5 * RELATIVE[torch.float32]
    spread = error(sampled_stock, exact)
    assert spread > 0.01 or p == 0.0
    assert error(sampled, exact) <= 1.5 * spread + FP32
