"""Dense, and on a stack of experts: there ``ends`` says where each expert's rows end."""

import pytest
import torch

from mica.kernels import configs
from mica.kernels.down_projection import down_projection
from mica.kernels.limits import padded_columns
from mica.paths import torch_path
from tests.support.expert_cases import ROUTES, by_expert, idle, offsets_of, route, slices, stack
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import BF16, DTYPES, FP16, FP32, SHAPES, draw, far_apart, operand, seed_of
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error


def planned(x, factor, ends=None, seed=None, index=torch.int32, **options):
    return down_projection.plan(x, factor, seed, ends and offsets_of(ends, index), **options)


def exact(x, factor, ends, scale=1.0, dropout_p=0.0, seed=None):
    x = x.double()
    if dropout_p:
        x = x.where(torch_path.dropout_keep(seed, *x.shape, dropout_p), 0) / (1 - dropout_p)
    return scale * (by_expert(x, ends, factor.transpose(1, 2)) if ends else x @ factor.double().t())


def check(x, factor, dtype, ends=None, index=torch.int32, config=None, **options):
    options = {"scale": 0.75, **options}
    h = run_guarded(*planned(x, factor, ends, index=index, compute_dtype=dtype, **options).bind(config))
    rank, used = factor.shape[-2], ends[-1] if ends else len(x)
    assert (h.dtype, h.shape) == (dtype, (len(x), padded_columns(rank)))
    assert not h[:used, rank:].any()
    assert h[used:].isnan().all()  # rows of no expert are not written
    assert error(h[:used, :rank], exact(x, factor, ends, **options)[:used]) <= RELATIVE[dtype]


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(dtype, factor_dtype, compute_dtype, shape, dropout_p):
    tokens, length, _, rank = shape
    factor, seed = operand(rank, length, factor_dtype, scale=length**-0.5), seed_of(-5) if dropout_p else None
    check(operand(tokens, length, dtype), factor, compute_dtype, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("name", ROUTES)
def test_agrees_with_fp64_on_experts(dtype, factor_dtype, compute_dtype, name):
    (rows, ends), length, rank = ROUTES[name], 150, 20
    factor = stack(len(ends), rank, length, factor_dtype, "gaps", length**-0.5)
    factor[idle(ends)] = float("nan")  # not read
    check(operand(rows, length, dtype), factor, compute_dtype, ends)


@given(
    experts=st.one_of(st.none(), draw.counts),
    leftover=draw.leftovers,
    tokens=draw.sizes,
    length=st.integers(1, 400),
    rank=draw.ranks,
    kinds=draw.dtypes,
    x=draw.layouts,
    p=draw.stacks,
    drop=draw.probabilities,
)
def test_any_shape_and_layout(experts, leftover, tokens, length, rank, kinds, x, p, drop):
    tokens, ends = route(experts, leftover) if experts else (tokens, None)
    factor = stack(len(ends) if ends else 1, rank, length, kinds[1], p, length**-0.5)
    x, factor = operand(tokens, length, kinds[0], x), factor if ends else factor[0]
    seed = seed_of(length) if drop else None
    check(x, factor, kinds[2], ends, torch.int64, dropout_p=drop, seed=seed)


@pytest.mark.parametrize("length", [64, 150])
def test_rows_of_others(length):
    """One row too many is outside the mapped memory, or NaN of another expert's, and stays there."""
    x, dense = far_apart(3, length, BF16), operand(5, length, FP32, scale=length**-0.5)
    for factor, ends in ((dense, None), (stack(2, 5, length, FP32, scale=length**-0.5), [2, 3])):
        h, launch = planned(x, factor, ends).bind()
        launch()
        assert error(h[:, :5], exact(x, factor, ends)) <= RELATIVE[BF16]
    rows, ends = ROUTES["tiles"]
    for expert in (0, 2):
        others = operand(rows, length, BF16)
        others[mine := slices(ends)[expert]] = float("nan")
        h = run_guarded(*planned(others, stack(len(ends), 5, length, FP32), ends).bind())
        is_nan = h[: ends[-1], :5].isnan()
        assert is_nan[mine].all()
        assert is_nan.sum() == is_nan[mine].sum()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("length", [1024, 1500, 2049])
def test_splits_are_summed_in_order(dtype, length):
    """More than one split, the last of them shorter; a rerun has the same bits."""
    rows, ends = ROUTES["first and last idle"]
    dense, stacked = operand(6, length, FP32, scale=length**-0.5), stack(len(ends), 6, length, FP32)
    for tokens, factor, of_experts in ((40, dense, None), (rows, stacked, ends)):
        x = operand(tokens, length, dtype)
        _, launch = planned(x, factor, of_experts).bind()
        assert launch.args["num_splits"] == launch.grid[1] > 1
        for p, seed in ((0.0, None), (0.2, seed_of(3))):
            check(x, factor, dtype, of_experts, dropout_p=p, seed=seed)
        offsets = of_experts and offsets_of(of_experts)
        assert torch.equal(*(down_projection(x, factor, None, offsets) for _ in range(2)))


def test_every_configuration():
    (rows, ends), x, factor = ROUTES["tiles"], operand(150, 200, BF16), operand(9, 200, FP32, scale=0.07)
    for config in {
        c for t in configs.SHARED_MEMORY for n in (1, 10_000) for c in configs.down_projection(t, n, 16, 2)
    }:
        check(x, factor, BF16, config=config)
        stacked = stack(len(ends), 9, 130, FP32, scale=0.07)
        check(operand(rows, 130, BF16), stacked, BF16, ends, config=config)


def test_offsets_beyond_32_bit():
    """Of the rows and columns of x, and of the third expert."""
    far, near, ends = far_apart(3, 70, FP16), operand(4, 70, FP32), [1, 2, 3]
    third = far_apart(3, 4 * 70, FP16).unflatten(1, (4, 70))
    columns = far.t().contiguous().t()
    for x, factor in ((far, near), (columns, near), (far, stack(3, 4, 70, FP32)), (far.contiguous(), third)):
        of_experts = ends if factor.dim() == 3 else None
        h = down_projection(x, factor, None, of_experts and offsets_of(of_experts))
        assert error(h[:, :4], exact(x, factor, of_experts)) <= RELATIVE[FP16]


def test_many_experts_with_few_rows():
    ends = [min(expert // 12, 30) for expert in range(512)]
    check(operand(30, 40, FP32), stack(512, 3, 40, FP32), FP32, ends)


@pytest.mark.parametrize("ends", [None, [0, 0]])
def test_no_rows(ends):
    factor = stack(2, 2, 8, FP32)
    x, factor = operand(0, 8, FP32, "contiguous"), factor if ends else factor[0]
    assert down_projection(x, factor, None, ends and offsets_of(ends)).shape == (0, 16)
