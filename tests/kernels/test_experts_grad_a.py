import pytest
import torch

from mica.kernels import configs
from mica.kernels.experts_grad_a import experts_grad_a, plan_experts_grad_a
from mica.kernels.limits import padded_columns
from tests.support.expert_cases import ROUTES, counts, idle, leftovers, offsets_of, route, slices
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import far_apart, layouts, operand, ranks
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


def expected(g, x, ends, rank):
    return torch.stack([g[rows, :rank].double().t() @ x[rows].double() for rows in slices(ends)])


def check(g, x, ends, rank, index=torch.int32, **options):
    """Products of 16-bit factors are exact in fp32, so fp32's tolerance holds for all of them."""
    exact = expected(g, x, ends, rank)
    grad = run_guarded(*plan_experts_grad_a(g, x, offsets_of(ends, index), rank, **options).bound())
    assert grad.dtype == torch.float32
    assert not grad[idle(ends)].any()
    assert error(grad, exact) <= RELATIVE[torch.float32]


@pytest.mark.parametrize(("g_dtype", "x_dtype"), DTYPES)
@pytest.mark.parametrize("name", ROUTES)
def test_agrees_with_fp64(g_dtype, x_dtype, name):
    (rows, ends), length, rank = ROUTES[name], 150, 20
    g, x = operand(rows, rank, g_dtype), operand(rows, length, x_dtype)
    g[ends[-1] :] = x[ends[-1] :] = float("nan")  # not read
    check(g, x, ends, rank)


@given(
    counts=counts,
    leftover=leftovers,
    length=st.integers(1, 90),
    rank=ranks,
    kinds=st.sampled_from(DTYPES),
    g=layouts,
    x=layouts,
)
def test_any_shape_and_layout(counts, leftover, length, rank, kinds, g, x):
    rows, ends = route(counts, leftover)
    check(operand(rows, rank, kinds[0], g), operand(rows, length, kinds[1], x), ends, rank, index=torch.int64)


@pytest.mark.parametrize("side", ["g", "x"])
def test_rows_of_other_experts(side):
    rows, ends = ROUTES["tiles"]
    operands = {"g": operand(rows, 5, torch.bfloat16), "x": operand(rows, 40, torch.bfloat16)}
    operands[side][slices(ends)[2]] = float("nan")
    grad = experts_grad_a(**operands, offsets=offsets_of(ends), rank=5)
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("rank", [1, 16, 20])
def test_padded_g(rank):
    rows, ends = ROUTES["first and last idle"]
    g, x = operand(rows, rank, torch.bfloat16), operand(rows, 33, torch.bfloat16)
    wide = g.new_zeros(rows, padded_columns(rank))
    wide[:, :rank] = g
    offsets = offsets_of(ends)
    assert torch.equal(experts_grad_a(wide, x, offsets, rank), experts_grad_a(g, x, offsets, rank))


def test_out_dtype():
    rows, ends = ROUTES["tiles"]
    g, x = operand(rows, 3, torch.bfloat16), operand(rows, 33, torch.bfloat16)
    exact = experts_grad_a(g, x, offsets_of(ends), 3)
    rounded = experts_grad_a(g, x, offsets_of(ends), 3, out_dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_every_configuration():
    rows, ends = ROUTES["tiles"]
    g, x = operand(rows, 9, torch.bfloat16), operand(rows, 150, torch.bfloat16)
    for config in {c for t in configs.SHARED_MEMORY for c in configs.experts_grad_a(t, 10**6, 16, 2)}:
        check(g, x, ends, 9, config=config)


def test_offsets_beyond_32_bit():
    g, x = far_apart(3, 4, torch.float16), far_apart(3, 70, torch.float16)
    check_far = experts_grad_a(g, x, offsets_of([2, 3]), 4)
    assert error(check_far, expected(g, x, [2, 3], 4)) <= RELATIVE[torch.float32]


def test_many_experts_with_few_rows():
    ends = [min(expert // 12, 15) for expert in range(200)]
    check(operand(32, 3, torch.float32), operand(32, 8, torch.float32), ends, 3)


def test_no_rows():
    empty = operand(0, 8, torch.float32, "contiguous")
    assert torch.equal(experts_grad_a(empty[:, :2], empty, offsets_of([0, 0]), 2).cpu(), torch.zeros(2, 2, 8))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"g": torch.randn(4, 2)}, ValueError, "dimension 0 of g and dimension 0 of x"),
        ({"g": torch.randn(3, 3)}, ValueError, r"g must have rank = 2 columns, or 16.*\(3, 3\)"),
        ({"rank": 0}, ValueError, "rank from 1 to 256"),
        ({"x": torch.randn(3, 4).double()}, TypeError, "x must be of dtype"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, ValueError, "offsets must be .*not empty"),
        ({"offsets": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "offsets on meta"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {"g": torch.randn(3, 2), "x": torch.randn(3, 4), "offsets": torch.tensor([1, 3]), "rank": 2}
    with pytest.raises(kind, match=message):
        experts_grad_a(**arguments | change)
