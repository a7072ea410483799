import pytest
import torch

from mica import reference
from mica.kernels import configs
from mica.kernels.down_projection import down_projection, plan_down_projection
from mica.kernels.limits import padded_columns
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import (
    DTYPES,
    SHAPES,
    dtypes,
    far_apart,
    layouts,
    operand,
    probabilities,
    ranks,
    seed_of,
    sizes,
)
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error


def expected(x, factor, scale, dropout_p=0.0, seed=None):
    x = x.double()
    if dropout_p:
        x = x.where(reference.dropout_keep(seed, *x.shape, dropout_p), 0) / (1 - dropout_p)
    return scale * (x @ factor.double().t())


def check(x, factor, dtype, scale=0.75, dropout_p=0.0, seed=None, **options):
    options |= {"scale": scale, "compute_dtype": dtype, "dropout_p": dropout_p, "seed": seed}
    h = run_guarded(*plan_down_projection(x, factor, **options).bound())
    rank = factor.shape[0]
    assert h.dtype == dtype
    assert h.shape == (x.shape[0], padded_columns(rank))
    assert not h[:, rank:].any()
    assert error(h[:, :rank], expected(x, factor, scale, dropout_p, seed)) <= RELATIVE[dtype]


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize(("tokens", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(
    dtype, factor_dtype, compute_dtype, tokens, in_features, out_features, rank, dropout_p
):
    x = operand(tokens, in_features, dtype)
    factor = operand(rank, in_features, factor_dtype, scale=in_features**-0.5)
    check(x, factor, compute_dtype, dropout_p=dropout_p, seed=seed_of(-5))


@pytest.mark.parametrize("length", [64, 150])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_rows_beyond_the_last(length, target):
    """Masked on AMD, clamped elsewhere; far apart, so that one row too many is outside the mapped memory."""
    x, factor = operand(33, length, torch.bfloat16), operand(5, length, torch.float32, scale=length**-0.5)
    check(x, factor, torch.bfloat16, target=target)
    x = far_apart(3, length, torch.bfloat16)
    h, launch = plan_down_projection(x, factor, target=target).bound()
    launch()
    assert error(h[:, :5], expected(x, factor, 1.0)) <= RELATIVE[torch.bfloat16]


@given(
    tokens=sizes,
    length=st.integers(1, 400),
    rank=ranks,
    kinds=dtypes,
    x=layouts,
    p=layouts,
    drop=probabilities,
)
def test_any_shape_and_layout(tokens, length, rank, kinds, x, p, drop):
    factor = operand(rank, length, kinds[1], p, scale=length**-0.5)
    check(operand(tokens, length, kinds[0], x), factor, kinds[2], dropout_p=drop, seed=seed_of(length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1024, 1500, 2049])
def test_splits_are_summed_in_order(dtype, length):
    """More than one split, the last of them shorter; a rerun has the same bits."""
    x, factor = operand(40, length, dtype), operand(6, length, torch.float32, scale=length**-0.5)
    _, launch = plan_down_projection(x, factor).bound()
    assert launch.meta["SPLIT"]
    assert launch.args["num_splits"] == launch.grid[1] > 1
    check(x, factor, dtype)
    check(x, factor, dtype, dropout_p=0.2, seed=seed_of(3))
    assert torch.equal(down_projection(x, factor), down_projection(x, factor))


def test_every_configuration():
    x, factor = operand(150, 200, torch.bfloat16), operand(9, 200, torch.float32, scale=0.07)
    for target in configs.SHARED_MEMORY:
        for tokens in (1, 10_000):
            for config in configs.down_projection(target, tokens, 16, 2):
                check(x, factor, torch.bfloat16, config=config)


def test_offsets_beyond_32_bit():
    x, factor = far_apart(3, 70, torch.float16), operand(4, 70, torch.float32)
    h = down_projection(x, factor)
    assert error(h[:, :4], expected(x, factor, 1.0)) <= RELATIVE[torch.float16]
    h = down_projection(x.t().contiguous().t(), factor)
    assert error(h[:, :4], expected(x, factor, 1.0)) <= RELATIVE[torch.float16]


def test_no_tokens():
    h = down_projection(operand(0, 8, torch.float32, "contiguous"), operand(2, 8, torch.float32))
    assert h.shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.randn(3)}, ValueError, r"x must have 2 dimension\(s\), but its shape is \(3,\)"),
        ({"x": torch.randn(3, 5)}, ValueError, r"dimension 1 of x and dimension 1 of factor must be equal"),
        ({"x": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "x must be of dtype float32.*torch.int32"),
        ({"factor": torch.randn(2, 4).double()}, TypeError, "factor must be of dtype"),
        ({"factor": torch.randn(0, 4)}, ValueError, "factor must have a rank from 1 to 256.*is 0"),
        ({"factor": torch.randn(257, 4)}, ValueError, "it is 257"),
        ({"factor": torch.randn(2, 4).to("meta")}, ValueError, "x on cpu, factor on meta"),
        ({"compute_dtype": torch.float64}, TypeError, "compute_dtype must be float32"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1"),
        ({"dropout_p": 0.5}, ValueError, "seed must be an int64 tensor.*it is None"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1.0])}, ValueError, "it is torch.float32"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {"x": torch.randn(3, 4), "factor": torch.randn(2, 4), **change}
    with pytest.raises(kind, match=message):
        down_projection(**arguments)
