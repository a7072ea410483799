import pytest
import torch

from mica.paths import torch_path
from tests.support.experts_oracle import ROUTES, problem, run, solve
from tests.support.linear_calls import agree
from tests.support.oracle import DTYPES
from tests.support.tolerances import RELATIVE, error


def compute(p, compute_dtype=None):
    operands = p.offsets, p.weight, p.lora_A, p.lora_B, p.scaling
    y = torch_path.experts_linear(p.x, *operands, p.bias, compute_dtype)
    dtype = compute_dtype or p.x.dtype
    grad_x, grad_A = torch_path.experts_linear_backward(p.grad_output, p.x, *operands, dtype)
    return {"y": y, "grad_x": grad_x, "grad_A": grad_A}


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("dtype", "adapter_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_agrees_with_the_dense_oracle(dtype, adapter_dtype, compute_dtype, transposed, route):
    p = problem(route, 9, 14, 3, dtype, adapter_dtype, bias=not transposed, transposed=transposed)
    result = compute(p, compute_dtype)
    agree(result, solve(p), dtype)
    assert result["y"].dtype == result["grad_x"].dtype == dtype
    assert result["grad_A"].dtype == adapter_dtype


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
    result = compute(p)
    assert result["y"].isfinite().all()
    assert result["grad_x"].isfinite().all()
    assert (result["grad_A"][idle] == 0).all()
    assert (result["grad_A"][[1, 3, 4]] != 0).any(dim=2).all()


@pytest.mark.parametrize("missing", ["x", "weight"])
def test_computes_only_what_is_wanted(missing):
    p = problem("idle ones", 5, 4, 2, torch.float32)
    whole = compute(p)
    x, weight = (None if missing == name else getattr(p, name) for name in ("x", "weight"))
    grad_x, grad_A = torch_path.experts_linear_backward(
        p.grad_output, x, p.offsets, weight, p.lora_A, p.lora_B, p.scaling, torch.float32
    )
    assert grad_x is None if weight is None else torch.equal(grad_x, whole["grad_x"])
    assert grad_A is None if x is None else torch.equal(grad_A, whole["grad_A"])


def test_rank_0_is_the_base_product():
    p = problem("rows of none", 5, 4, 2, torch.float64)
    empty = p.lora_A[:, :0], p.lora_B[:, :, :0]
    y = torch_path.experts_linear(p.x, p.offsets, p.weight, *empty, 1.0, p.bias)
    p.scaling = 0.0
    assert error(y, solve(p)["y"]) <= RELATIVE[torch.float64]
