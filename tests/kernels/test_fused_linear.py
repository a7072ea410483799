import pytest
import torch

from mica.kernels import configs
from mica.kernels.fused_linear import fused_linear, why_not_descriptor
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import BF16, DEVICE, DTYPES, FP16, SHAPES, draw, far_apart, operand, seed_of
from tests.support.oracle import dropped
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error


def expected(x, w, h, factor, bias=None, dropout_p=0.0, seed=None):
    rank = min(h.shape[1], factor.shape[0])
    update = dropped(h[:, :rank].double() @ factor[:rank].double(), dropout_p, seed)
    return x.double() @ w.double() + update + (0 if bias is None else bias.double())


def check(x, w, h, factor, descriptor=False, config=None, bias=None, seed=None, dropout_p=0.0):
    exact, seed = expected(x, w, h, factor, bias, dropout_p, seed), seed if dropout_p else None
    call = fused_linear.plan(x, w, h, factor, bias, seed, descriptor=descriptor, dropout_p=dropout_p)
    out = run_guarded(*call.bind(config))
    assert out.dtype == x.dtype
    assert error(out, exact) <= RELATIVE[x.dtype]


def aligned(rows, columns, dtype, transposed=False, scale=1.0):
    """Rows that start at multiples of 16 bytes, as the copy engine wants them."""
    if transposed:
        return aligned(columns, rows, dtype, scale=scale).t()
    stride = -(-columns // 16) * 16 + 16
    wide = operand(rows, stride, dtype, "contiguous", scale)
    wide[:, columns:] = float("nan")
    return wide[:, :columns]


# Of descriptors tiles that hang over every edge of the matrices, and more tiles than programs
CASES = [(False, shape) for shape in SHAPES]
CASES += [(True, shape) for shape in ((0, 16, 8, 2), (1, 1, 8, 1), (150, 75, 136, 5), (300, 130, 264, 20))]


@pytest.mark.parametrize(("dtype", "factor_dtype", "low_dtype"), DTYPES)
@pytest.mark.parametrize(("descriptor", "shape"), CASES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(dtype, factor_dtype, low_dtype, descriptor, shape, backward, dropout_p):
    """Forward: the weight transposed, with a bias; backward: the weight as it is, with dropout's mask."""
    tokens, inner, width, rank = shape
    if descriptor:
        x, w = aligned(tokens, inner, dtype), aligned(inner, width, dtype, not backward, inner**-0.5)
    else:
        layout = "rows" if backward else "columns"
        x, w = operand(tokens, inner, dtype), operand(inner, width, dtype, layout, inner**-0.5)
    h, factor = operand(tokens, rank, low_dtype), operand(rank, width, factor_dtype, scale=rank**-0.5)
    bias = None if backward else operand(1, width, dtype)[0]
    check(x, w, h, factor, descriptor, bias=bias, seed=seed_of(4), dropout_p=dropout_p)


@given(
    tokens=draw.sizes,
    inner=st.integers(1, 200),
    width=draw.sizes,
    rank=draw.ranks,
    kinds=draw.dtypes,
    x=draw.layouts,
    w=draw.layouts,
    p=draw.layouts,
    drop=draw.probabilities,
)
def test_any_shape_and_layout(tokens, inner, width, rank, kinds, x, w, p, drop):
    check(
        operand(tokens, inner, kinds[0], x),
        operand(inner, width, kinds[0], w, scale=inner**-0.5),
        operand(tokens, rank, kinds[2]),
        operand(rank, width, kinds[1], p, scale=rank**-0.5),
        dropout_p=drop,
        seed=seed_of(inner),
    )


def test_every_configuration():
    """By pointers and by descriptors, which want aligned rows."""
    x, w = torch.randn(150, 104).bfloat16().to(DEVICE), (torch.randn(104, 136) * 0.1).bfloat16().to(DEVICE)
    h, factor = operand(150, 9, BF16), operand(9, 136, BF16, scale=0.3)
    forms = {
        (descriptor, config)
        for descriptor in (False, True)
        for target in configs.SHARED_MEMORY
        for tokens in (1, 10_000)
        for config in configs.fused_linear(target, tokens, 14336, 16, True, 2, descriptor, False)
    }
    assert any(config.block_n == 256 for _, config in forms)
    for descriptor, config in sorted(forms):
        check(x, w, h, factor, config=config, descriptor=descriptor)


def test_one_rounding():
    """The base product is not rounded before the low-rank term is added: half a unit in the last place."""
    x, w = operand(64, 32, BF16), operand(32, 64, BF16)
    h, factor = operand(64, 4, BF16), operand(4, 64, BF16)
    out, exact = fused_linear(x, w, h, factor), expected(x, w, h, factor)
    assert ((out.double() - exact).abs() <= 0.5 * 2**-7 * exact.abs() + 1e-5).all()


def test_offsets_beyond_32_bit():
    x, w = far_apart(3, 70, FP16), operand(70, 8, FP16)
    h, factor = operand(3, 4, FP16), operand(4, 8, FP16)
    assert error(fused_linear(x, w, h, factor), expected(x, w, h, factor)) <= RELATIVE[FP16]
    wide = far_apart(3, 70, FP16)  # as a weight of three rows
    x, h, factor = operand(5, 3, FP16), operand(5, 4, FP16), operand(4, 70, FP16)
    assert error(fused_linear(x, wide, h, factor), expected(x, wide, h, factor)) <= RELATIVE[FP16]


@pytest.mark.parametrize(
    ("x", "w", "target", "reason"),
    [
        ((8, 16), (16, 8), "sm_80", "sm_80 has no copy engine"),
        ((8, 15), (15, 8), "sm_90", "the rows of x are not contiguous and aligned"),
        ((8, 16), (16, 9), "sm_90", "the rows of w are not contiguous and aligned"),
        ((8, 16), (16, 8), "sm_90", None),
        ((8, 16), (16, 8), "sm_120", None),
    ],
)
def test_why_not_descriptor(x, w, target, reason):
    actual = why_not_descriptor(torch.zeros(x).bfloat16(), torch.zeros(w).bfloat16(), target)
    assert actual == reason or reason in actual


def test_descriptors_of_unaligned_results_are_refused():
    x, w = torch.zeros(8, 16).bfloat16(), torch.zeros(9, 16).bfloat16().t()
    assert "the rows of x" in why_not_descriptor(torch.zeros(16, 8).bfloat16().t(), w, "sm_90")
    with pytest.raises(ValueError, match=r"descriptor=True is not possible: the rows of the result are not"):
        fused_linear(x, w, torch.zeros(8, 2), torch.zeros(2, 9), descriptor=True)


def test_operands_that_move_are_refused_by_a_kept_plan():
    x, w = torch.randn(9, 16).bfloat16().to(DEVICE), torch.randn(16, 8).bfloat16().to(DEVICE)
    h, factor = operand(8, 2, BF16), operand(2, 8, BF16)
    shifted = x.view(-1)[1:129].view(8, 16)
    fused_linear(x[:8], w, h, factor, descriptor=True)
    with pytest.raises(ValueError, match=r"descriptor=True is not possible: x or w is not aligned"):
        fused_linear(shifted, w, h, factor, descriptor=True)
