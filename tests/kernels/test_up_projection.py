import pytest
import torch

from mica import reference
from mica.kernels import configs
from mica.kernels.limits import padded_columns
from mica.kernels.up_projection import plan_up_projection, up_projection_
from tests.support.guarding import run_guarded, touched
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
from tests.support.properties import given
from tests.support.tolerances import RELATIVE, error


def expected(base, h, factor, scale, dropout_p=0.0, seed=None):
    rank = min(h.shape[1], factor.shape[0])
    update = scale * (h[:, :rank].double() @ factor[:rank].double())
    if dropout_p:
        update = update.where(reference.dropout_keep(seed, *base.shape, dropout_p), 0) / (1 - dropout_p)
    return base.double() + update


def check(base, h, factor, scale=0.75, **options):
    reference_options = {
        key: options.get(key, default) for key, default in (("dropout_p", 0.0), ("seed", None))
    }
    exact = expected(base, h, factor, scale, **reference_options)
    y = run_guarded(*plan_up_projection(base, h, factor, scale=scale, **options).bound())
    assert y.dtype == base.dtype
    assert error(y, exact) <= RELATIVE[base.dtype]


def padded_with(value, matrix, columns):
    wide = torch.full((matrix.shape[0], columns), value, dtype=matrix.dtype, device=matrix.device)
    wide[:, : matrix.shape[1]] = matrix
    return wide


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize(("tokens", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(
    dtype, factor_dtype, compute_dtype, tokens, in_features, out_features, rank, dropout_p
):
    check(
        operand(tokens, out_features, dtype),
        operand(tokens, rank, compute_dtype),
        operand(rank, out_features, factor_dtype, scale=rank**-0.5),
        dropout_p=dropout_p,
        seed=seed_of(11),
    )


@given(
    tokens=sizes, width=sizes, rank=ranks, kinds=dtypes, y=layouts, h=layouts, p=layouts, drop=probabilities
)
def test_any_shape_and_layout(tokens, width, rank, kinds, y, h, p, drop):
    check(
        operand(tokens, width, kinds[0], y),
        operand(tokens, rank, kinds[2], h),
        operand(rank, width, kinds[1], p, scale=rank**-0.5),
        dropout_p=drop,
        seed=seed_of(width),
    )


@pytest.mark.parametrize("rank", [1, 16, 20, 33])
def test_padding_of_either_side_is_not_read(rank):
    """A padded h with an unpadded factor, and the other way round: the shorter one decides."""
    base, columns = operand(9, 40, torch.float32), padded_columns(rank)
    h, factor = operand(9, rank, torch.float32), operand(rank, 40, torch.float32)
    wide_h, wide_factor = padded_with(0.0, h, columns), padded_with(0.0, factor.t(), columns).t()
    for left, right in ((wide_h, factor), (h, wide_factor), (wide_h, wide_factor)):
        check(base, left, right)


def test_in_place_and_out():
    base, h, factor = (
        operand(5, 8, torch.float32),
        operand(5, 2, torch.float32),
        operand(2, 8, torch.float32),
    )
    before, exact = base.clone(), expected(base, h, factor, 1.0)
    out = operand(5, 8, torch.float32, "columns")  # of another layout
    assert up_projection_(base, h, factor, out=out) is out
    assert not touched(out)
    assert torch.equal(base, before)
    assert up_projection_(base, h, factor) is base
    assert torch.equal(base, out)
    assert error(base, exact) <= RELATIVE[torch.float32]


def test_one_rounding():
    """In bf16 the sum is formed in fp32: at most half a unit in the last place, plus the factors' own."""
    base, h, factor = (
        operand(64, 64, torch.bfloat16),
        operand(64, 4, torch.float32),
        operand(4, 64, torch.float32),
    )
    exact = expected(base, h, factor, 1.0)
    y = up_projection_(base.clone(), h, factor)
    assert ((y.double() - exact).abs() <= 0.5 * 2**-7 * exact.abs() + 1e-5).all()


def test_every_configuration():
    base, h, factor = (
        operand(70, 150, torch.bfloat16),
        operand(70, 9, torch.bfloat16),
        operand(9, 150, torch.float32),
    )
    for target in configs.SHARED_MEMORY:
        for tokens in (1, 10_000):
            for config in configs.up_projection(target, tokens, 16, 2):
                check(base, h, factor, config=config)


def test_offsets_beyond_32_bit():
    base, h, factor = (
        far_apart(3, 70, torch.float16),
        operand(3, 4, torch.float16),
        operand(4, 70, torch.float16),
    )
    exact = expected(base, h, factor, 1.0)
    assert error(up_projection_(base, h, factor), exact) <= RELATIVE[torch.float16]


def test_no_tokens():
    base = operand(0, 8, torch.float32, "contiguous")
    assert (
        up_projection_(base, operand(0, 2, torch.float32, "contiguous"), operand(2, 8, torch.float32)) is base
    )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"base": torch.randn(3, 4, 1)}, ValueError, r"base must have 2 dimension\(s\)"),
        ({"base": torch.randn(3, 4).double()}, TypeError, "base must be of dtype"),
        ({"h": torch.randn(4, 2)}, ValueError, "dimension 0 of base and dimension 0 of h"),
        ({"h": torch.randn(3, 3)}, ValueError, r"\(3, 3\) and \(2, 4\)"),
        ({"factor": torch.randn(2, 5)}, ValueError, "dimension 1 of base and dimension 1 of factor"),
        ({"factor": torch.randn(2, 4).to("meta")}, ValueError, "base on cpu.*factor on meta"),
        ({"out": torch.randn(4, 4)}, ValueError, "out must be the shape of base"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {"base": torch.randn(3, 4), "h": torch.randn(3, 2), "factor": torch.randn(2, 4), **change}
    before = arguments["base"].clone()
    with pytest.raises(kind, match=message):
        up_projection_(**arguments)
    assert torch.equal(arguments["base"], before)
