import pytest
import torch

from mica.paths import torch_path
from tests.support.experts_oracle import ROUTES, problem, run, solve
from tests.support.oracle import DTYPES
from tests.support.tolerances import RELATIVE, error


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_agrees_with_the_dense_oracle(dtype, adapter_dtype, compute_dtype, transposed, route):
    p = problem(route, 9, 14, 3, dtype, adapter_dtype, bias=not transposed, transposed=transposed)
    expected = solve(p)
    y = torch_path.experts_linear(
        p.x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, compute_dtype
    )
    operands = p.grad_output, p.x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling
    grad_x, grad_A = torch_path.experts_linear_backward(*operands, compute_dtype or dtype)
    for name, value in {"y": y, "grad_x": grad_x, "grad_A": grad_A}.items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name
    assert y.dtype == grad_x.dtype == dtype
    assert grad_A.dtype == adapter_dtype


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in ("none at all", "no rows")])
def test_is_differentiable_by_autograd(route):
    p = problem(route, 5, 4, 2, torch.float64)
    expected = solve(p)
    for name, value in run(p, torch_path.experts_linear).items():
        value = torch.zeros_like(expected[name]) if value is None else value
        assert error(value, expected[name]) <= RELATIVE[torch.float64], name


def test_only_experts_with_rows_are_read():
    """Those without have NaN in every operand, and get exact zeros."""
    p = problem("idle ones", 5, 4, 2, torch.float32)
    idle = [0, 2, 5]
    for operand in (p.weight, p.lora_A, p.lora_B, p.bias):
        operand[idle] = float("nan")
    y = torch_path.experts_linear(p.x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias)
    operands = p.grad_output, p.x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, torch.float32
    grad_x, grad_A = torch_path.experts_linear_backward(*operands)
    assert y.isfinite().all()
    assert grad_x.isfinite().all()
    assert (grad_A[idle] == 0).all()
    assert (grad_A[[1, 3, 4]] != 0).any(dim=2).all()


@pytest.mark.parametrize("missing", ["x", "weight"])
def test_computes_only_what_is_wanted(missing):
    p = problem("idle ones", 5, 4, 2, torch.float32)
    tensors = {"x": p.x, "weight": p.weight} | {missing: None}
    whole = torch_path.experts_linear_backward(
        p.grad_output, p.x, p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling, torch.float32
    )
    grads = torch_path.experts_linear_backward(
        p.grad_output,
        tensors["x"],
        p.offsets,
        tensors["weight"],
        p.lora_A,
        p.lora_B,
        p.scaling,
        torch.float32,
    )
    absent = 1 if missing == "x" else 0
    assert grads[absent] is None
    assert torch.equal(grads[1 - absent], whole[1 - absent])


def test_rank_0_is_the_base_product():
    p = problem("rows of none", 5, 4, 2, torch.float64)
    empty = p.lora_A[:, :0], p.lora_B[:, :, :0]
    y = torch_path.experts_linear(p.x, p.offsets, p.weight, *empty, 1.0, p.bias)
    p.scaling = 0.0
    assert error(y, solve(p)["y"]) <= RELATIVE[torch.float64]
