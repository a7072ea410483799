"""Dense, and on a stack of experts: there ``ends`` says where each expert's rows end."""

import pytest
import torch

from mica.kernels import configs
from mica.kernels.grad_a import grad_a
from mica.kernels.limits import padded_columns
from mica.paths import torch_path
from tests.support.expert_cases import ROUTES, idle, offsets_of, route, slices
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import BF16, FP16, FP32, SHAPES, draw, far_apart, operand, seed_of
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error

DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)]


def expected(g, x, rank, ends=None, dropout_p=0.0, seed=None):
    g, x = g[:, :rank].double(), x.double()
    if dropout_p:
        x = x.where(torch_path.dropout_keep(seed, *x.shape, dropout_p), 0) / (1 - dropout_p)
    return torch.stack([g[rows].t() @ x[rows] for rows in slices(ends)]) if ends else g.t() @ x


def check(g, x, rank, ends=None, seed=None, index=torch.int32, config=None, **options):
    """Products of 16-bit factors are exact in fp32, so fp32's tolerance holds for all of them."""
    exact = expected(g, x, rank, ends, seed=seed, **options)
    call = grad_a.plan(g, x, seed, ends and offsets_of(ends, index), rank=rank, **options)
    grad = run_guarded(*call.bind(config))
    assert grad.dtype == FP32
    assert not grad[idle(ends or [])].any()
    assert error(grad, exact) <= RELATIVE[FP32]


@pytest.mark.parametrize(("g_dtype", "x_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_agrees_with_fp64(g_dtype, x_dtype, shape, dropout_p):
    tokens, length, _, rank = shape
    g, x, seed = operand(tokens, rank, g_dtype), operand(tokens, length, x_dtype), seed_of(2)
    check(g, x, rank, seed=seed if dropout_p else None, dropout_p=dropout_p)


@pytest.mark.parametrize(("g_dtype", "x_dtype"), DTYPES)
@pytest.mark.parametrize("name", ROUTES)
def test_agrees_with_fp64_on_experts(g_dtype, x_dtype, name):
    (rows, ends), length, rank = ROUTES[name], 150, 20
    g, x = operand(rows, rank, g_dtype), operand(rows, length, x_dtype)
    g[ends[-1] :] = x[ends[-1] :] = float("nan")  # not read
    check(g, x, rank, ends)


@given(
    experts=st.one_of(st.none(), draw.counts),
    leftover=draw.leftovers,
    tokens=st.integers(1, 300),
    length=draw.sizes,
    rank=draw.ranks,
    kinds=st.sampled_from(DTYPES),
    g=draw.layouts,
    x=draw.layouts,
    drop=draw.probabilities,
)
def test_any_shape_and_layout(experts, leftover, tokens, length, rank, kinds, g, x, drop):
    tokens, ends = route(experts, leftover) if experts else (tokens, None)
    g, x, seed = operand(tokens, rank, kinds[0], g), operand(tokens, length, kinds[1], x), seed_of(tokens)
    check(g, x, rank, ends, seed if drop else None, torch.int64, dropout_p=drop)


@pytest.mark.parametrize(("g_dtype", "x_dtype"), DTYPES)
@pytest.mark.parametrize("tokens", [600, 1025])
def test_splits_are_summed_in_order(g_dtype, x_dtype, tokens):
    """More than one split, the last of them shorter; the rows of the mask count from the first token."""
    g, x = operand(tokens, 6, g_dtype), operand(tokens, 40, x_dtype)
    assert grad_a.plan(g, x, rank=6).bind()[1].args["num_splits"] > 1
    check(g, x, 6)
    check(g, x, 6, seed=seed_of(9), dropout_p=0.3)
    assert torch.equal(grad_a(g, x, rank=6), grad_a(g, x, rank=6))


@pytest.mark.parametrize("side", [0, 1])
def test_rows_of_other_experts(side):
    rows, ends = ROUTES["tiles"]
    operands = operand(rows, 5, BF16), operand(rows, 40, BF16)
    operands[side][slices(ends)[2]] = float("nan")
    grad = grad_a(*operands, None, offsets_of(ends), rank=5)
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("ends", [None, [0, 3, 3, 50]])
@pytest.mark.parametrize("rank", [1, 16, 20])
def test_padded_g_and_dtype_of_the_result(rank, ends):
    g, x, offsets = operand(50, rank, BF16), operand(50, 33, BF16), ends and offsets_of(ends)
    wide = g.new_zeros(50, padded_columns(rank))
    wide[:, :rank] = g
    exact = grad_a(g, x, None, offsets, rank=rank)
    assert torch.equal(grad_a(wide, x, None, offsets, rank=rank), exact)
    assert torch.equal(grad_a(g, x, None, offsets, rank=rank, out_dtype=BF16), exact.bfloat16())


def test_every_configuration():
    (rows, ends), g, x = ROUTES["tiles"], operand(261, 9, BF16), operand(261, 200, BF16)
    for config in {c for t in configs.SHARED_MEMORY for c in configs.grad_a(t, 10_000, 16, 2)}:
        check(g[:150], x[:150], 9, config=config)
        check(g[:rows], x[:rows], 9, ends, config=config)


@pytest.mark.parametrize("ends", [None, [2, 3]])
def test_offsets_beyond_32_bit(ends):
    g, x = far_apart(3, 4, FP16), far_apart(3, 70, FP16)
    grad = grad_a(g, x, None, ends and offsets_of(ends), rank=4)
    assert error(grad, expected(g, x, 4, ends)) <= RELATIVE[FP32]


def test_many_experts_with_few_rows():
    ends = [min(expert // 12, 15) for expert in range(200)]
    check(operand(32, 3, FP32), operand(32, 8, FP32), 3, ends)


@pytest.mark.parametrize("ends", [None, [0, 0]])
def test_no_rows(ends):
    empty = operand(0, 8, FP32, "contiguous")
    grad = grad_a(empty[:, :2], empty, None, ends and offsets_of(ends), rank=2).cpu()
    assert torch.equal(grad, torch.zeros(2, 2, 8) if ends else torch.zeros(2, 8))
