"""A stack of experts, beyond test_operators.py: tokens in place of rows, autocast, without an adapter."""

import pytest
import torch
from torch.library import opcheck

from mica import ops
from mica.ops import mica_experts_linear
from mica.ops.experts import experts_base, experts_linear
from mica.ops.routing import route, summed, to_experts
from tests.support.expert_cases import problem
from tests.support.linear_calls import addresses, agree, leaves, on_device, run, same_bits, saved_by
from tests.support.oracle import solve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_products_run_in_the_dtype_of_the_weight(dtype):
    """As transformers' grouped experts do, whose products autocast does not reach."""
    p = problem("first and last idle", 8, 6, 2, dtype, torch.float32)
    x = p.x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mica_experts_linear(x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias)
        y.backward(p.grad_output.to(y.dtype))
    assert y.dtype == dtype
    assert x.grad.dtype == torch.float32
    agree({"y": y, "grad_x": x.grad}, solve(p), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_fp32_is_cast_to_the_input_s_dtype(backend, dtype):
    """Which `mica.fast` passes under autocast; the public operator refuses it."""

    def unchecked(*operands, compute_dtype=None):
        return experts_linear(*operands, compute_dtype)

    p = problem("rows of none", 16, 24, 3, dtype, torch.float32)
    expected = run(p, function=unchecked)
    p.weight, p.bias = p.weight.float(), p.bias.float()
    same_bits(run(p, function=unchecked), expected)
    with pytest.raises(TypeError, match="weight"):
        run(p)


@pytest.mark.whole
@pytest.mark.parametrize("route", ["rows of none", "first and last idle", "no rows"])
@pytest.mark.parametrize("bias", [True, False])
def test_without_an_adapter(path, route, bias):
    """By an operator of its own: what a stack of rank 0 computes."""

    def base(x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype=None):
        return experts_base(x, offsets, weight, bias)

    p = on_device(problem(route, 8, 12, 3, torch.float32, bias=bias))
    p.lora_A, p.lora_B = p.lora_A[:, :0], p.lora_B[:, :, :0]
    actual = run(p, function=base)
    assert actual.pop("grad_A") is None
    assert ops.call_counts["experts_base_kernels"] == (2 if path == "triton" else 0)
    agree(actual, solve(p), torch.float32)


@pytest.mark.parametrize("gathers", [True, False])
def test_without_an_adapter_through_the_dispatcher(gathers):
    """As `torch.compile` calls it, with its gradient, and with that one's."""
    routing = route(torch.tensor([[1, 0], [2, 1], [3, 2]]), 3)  # 3: no expert
    order = (routing.tokens, routing.inverse) if gathers else (None, None)
    x = torch.randn(3 if gathers else 6, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    arguments = x, routing.offsets, weight, bias, *order
    opcheck(torch.ops.mica.experts_base.default, arguments)
    torch.testing.assert_close(torch.ops.mica.experts_base(*arguments), experts_base(*arguments))
    assert torch.autograd.gradcheck(lambda x: experts_base(x, *arguments[1:]), (x,))
    assert torch.autograd.gradgradcheck(lambda x: experts_base(x, *arguments[1:]).sin(), (x,))


# Tokens instead of rows


def routed(dtype=torch.float32, adapter_dtype=None):
    """The operands of 6 tokens with 2 of 6 experts each, and their routing."""
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(6)])
    chosen[3, 0] = 6  # none of them
    routing = route(chosen, 6)
    p = problem("first and last idle", 8, 6, 2, dtype, adapter_dtype)
    p.offsets, p.x = routing.offsets, p.x[:6]
    return p, routing


def arguments(p, x, lora_A, *order):
    return x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling, p.bias, None, *order


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_give_the_bits_of_their_rows(dtype):
    p, routing = routed(dtype, torch.promote_types(dtype, torch.float32))

    def both(x, *order):
        x, lora_A = x.detach().clone().requires_grad_(), p.lora_A.clone().requires_grad_()
        y = experts_linear(*arguments(p, x, lora_A, *order))
        y.backward(p.grad_output)
        return y, x.grad, lora_A.grad

    rows = both(to_experts(p.x, routing.tokens))
    y, grad_x, grad_A = both(p.x, routing.tokens, routing.inverse)
    assert torch.equal(y, rows[0])
    assert torch.equal(grad_x, summed(rows[1], routing.inverse, 6))
    assert torch.equal(grad_A, rows[2])


def test_tokens_are_saved_and_not_their_rows():
    p, routing = routed()
    x, lora_A = leaves(p)
    saved, y = saved_by(lambda: experts_linear(*arguments(p, x, lora_A, routing.tokens, routing.inverse)))
    assert saved <= addresses(x, p.weight, lora_A, p.lora_B, *routing[:4])
    y.sum().backward()


@pytest.mark.slow
def test_tokens_compiled_and_twice_differentiated():
    p, routing = routed(torch.float64)
    order, inputs = (routing.tokens, routing.inverse), leaves(p)

    def function(x, lora_A):
        return experts_linear(*arguments(p, x, lora_A, *order))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), function(*inputs))
    opcheck(torch.ops.mica.experts_linear.default, arguments(p, *inputs, *order))
    x, offsets, *operands = arguments(p, p.x, p.lora_A)
    operands = (p.grad_output, x, offsets, [True, True], *operands[:4], None, torch.float64)
    opcheck(torch.ops.mica.experts_linear_backward.default, (*operands, *order, 6))
