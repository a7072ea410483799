"""What an implementation that takes steps must fulfil: before it is timed, and after."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mica.fast
from bench.results.names import BARE, FAST, STOCK
from bench.suites.layer import Form, adapted_module, make_layer
from bench.suites.steps import Step, checked, expected_operators, operators


class Once:
    """Calls as the suites' fixture does, and keeps the axes; pytest-benchmark adds further calls."""

    def __call__(self, function, group, implementation, axes, iterations):
        for _ in range(iterations + 3):
            function()
        self.axes = axes


def layer_step(context=nullcontext, ran=None, optimizer=None):
    """A step that runs one operator of mica.fast; what it claims to run may be wrong."""
    layer = make_layer(4, 8, 8, 2, torch.float32, "cpu")
    module, lora_A = adapted_module(layer, torch.float32, init="mica")
    x = layer.x.detach()[None].requires_grad_()
    claimed = operators(1, on_kernels=False) if ran is None else ran
    optimizer = optimizer and optimizer([lora_A], lr=1.0)
    form = Form(lambda: module(x), (x, lora_A), context, module)
    return Step(form, torch.ones(1, 4, 8), optimizer, claimed)


def test_a_step_leaves_no_gradient():
    step = layer_step()
    before = Counter(mica.fast.call_counts)
    y = step()
    assert Counter(mica.fast.call_counts) - before == step.operators
    assert y.shape == (1, 4, 8)
    assert all(tensor.grad is None for tensor in step.form.inputs)


def test_a_step_trains_where_there_is_an_optimizer():
    step = layer_step(optimizer=torch.optim.SGD)
    lora_A = step.form.inputs[1]
    before, expected = lora_A.detach().clone(), step.results()["dA"].view_as(lora_A)
    step()
    torch.testing.assert_close(before - lora_A, expected)


@pytest.mark.parametrize("forward_only", [False, True])
def test_a_sample_holds_calls_of_one_kind(forward_only):
    step, once = layer_step(), Once()
    before = Counter(mica.fast.call_counts)
    call = step.form.forward if forward_only else None
    assert step.time(once, "group", "implementation", {"suite": "host layer"}, 5, call) == 8
    ran = Counter(mica.fast.call_counts) - before
    assert ran["linear"] == 8
    assert ran["linear_backward"] == (0 if forward_only else 8)
    assert once.axes == {"suite": "host layer"}


@pytest.mark.parametrize(
    ("forward_only", "context", "ran"),
    [
        (False, mica.fast.disabled, None),  # stock PEFT under our name
        (True, mica.fast.disabled, None),
        (False, nullcontext, {}),  # ours under stock PEFT's
        (True, nullcontext, {}),
        (False, nullcontext, operators(1, on_kernels=True)),  # the PyTorch form under the kernels'
        (False, nullcontext, operators(2, on_kernels=False)),
        (False, nullcontext, operators(1, on_kernels=False, forwards=2)),
    ],
)
def test_an_implementation_under_another_ones_name_gets_no_number(forward_only, context, ran):
    step = layer_step(context, ran)
    with pytest.raises(AssertionError, match="implementation ran"):
        step.time(Once(), "group", "implementation", {}, 5, step.form.forward if forward_only else None)


def test_operators_of_a_forward_and_backward():
    ran = dict.fromkeys(("linear", "linear_backward", "linear_kernels", "linear_backward_kernels"), 2)
    assert operators(2, on_kernels=True) == ran
    assert operators(7, on_kernels=False) == {"linear": 7, "linear_backward": 7}
    assert operators(7, on_kernels=False, forwards=2) == {"linear": 14, "linear_backward": 7}


def test_operators_that_a_name_implies():
    assert expected_operators(FAST, 7) == operators(7)
    assert expected_operators(BARE, 7) == expected_operators(STOCK, 7) == {}


def test_results_that_agree_are_taken():
    step = layer_step()
    gates = dict.fromkeys(("y", "dx", "dA"), 1e-5)
    assert checked(step, layer_step(mica.fast.disabled, {}).results(), gates) is not None


@pytest.mark.parametrize("what", ["y", "dx", "dA"])
def test_a_wrong_result_is_named(what):
    expected = layer_step(mica.fast.disabled, {}).results()
    expected[what] = 1.1 * expected[what]
    with pytest.raises(AssertionError, match=f"{what} is 9.1e-02 off stock PEFT's"):
        checked(layer_step(), expected, dict.fromkeys(expected, 1e-2))


def test_right_results_of_other_operators_are_not_taken():
    step = layer_step(mica.fast.disabled)
    with pytest.raises(AssertionError, match=r"a step ran {}, not {'linear': 1"):
        checked(step, step.results(), dict.fromkeys(("y", "dx", "dA"), 1e-5))


def test_a_frozen_model_has_no_gradient_of_adapters():
    x, module = torch.randn(2, 3, requires_grad=True), nn.Linear(3, 3).requires_grad_(False)
    results = Step(Form(lambda: module(x), (x,)), torch.ones(2, 3)).results()
    assert results.keys() == {"y", "dx"}
