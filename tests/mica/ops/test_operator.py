"""What all operators share: outputs that belong to the caller, and the short way past torch.library."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from mica import ops
from mica.ops import mica_linear
from mica.ops.embedding import embedding
from mica.ops.linear import linear, linear_eager
from tests.support.linear_calls import Seen, SeenFunctions, arguments
from tests.support.oracle import problem
from tests.support.processor import has_instructions

FP32, BF16 = torch.float32, torch.bfloat16
P = problem((2, 3), 8, 6, 2, FP32)
INDICES = torch.tensor([[0, 4, 1], [4, 2, 3]])
OPERATORS = {"base called": "linear"}

FRONTS = {
    "linear": linear,
    "base called": linear,
    "embedding": embedding,
}
of_each_front = pytest.mark.parametrize("name", FRONTS)
# name -> (arguments of a call, by the operand that is trained; that operand)
CALLS = {
    "linear": (lambda A: (P.x, P.weight, A, P.lora_B, 0.5, P.bias, None, 0.0, None), P.lora_A),
    "base called": (
        lambda A: (P.x, None, A, P.lora_B, 0.5, None, None, 0.0, None, None, False, P.grad_output),
        P.lora_A,
    ),
    "embedding": (lambda A: (INDICES, A, P.lora_B, 0.5, None, None), torch.randn(2, 5)),
}


def trained(name):
    return CALLS[name][1].detach().clone().requires_grad_()


def called(name, leaf, function=None):
    """By the front of the operator, or by another function."""
    return (function or FRONTS[name])(*CALLS[name][0](leaf))


def front_of(name):
    """The operator through the dispatcher; its first result where there are several."""
    operator = getattr(torch.ops.mica, OPERATORS.get(name, name))
    return (lambda *args: operator(*args)[0]) if operator is torch.ops.mica.linear else operator  # (y, h)


def test_an_output_of_a_compiled_call_may_be_changed_in_place():
    torch.compiler.reset()
    A = trained("linear")

    def function(A):
        return mica_linear(P.x, P.weight, A, P.lora_B).mul_(2.0).relu_()

    expected = torch.autograd.grad(function(A).square().sum(), A)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(A).square().sum(), A)[0], expected)
    assert ops.call_counts["linear"]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("tokens", [3, 17])  # masters of few tokens are multiplied in fp32
@pytest.mark.parametrize(
    "dtypes",  # each pair of them
    [(FP32, FP32, FP32), (FP32, BF16, BF16), (BF16, FP32, BF16), (BF16, BF16, FP32)],
    ids=str,
)
def test_past_every_check_autocast_gives_the_operator_s_bits(tokens, dtypes):
    """Forward, backward within autocast and outside of it, and without a gradient."""
    of_x, of_base, of_adapter = dtypes
    p = problem((tokens,), 40, 24, 8, torch.float32, scaling=1 / 3)
    frozen = p.weight.to(of_base), p.lora_B.to(of_adapter), p.bias.to(of_base)
    results = []
    operator = front_of("linear")
    for function, last in ((linear_eager, [0.0, None, torch.bfloat16]), (operator, [])):
        for backward_inside in (False, True):
            x, A = p.x.detach().clone().to(of_x), p.lora_A.detach().clone().to(of_adapter)
            x.requires_grad_(), A.requires_grad_()
            call = partial(function, x, frozen[0], A, frozen[1], 1 / 3, frozen[2], None, *last)
            with torch.autocast("cpu", torch.bfloat16):
                y = call()
                with torch.no_grad():
                    again = call()
            with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
                y.backward(torch.ones_like(y))
            results.append((y, again, x.grad, A.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@of_each_front
def test_an_eager_call_goes_past_the_dispatcher_to_the_same_bits(monkeypatch, name, autocast):
    has_instructions(True, monkeypatch)  # else it is called from Python
    results, events = [], []
    for function in (FRONTS[name], front_of(name)):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                leaf = trained(name)
                y = called(name, leaf, function)
                with torch.no_grad():
                    again = called(name, leaf, function)
            y.backward(torch.ones_like(y))
        results.append((y.detach(), again, leaf.grad))
        events.append({event.name for event in profiled.events()})
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert torch.equal(*results[0][:2])
    own, through_dispatcher = events
    assert not [event for event in own if event.startswith("mica::")]
    function = "_" if name == "embedding" else "CppNode"
    assert [event for event in own if function in event]
    assert [event for event in through_dispatcher if event.startswith("mica::")]


@of_each_front
def test_a_dispatch_mode_sees_the_operators(name):
    """Around the backward alone, too."""
    with Seen() as seen:
        y = called(name, trained(name))
        y.backward(torch.ones_like(y))
    operator = f"mica::{OPERATORS.get(name, name)}"
    assert {operator, f"{operator}_backward"} <= set(seen.names)
    y = called(name, trained(name))
    with Seen() as seen:
        y.backward(torch.ones_like(y))
    aten = None if name == "embedding" else "aten::mm"  # of its C++
    assert {f"{operator}_backward", aten} & set(seen.names)


@of_each_front
def test_a_function_mode_sees_the_operators(name):
    with SeenFunctions() as seen:
        called(name, trained(name))
    assert [function for function in seen.names if f"mica.{OPERATORS.get(name, name)}" in function]


def test_tensors_of_other_classes_are_the_dispatcher_s():
    seen = []

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    for i in range(4):
        seen.clear()
        args = list(CALLS["linear"][0](P.lora_A))
        args[i] = args[i].as_subclass(Loud)
        linear(*args)
        assert any("mica.linear" in name for name in seen)


def test_a_device_without_a_rule_is_the_dispatcher_s():
    y = linear(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), CALLS["linear"][0](P.lora_A)))
    assert y.device.type == "meta"
    assert y.shape == P.grad_output.shape


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "gaps": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "one row": lambda t: t[..., :1, :].expand(t.shape),
    "one number": lambda t: t[..., :1, :1].expand(t.shape),
}


def in_other_layouts(operands: tuple):
    """The operands, each tensor of two or more dimensions in turn in each of ``LAYOUTS``."""
    for place, operand in enumerate(operands):
        for name, layout in LAYOUTS.items():
            if isinstance(operand, torch.Tensor) and operand.dim() >= 2:
                yield f"{name} {place}", (*operands[:place], layout(operand), *operands[place + 1 :])


@pytest.mark.parametrize("name", arguments())
def test_the_strides_of_results_are_those_that_a_compiler_is_told(backend, name):
    """Inductor compiles what follows for the fake's strides, and stops at others."""
    operator = getattr(torch.ops.mica, name).default
    for case, operands in in_other_layouts(arguments()[name]):
        results = operator(*operands)
        with FakeTensorMode() as mode:
            fakes = operator(*tree_map_only(torch.Tensor, mode.from_tensor, operands))
        told, actual = ([result.stride() for result in tree_leaves(some)] for some in (fakes, results))
        assert actual == told, case


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "linear",
            "x weight lora_A lora_B scaling bias compute_dtype dropout_p seed grad_dtype trains_B"
            " base_output",
        ),
        (
            "experts_linear",
            "x offsets weight lora_A lora_B scaling bias compute_dtype tokens inverse trains_B",
        ),
        ("embedding", "indices lora_A lora_B scaling padding_idx compute_dtype"),
    ],
)
def test_the_arguments_of_a_forward_begin_as_those_of_0_3(name, arguments):
    """Graphs that Inductor compiled with another release, and keeps, call by these names."""
    schema = getattr(torch.ops.mica, name).default._schema
    assert [argument.name for argument in schema.arguments] == arguments.split()
