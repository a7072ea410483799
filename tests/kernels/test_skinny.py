"""The kernels of the three skinny products: h = x Pᵀ (down), y += h P (up) and dA = gᵀ x (grad).

Each is for a dense layer or for one of experts. ``ends``: where the rows of each expert end, or None; later
rows belong to no expert. ``factor``: P, or one for each expert.
"""

import itertools

import pytest
import torch

from mica.kernels import configs
from mica.kernels.down_projection import down_projection
from mica.kernels.grad_a import grad_a
from mica.kernels.limits import padded_columns
from mica.kernels.up_projection import up_projection_
from tests.support.expert_cases import (
    EVERY_ROUTE,
    ROUTES,
    exact_down,
    exact_grad,
    exact_up,
    idle,
    offsets_of,
    route,
    slices,
    stack,
)
from tests.support.guarding import run_guarded, touched
from tests.support.kernel_cases import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    SHAPES,
    TARGETS,
    draw,
    far_apart,
    operand,
    seed_of,
)
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error


def check_down(x, factor, dtype, ends=None, index=torch.int32, config=None, seed=None, **options):
    options, offsets = {"scale": 0.75, **options}, ends and offsets_of(ends, index)
    call = down_projection.plan(x, factor, seed, offsets, compute_dtype=dtype, **options)
    h = run_guarded(*call.bind(config))
    rank, used = factor.shape[-2], ends[-1] if ends else len(x)
    assert (h.dtype, h.shape) == (dtype, (len(x), padded_columns(rank)))
    assert not h[:used, rank:].any()
    assert h[used:].isnan().all()  # rows of no expert are not written
    expected = exact_down(x, factor, ends, seed=seed, **options)
    assert error(h[:used, :rank], expected[:used]) <= RELATIVE[dtype]


def check_up(base, h, factor, ends=None, bias=None, seed=None, index=torch.int32, config=None, **options):
    numbers = {key: value for key, value in options.items() if key != "compute_dtype"}
    expected = exact_up(base, h, factor, ends, bias, seed=seed, **numbers)
    base[ends[-1] if ends else len(base) :] = float("nan")
    offsets = ends and offsets_of(ends, index)
    y = run_guarded(*up_projection_.plan(base, h, factor, seed, None, bias, offsets, **options).bind(config))
    assert y.dtype == base.dtype
    assert not y[ends[-1] if ends else len(base) :].any()  # rows of no expert become 0
    assert error(y, expected) <= RELATIVE[base.dtype]


def check_grad(g, x, rank, ends=None, seed=None, index=torch.int32, config=None, **options):
    """With either factor first, whatever the plan decides.

    Products of 16-bit factors are exact in fp32, so fp32's tolerance holds for all of them.
    """
    expected = exact_grad(g, x, rank, ends, seed=seed, **options)
    call = grad_a.plan(g, x, seed, ends and offsets_of(ends, index), rank=rank, **options)
    for x_first in (False, True):
        out, launch = call.bind(config)
        launch.meta = launch.meta | {"X_FIRST": x_first}
        grad = run_guarded(out, launch)
        assert grad.dtype == FP32
        assert not grad[idle(ends or [])].any()
        assert error(grad, expected) <= RELATIVE[FP32]


# layout of a stack of factors -> the most similar one of the matrix h or g, see `stack` and `operand`
LAYOUT_LIKE = {"contiguous": "contiguous", "gaps": "rows", "peft": "columns"}


def factor_of(ends, rank, width, dtype, layout="gaps", scale=1.0):
    """(rank, width), or one for each expert; of experts without rows NaN, which is not read."""
    factor = stack(len(ends) if ends else 1, rank, width, dtype, layout, scale)
    factor[idle(ends or [])] = float("nan")
    return factor if ends else factor[0]


# The checks above on random operands of a layer: so many tokens, ``length`` in_features and ``width``
# out_features; ``dtypes``: of x and y, of the factor, and of h and g.


def down(tokens, ends, length, width, rank, dtypes, layout="rows", factor_layout="gaps", **options):
    dtype, factor_dtype, compute_dtype = dtypes
    factor = factor_of(ends, rank, length, factor_dtype, factor_layout, length**-0.5)
    check_down(operand(tokens, length, dtype, layout), factor, compute_dtype, ends, **options)


def up(tokens, ends, length, width, rank, dtypes, layout="rows", factor_layout="gaps", **options):
    dtype, factor_dtype, compute_dtype = dtypes
    factor = factor_of(ends, rank, width, factor_dtype, factor_layout, rank**-0.5)
    bias = operand(len(ends), width, dtype) if ends else None
    y = operand(tokens, width, dtype, layout)
    h = operand(tokens, rank, compute_dtype, LAYOUT_LIKE[factor_layout])
    h[ends[-1] if ends else tokens :] = float("nan")  # not read
    check_up(y, h, factor, ends, bias, scale=0.75, **options)


def grad(tokens, ends, length, width, rank, dtypes, layout="rows", factor_layout="gaps", **options):
    dtype, _, compute_dtype = dtypes
    g = operand(tokens, rank, compute_dtype, LAYOUT_LIKE[factor_layout])
    x = operand(tokens, length, dtype, layout)
    used = ends[-1] if ends else tokens
    g[used:] = x[used:] = float("nan")  # not read
    check_grad(g, x, rank, ends, **options)


of_each_kernel = pytest.mark.parametrize("check", [down, up, grad])
far_apart_in_memory = pytest.mark.usefixtures("large_memory")
in_each_dtype = pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)


def dropout(p, seed):
    return {"dropout_p": p, "seed": seed_of(seed)} if p else {}


@in_each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@of_each_kernel
def test_agrees_with_fp64(check, dtype, factor_dtype, compute_dtype, shape, dropout_p):
    tokens, *sizes = shape
    check(tokens, None, *sizes, (dtype, factor_dtype, compute_dtype), **dropout(dropout_p, -5))


@in_each_dtype
@pytest.mark.parametrize("name", EVERY_ROUTE)
@of_each_kernel
def test_agrees_with_fp64_on_experts(check, dtype, factor_dtype, compute_dtype, name):
    check(*EVERY_ROUTE[name], 150, 140, 20, (dtype, factor_dtype, compute_dtype))


@given(
    rows_of_experts=st.one_of(st.none(), draw.counts),
    leftover=draw.leftovers,
    tokens=draw.sizes,
    length=st.integers(1, 260),
    width=draw.sizes,
    rank=draw.ranks,
    dtypes=draw.dtypes,
    layout=draw.layouts,
    factor_layout=draw.stacks,
    dropout_p=draw.probabilities,
)
@of_each_kernel
def test_any_shape_and_layout(
    check, rows_of_experts, leftover, tokens, length, width, rank, dtypes, layout, factor_layout, dropout_p
):
    tokens, ends = route(rows_of_experts, leftover) if rows_of_experts else (tokens, None)
    options = {"index": torch.int64, **dropout(dropout_p, tokens)}
    check(tokens, ends, length, width, rank, dtypes, layout, factor_layout, **options)


# kernel -> its configurations for dense layers, and for experts
TABLES = {
    down: (configs.down_projection, configs.experts_down),
    up: (configs.up_projection, configs.experts_up),
    grad: (configs.grad_a, configs.experts_grad_a),
}


@of_each_kernel
def test_every_configuration(check):
    """For few and for many tokens, at rank 9, which is padded to 16, in 16 bits."""
    sizes = itertools.product(TABLES[check], TARGETS, (1, 10_000))
    found = {config for table, target, size in sizes for config in table(target, size, 16, 2)}
    for config in found:
        check(150, None, 200, 150, 9, (BF16, FP32, BF16), config=config)
        check(*ROUTES["tiles"], 130, 150, 9, (BF16, FP32, BF16), config=config)


@of_each_kernel
def test_many_experts_with_few_rows(check):
    """Fifteen of 96 have a row each; the other 17 rows belong to none."""
    check(32, [min(expert // 6, 15) for expert in range(96)], 40, 40, 3, (FP32, FP32, FP32))


@far_apart_in_memory
@pytest.mark.parametrize("length", [64, 150])
def test_down_reads_no_row_after_the_last(length):
    """It would lie outside the mapped memory: reading it would end the process."""
    x, dense = far_apart(3, length, BF16), operand(5, length, FP32, scale=length**-0.5)
    for factor, ends in ((dense, None), (stack(2, 5, length, FP32, scale=length**-0.5), [2, 3])):
        h = down_projection(x, factor, None, ends and offsets_of(ends))
        assert error(h[:, :5], exact_down(x, factor, ends)) <= RELATIVE[BF16]


@pytest.mark.parametrize("expert", [0, 2])
def test_nan_of_an_expert_stays_with_it_in_down_up_and_grad(expert):
    rows, ends = ROUTES["tiles"]
    own, offsets, factor = slices(ends)[expert], offsets_of(ends), stack(len(ends), 5, 150, FP32)
    x, h = operand(rows, 150, BF16), operand(rows, 5, BF16)
    nan_x, nan_h = x.clone(), h.clone()
    nan_x[own] = nan_h[own] = float("nan")
    of_down = down_projection(nan_x, factor, None, offsets)[: ends[-1], :5]
    of_up = up_projection_(operand(rows, 150, BF16), nan_h, factor, None, None, None, offsets)
    of_grad = [grad_a(*pair, None, offsets, rank=5) for pair in ((nan_h, x), (h, nan_x))]
    places = [(of_down, own), (of_up, own), *((grad, expert) for grad in of_grad)]
    for result, place in places:
        is_nan = result.isnan()
        assert is_nan[place].all()
        assert is_nan.sum() == is_nan[place].sum()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("length", [1024, 1500])
def test_down_splits_are_summed_in_order(dtype, length):
    """More than one split, the last of them shorter; a rerun has the same bits."""
    rows, ends = ROUTES["first and last idle"]
    dense, stacked = operand(6, length, FP32, scale=length**-0.5), stack(len(ends), 6, length, FP32)
    for tokens, factor, of_experts, rates in ((40, dense, None, (0.0, 0.2)), (rows, stacked, ends, (0.0,))):
        x, offsets = operand(tokens, length, dtype), of_experts and offsets_of(of_experts)
        _, launch = down_projection.plan(x, factor, None, offsets).bind()
        assert launch.args["num_splits"] == launch.grid[1] > 1
        for p in rates:
            check_down(x, factor, dtype, of_experts, **dropout(p, 3))
        assert torch.equal(*(down_projection(x, factor, None, offsets) for _ in range(2)))


@far_apart_in_memory
def test_down_offsets_beyond_32_bit():
    """Distances from row to row of x, from column to column, and to the third expert's factor."""
    far, near, ends = far_apart(3, 70, FP16), operand(4, 70, FP32), [1, 2, 3]
    third = far_apart(3, 4 * 70, FP16).unflatten(1, (4, 70))
    columns = far.t().contiguous().t()
    for x, factor in ((far, near), (columns, near), (far, stack(3, 4, 70, FP32)), (far.contiguous(), third)):
        of_experts = ends if factor.dim() == 3 else None
        h = down_projection(x, factor, None, of_experts and offsets_of(of_experts))
        assert error(h[:, :4], exact_down(x, factor, of_experts)) <= RELATIVE[FP16]


@pytest.mark.parametrize("rank", [1, 16, 20, 33])
@pytest.mark.parametrize("ends", [None, [4, 4, 10]])
def test_up_padding_of_either_side_is_not_read(rank, ends):
    """A padded h with an unpadded factor, and the other way round: the shorter one decides."""
    base, h, columns = operand(15, 40, FP32), operand(15, rank, FP32), padded_columns(rank)
    factor = stack(3, rank, 40, FP32, "gaps")
    wide_h, wide_factor = h.new_zeros(15, columns), factor.new_zeros(3, columns, 40)
    wide_h[:, :rank], wide_factor[:, :rank] = h, factor
    for left, right in ((wide_h, factor), (h, wide_factor), (wide_h, wide_factor)):
        check_up(base, left, right if ends else right[1], ends)


@pytest.mark.parametrize("ends", [None, [1, 1, 5]])
def test_up_in_place_and_out(ends):
    base, h, factor = operand(5, 8, FP32), operand(5, 2, FP32), stack(3, 2, 8, FP32)
    factor, offsets = factor if ends else factor[0], ends and offsets_of(ends)
    before, expected = base.clone(), exact_up(base, h, factor, ends)
    out = operand(5, 8, FP32, "columns")  # of another layout
    assert up_projection_(base, h, factor, None, out, None, offsets) is out
    assert not touched(out)
    assert torch.equal(base, before)
    assert up_projection_(base, h, factor, None, None, None, offsets) is base
    assert torch.equal(base, out)
    assert error(base, expected) <= RELATIVE[FP32]


@pytest.mark.parametrize("ends", [None, [64]])
def test_up_has_one_rounding(ends):
    """In bf16 base, bias and product are summed in fp32: at most half a unit in the last place."""
    base, h, factor = operand(64, 64, BF16), operand(64, 4, FP32), stack(1, 4, 64, FP32)
    bias, factor = (operand(1, 64, BF16), factor) if ends else (None, factor[0])
    expected = exact_up(base, h, factor, ends, bias)
    up_projection_(base, h, factor, None, None, bias, ends and offsets_of(ends))
    assert ((base.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all()


@far_apart_in_memory
def test_up_offsets_beyond_32_bit():
    """Distances from row to row of base and of h, and to the third expert's factor and bias."""
    y, ends = far_apart(3, 70, FP16), [1, 2, 3]
    far = far_apart(3, 4 * 70, FP16).unflatten(1, (4, 70))
    for base, h, factor, bias in (
        (y, operand(3, 4, FP16), operand(4, 70, FP16), None),
        (y, operand(3, 4, FP16), stack(3, 4, 70, FP16), y.contiguous()),
        (y.contiguous(), far_apart(3, 4, FP16), far, y),
    ):
        of_experts = None if bias is None else ends
        expected = exact_up(base, h, factor, of_experts, bias)
        actual = up_projection_(base, h, factor, None, None, bias, of_experts and offsets_of(ends))
        assert error(actual, expected) <= RELATIVE[FP16]


@pytest.mark.parametrize(("g_dtype", "x_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)])
@pytest.mark.parametrize("tokens", [600, 1025])
def test_grad_splits_are_summed_in_order(g_dtype, x_dtype, tokens):
    """More than one split, the last of them shorter; rows of the dropout mask count from the first token."""
    g, x = operand(tokens, 6, g_dtype), operand(tokens, 40, x_dtype)
    assert grad_a.plan(g, x, rank=6).bind()[1].args["num_splits"] > 1
    check_grad(g, x, 6)
    check_grad(g, x, 6, **dropout(0.3, 9))
    assert torch.equal(grad_a(g, x, rank=6), grad_a(g, x, rank=6))


@pytest.mark.parametrize("experts", [0, 130])
def test_grad_plans_x_first_by_the_operands(experts):
    """x comes first if its rows start and end at multiples of 16 numbers, see `configs.is_x_first`.

    For 130 experts too, whose 272 columns together are enough for wide tiles.
    """
    ends = offsets_of([600 * (expert + 1) // experts for expert in range(experts)]) if experts else None

    def planned(dropout_p=0.0, dtype=BF16, width=272, columns=272, step=1):
        x = operand(600, width, BF16, "contiguous")[:, :columns:step]
        seed = seed_of(1) if dropout_p else None
        options = {"rank": 20, "target": "sm_90", "dropout_p": dropout_p}
        return grad_a.plan(operand(600, 20, dtype), x, seed, ends, **options).bind()[1].meta["X_FIRST"]

    assert planned()
    assert not planned(dropout_p=0.1)
    assert not planned(dtype=FP32)  # the product is in fp32
    assert not planned(width=280)  # where rows start
    assert not planned(columns=264)  # where they end
    assert not planned(width=16 * 272, columns=16 * 272, step=16)  # neighbours in a row lie apart


@pytest.mark.parametrize("ends", [None, [0, 3, 3, 50]])
@pytest.mark.parametrize("rank", [1, 16, 20])
def test_grad_of_padded_g_and_in_another_dtype(rank, ends):
    g, x, offsets = operand(50, rank, BF16), operand(50, 33, BF16), ends and offsets_of(ends)
    wide = g.new_zeros(50, padded_columns(rank))
    wide[:, :rank] = g
    plain = grad_a(g, x, None, offsets, rank=rank)
    assert torch.equal(grad_a(wide, x, None, offsets, rank=rank), plain)
    assert torch.equal(grad_a(g, x, None, offsets, rank=rank, out_dtype=BF16), plain.bfloat16())


@far_apart_in_memory
@pytest.mark.parametrize("ends", [None, [2, 3]])
def test_grad_offsets_beyond_32_bit(ends):
    g, x = far_apart(3, 4, FP16), far_apart(3, 70, FP16)
    grad = grad_a(g, x, None, ends and offsets_of(ends), rank=4)
    assert error(grad, exact_grad(g, x, 4, ends)) <= RELATIVE[FP32]
