import pytest
import torch

from mica.kernels.grad_magnitude import grad_magnitude
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import BF16, DEVICE, FP16, FP32, draw, operand
from tests.support.properties import given
from tests.support.tolerances import RELATIVE, error


def matrix(rows, columns, dtype):
    return operand(rows, columns, dtype, "contiguous")


def check(dy, z):
    """dz, and the sums, whose error is measured by the sizes of what is added."""
    width = dy.shape[1]
    factor = matrix(1, width, FP32)[0]
    dz = torch.full_like(dy, float("nan"))
    parts, launch = grad_magnitude.plan(dy, z, factor, dz).bind()
    parts = run_guarded(parts, launch)
    dz = launch.args["dz_ptr"]

    assert parts.dtype == FP32
    products = dy.double() * z.double()
    sums = parts.sum(0).double()
    assert error(dz, dy.double() * factor.double()) <= RELATIVE[dy.dtype]
    assert ((sums - products.sum(0)).abs() <= RELATIVE[FP32] * products.abs().sum(0)).all()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 3), (32, 128), (33, 129), (70, 300)])
def test_agrees_with_fp64(dtype, tokens, width):
    check(matrix(tokens, width, dtype), matrix(tokens, width, dtype))


@given(tokens=draw.sizes, width=draw.sizes, kinds=draw.dtypes)
def test_any_shape(tokens, width, kinds):
    check(matrix(tokens, width, kinds[0]), matrix(tokens, width, kinds[1]))


def test_a_call_writes_what_is_planned():
    dy, z = matrix(40, 130, BF16), matrix(40, 130, BF16)
    factor = torch.randn(130, device=DEVICE)
    for _ in range(2):  # the second call reuses the plan of the first
        dz = torch.empty_like(dy)
        parts = grad_magnitude(dy, z, factor, dz)
        assert parts.shape == (2, 130)
        assert error(dz, dy.double() * factor.double()) <= RELATIVE[BF16]


def test_without_tokens_the_sums_are_zeros():
    nothing, factor = matrix(0, 8, BF16), torch.randn(8, device=DEVICE)
    parts = grad_magnitude(nothing, nothing, factor, torch.empty_like(nothing))
    assert torch.equal(parts.sum(0), torch.zeros(8, device=DEVICE))
