import pytest
import torch

from mica.kernels import configs
from mica.kernels.fused_linear import fused_linear
from tests.support.expert_cases import exact_fused
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import (
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    SHAPES,
    TARGETS,
    draw,
    far_apart,
    operand,
    seed_of,
)
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error


def check(x, w, h, factor, config=None, bias=None, seed=None, dropout_p=0.0):
    expected = exact_fused(x, w, h, factor, bias, dropout_p, seed)
    seed = seed if dropout_p else None
    call = fused_linear.plan(x, w, h, factor, bias, seed, dropout_p=dropout_p)
    out = run_guarded(*call.bind(config))
    assert out.dtype == x.dtype
    assert error(out, expected) <= RELATIVE[x.dtype]


@pytest.mark.parametrize(("dtype", "factor_dtype", "low_dtype"), DTYPES)
@pytest.mark.parametrize(("tokens", "inner", "width", "rank"), SHAPES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(dtype, factor_dtype, low_dtype, tokens, inner, width, rank, backward, dropout_p):
    """Forward: the weight transposed, with a bias; backward: the weight as it is, with dropout's mask."""
    x = operand(tokens, inner, dtype)
    w = operand(inner, width, dtype, "rows" if backward else "columns", inner**-0.5)
    h = operand(tokens, rank, low_dtype)
    factor = operand(rank, width, factor_dtype, scale=rank**-0.5)
    bias = None if backward else operand(1, width, dtype)[0]
    check(x, w, h, factor, bias=bias, seed=seed_of(4), dropout_p=dropout_p)


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
    x = torch.randn(150, 104).bfloat16().to(DEVICE)
    w = (torch.randn(104, 136) * 0.1).bfloat16().to(DEVICE)
    h = operand(150, 9, BF16)
    factor = operand(9, 136, BF16, scale=0.3)
    chosen = {
        config
        for target in TARGETS
        for tokens in (1, 10_000)
        for config in configs.fused_linear(target, tokens, 14336, 16, True, 2, False)
    }
    assert any(config.block_n == 256 for config in chosen) == ("sm_90" in TARGETS or "sm_100" in TARGETS)
    for config in sorted(chosen):
        check(x, w, h, factor, config=config)


def test_one_rounding():
    """The base product is not rounded before the low-rank term is added: half a unit in the last place."""
    x, w = operand(64, 32, BF16), operand(32, 64, BF16)
    h, factor = operand(64, 4, BF16), operand(4, 64, BF16)
    out, expected = fused_linear(x, w, h, factor), exact_fused(x, w, h, factor)
    assert ((out.double() - expected).abs() <= 0.5 * 2**-7 * expected.abs() + 1e-5).all()


@pytest.mark.usefixtures("large_memory")
def test_offsets_beyond_32_bit():
    x, w = far_apart(3, 70, FP16), operand(70, 8, FP16)
    h, factor = operand(3, 4, FP16), operand(4, 8, FP16)
    assert error(fused_linear(x, w, h, factor), exact_fused(x, w, h, factor)) <= RELATIVE[FP16]
    wide = far_apart(3, 70, FP16)  # as a weight of three rows
    x, h, factor = operand(5, 3, FP16), operand(5, 4, FP16), operand(4, 70, FP16)
    assert error(fused_linear(x, wide, h, factor), exact_fused(x, wide, h, factor)) <= RELATIVE[FP16]
