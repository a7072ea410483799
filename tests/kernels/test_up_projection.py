"""Dense, and on a stack of experts: there ``ends`` says where each expert's rows end."""

import pytest
import torch

from mica.kernels import configs
from mica.kernels.limits import padded_columns
from mica.kernels.up_projection import up_projection_
from mica.paths import torch_path
from tests.support.expert_cases import ROUTES, by_expert, idle, offsets_of, route, slices, stack
from tests.support.guarding import run_guarded, touched
from tests.support.kernel_cases import BF16, DTYPES, FP16, FP32, SHAPES, draw, far_apart, operand, seed_of
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error


def expected(base, h, factor, ends=None, bias=None, scale=1.0, dropout_p=0.0, seed=None):
    if ends is None:
        rank = min(h.shape[1], factor.shape[0])  # either may be padded
        update = scale * (h[:, :rank].double() @ factor[:rank].double())
    else:
        update = scale * by_expert(h, ends, factor)
    if dropout_p:
        update = update.where(torch_path.dropout_keep(seed, *base.shape, dropout_p), 0) / (1 - dropout_p)
    exact = base.double() + update
    for expert, rows in enumerate(slices(ends or [])):
        exact[rows] += 0 if bias is None else bias[expert].double()
    exact[ends[-1] if ends else len(base) :] = 0
    return exact


def check(base, h, factor, ends=None, bias=None, seed=None, index=torch.int32, config=None, **options):
    numbers = {key: value for key, value in options.items() if key != "compute_dtype"}
    exact = expected(base, h, factor, ends, bias, seed=seed, **numbers)
    base[ends[-1] if ends else len(base) :] = float("nan")
    offsets = ends and offsets_of(ends, index)
    y = run_guarded(*up_projection_.plan(base, h, factor, seed, None, bias, offsets, **options).bind(config))
    assert y.dtype == base.dtype
    assert not y[ends[-1] if ends else len(base) :].any()  # rows of no expert become 0
    assert error(y, exact) <= RELATIVE[base.dtype]


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(dtype, factor_dtype, compute_dtype, shape, dropout_p):
    tokens, _, width, rank = shape
    factor = operand(rank, width, factor_dtype, scale=rank**-0.5)
    options = {"scale": 0.75, "dropout_p": dropout_p, "seed": seed_of(11) if dropout_p else None}
    check(operand(tokens, width, dtype), operand(tokens, rank, compute_dtype), factor, **options)


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_agrees_with_fp64_on_experts(dtype, factor_dtype, compute_dtype, name, with_bias):
    (rows, ends), width, rank = ROUTES[name], 140, 5
    factor = stack(len(ends), rank, width, factor_dtype, "gaps", rank**-0.5)
    bias = operand(len(ends), width, dtype) if with_bias else None
    factor[idle(ends)] = float("nan")  # not read
    y, h = operand(rows, width, dtype), operand(rows, rank, compute_dtype)
    h[ends[-1] :] = float("nan")
    check(y, h, factor, ends, bias, compute_dtype=compute_dtype)


@given(
    experts=st.one_of(st.none(), draw.counts),
    leftover=draw.leftovers,
    tokens=draw.sizes,
    width=draw.sizes,
    rank=draw.ranks,
    kinds=draw.dtypes,
    y=draw.layouts,
    h=draw.layouts,
    p=draw.stacks,
    drop=draw.probabilities,
)
def test_any_shape_and_layout(experts, leftover, tokens, width, rank, kinds, y, h, p, drop):
    tokens, ends = route(experts, leftover) if experts else (tokens, None)
    factor = stack(len(ends) if ends else 1, rank, width, kinds[1], p, rank**-0.5)
    bias, factor = (operand(len(ends), width, kinds[0]), factor) if ends else (None, factor[0])
    y, h, seed = (
        operand(tokens, width, kinds[0], y),
        operand(tokens, rank, kinds[2], h),
        seed_of(width) if drop else None,
    )
    check(y, h, factor, ends, bias, seed, torch.int64, scale=0.75, dropout_p=drop)


@pytest.mark.parametrize("rank", [1, 16, 20, 33])
@pytest.mark.parametrize("ends", [None, [4, 4, 10]])
def test_padding_of_either_side_is_not_read(rank, ends):
    """A padded h with an unpadded factor, and the other way round: the shorter one decides."""
    base, h, columns = operand(15, 40, FP32), operand(15, rank, FP32), padded_columns(rank)
    factor = stack(3, rank, 40, FP32, "gaps")
    wide_h, wide_factor = h.new_zeros(15, columns), factor.new_zeros(3, columns, 40)
    wide_h[:, :rank], wide_factor[:, :rank] = h, factor
    for left, right in ((wide_h, factor), (h, wide_factor), (wide_h, wide_factor)):
        check(base, left, right if ends else right[1], ends)


def test_rows_of_other_experts():
    rows, ends = ROUTES["tiles"]
    h, factor = operand(rows, 5, BF16), stack(len(ends), 5, 70, FP32)
    h[slices(ends)[2]] = float("nan")
    y = up_projection_(operand(rows, 70, BF16), h, factor, None, None, None, offsets_of(ends))
    assert y[slices(ends)[2]].isnan().all()
    assert int(y.isnan().any(dim=1).sum()) == 1


@pytest.mark.parametrize("ends", [None, [1, 1, 5]])
def test_in_place_and_out(ends):
    base, h, factor = operand(5, 8, FP32), operand(5, 2, FP32), stack(3, 2, 8, FP32)
    factor, offsets = factor if ends else factor[0], ends and offsets_of(ends)
    before, exact = base.clone(), expected(base, h, factor, ends)
    out = operand(5, 8, FP32, "columns")  # of another layout
    assert up_projection_(base, h, factor, None, out, None, offsets) is out
    assert not touched(out)
    assert torch.equal(base, before)
    assert up_projection_(base, h, factor, None, None, None, offsets) is base
    assert torch.equal(base, out)
    assert error(base, exact) <= RELATIVE[FP32]


@pytest.mark.parametrize("ends", [None, [64]])
def test_one_rounding(ends):
    """In bf16 base, bias and product are summed in fp32: at most half a unit in the last place."""
    base, h, factor = operand(64, 64, BF16), operand(64, 4, FP32), stack(1, 4, 64, FP32)
    bias, factor = (operand(1, 64, BF16), factor) if ends else (None, factor[0])
    exact = expected(base, h, factor, ends, bias)
    up_projection_(base, h, factor, None, None, bias, ends and offsets_of(ends))
    assert ((base.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_every_configuration():
    (rows, ends), factor = ROUTES["tiles"], stack(4, 9, 150, FP32, scale=0.3)
    base, h = operand(rows, 150, BF16), operand(rows, 9, BF16)
    for target in configs.SHARED_MEMORY:
        for config in {*configs.up_projection(target, 1, 16, 2), *configs.experts_up(target, 1, 16, 2)}:
            check(base[:70], h[:70], factor[0], config=config)
            check(base.nan_to_num_(), h, factor, ends, config=config)


def test_offsets_beyond_32_bit():
    """Of the rows of base and h, and of the third expert's factor and bias."""
    y, ends = far_apart(3, 70, FP16), [1, 2, 3]
    far = far_apart(3, 4 * 70, FP16).unflatten(1, (4, 70))
    for base, h, factor, bias in (
        (y, operand(3, 4, FP16), operand(4, 70, FP16), None),
        (y, operand(3, 4, FP16), stack(3, 4, 70, FP16), y.contiguous()),
        (y.contiguous(), far_apart(3, 4, FP16), far, y),
    ):
        of_experts = None if bias is None else ends
        exact = expected(base, h, factor, of_experts, bias)
        actual = up_projection_(base, h, factor, None, None, bias, of_experts and offsets_of(ends))
        assert error(actual, exact) <= RELATIVE[FP16]


def test_many_experts_with_few_rows():
    ends = [min(expert // 12, 15) for expert in range(200)]
    check(operand(32, 40, FP32), operand(32, 3, FP32), stack(200, 3, 40, FP32), ends)


@pytest.mark.parametrize("ends", [None, [0, 0]])
def test_no_rows(ends):
    base, factor = operand(0, 8, FP32, "contiguous"), stack(2, 2, 8, FP32)
    h, factor = base[:, :2], factor if ends else factor[0]
    assert up_projection_(base, h, factor, None, None, None, ends and offsets_of(ends)) is base
