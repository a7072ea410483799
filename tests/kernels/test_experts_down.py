import pytest
import torch

from mica.kernels import configs
from mica.kernels.experts_down import experts_down, plan_experts_down
from mica.kernels.limits import padded_columns
from tests.support.expert_cases import (
    ROUTES,
    by_expert,
    counts,
    idle,
    leftovers,
    offsets_of,
    route,
    slices,
    stack,
)
from tests.support.guarding import run_guarded
from tests.support.kernel_cases import DTYPES, dtypes, far_apart, layouts, operand, ranks
from tests.support.properties import given, st
from tests.support.tolerances import RELATIVE, error

STACKS = ["contiguous", "gaps", "peft"]


def check(x, ends, factor, dtype, scale=0.75, index=torch.int32, **options):
    options |= {"scale": scale, "compute_dtype": dtype}
    h = run_guarded(*plan_experts_down(x, offsets_of(ends, index), factor, **options).bound())
    rank, used = factor.shape[1], ends[-1]
    assert h.dtype == dtype
    assert h.shape == (x.shape[0], padded_columns(rank))
    assert not h[:used, rank:].any()
    assert h[used:].isnan().all()  # not written: no factor is read for these rows
    exact = scale * by_expert(x, ends, factor.transpose(1, 2))
    assert error(h[:used, :rank], exact[:used]) <= RELATIVE[dtype]


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("name", ROUTES)
def test_agrees_with_fp64(dtype, factor_dtype, compute_dtype, name):
    (rows, ends), length, rank = ROUTES[name], 150, 20
    factor = stack(len(ends), rank, length, factor_dtype, "gaps", length**-0.5)
    factor[idle(ends)] = float("nan")  # not read
    check(operand(rows, length, dtype), ends, factor, compute_dtype)


@given(
    counts=counts,
    leftover=leftovers,
    length=st.integers(1, 300),
    rank=ranks,
    kinds=dtypes,
    x=layouts,
    p=st.sampled_from(STACKS),
)
def test_any_shape_and_layout(counts, leftover, length, rank, kinds, x, p):
    rows, ends = route(counts, leftover)
    factor = stack(len(ends), rank, length, kinds[1], p, length**-0.5)
    check(operand(rows, length, kinds[0], x), ends, factor, kinds[2], index=torch.int64)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("length", [64, 150])
def test_rows_of_other_experts(target, length):
    """Masked on AMD, clamped elsewhere: NaN in the rows before and after an expert's stays there."""
    rows, ends = ROUTES["tiles"]
    x, factor = operand(rows, length, torch.bfloat16), stack(len(ends), 5, length, torch.float32)
    for expert in (0, 2):
        others = x.clone()
        others[slices(ends)[expert]] = float("nan")
        _, launch = plan_experts_down(others, offsets_of(ends), factor, target=target).bound()
        h = run_guarded(_, launch)[: ends[-1]]
        mine = torch.zeros(ends[-1], dtype=torch.bool, device=h.device)
        mine[slices(ends)[expert]] = True
        assert h[mine][:, :5].isnan().all()
        assert h[~mine].isfinite().all()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("length", [64, 150])
def test_rows_beyond_the_last(target, length):
    """Far apart, so that one row too many is outside the mapped memory."""
    x, factor = far_apart(3, length, torch.bfloat16), stack(2, 5, length, torch.float32, scale=length**-0.5)
    h, launch = plan_experts_down(x, offsets_of([2, 3]), factor, target=target).bound()
    launch()
    assert error(h[:, :5], by_expert(x, [2, 3], factor.transpose(1, 2))) <= RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("length", [1024, 1500])
def test_splits_are_summed_in_order(target, length):
    """More than one split, the last of them shorter; a rerun has the same bits."""
    (rows, ends), rank = ROUTES["first and last idle"], 6
    x, factor = operand(rows, length, torch.bfloat16), stack(len(ends), rank, length, torch.float32)
    _, launch = plan_experts_down(x, offsets_of(ends), factor, target=target).bound()
    assert launch.meta["SPLIT"]
    assert (launch.then is None) == (target == "sm_90")
    check(x, ends, factor, torch.bfloat16, target=target)
    first, second = (experts_down(x, offsets_of(ends), factor) for _ in range(2))
    assert torch.equal(first, second)


def test_every_configuration():
    rows, ends = ROUTES["tiles"]
    x, factor = operand(rows, 130, torch.bfloat16), stack(len(ends), 9, 130, torch.float32, scale=0.07)
    for config in {c for t in configs.SHARED_MEMORY for c in configs.experts_down(t, 1, 16, 2)}:
        check(x, ends, factor, torch.bfloat16, config=config)


def test_offsets_beyond_32_bit():
    """Of the rows of x, and of the third expert."""
    x, ends = far_apart(3, 70, torch.float16), [1, 2, 3]
    check_far(x, ends, stack(3, 4, 70, torch.float32, scale=0.1))
    check_far(x.contiguous(), ends, far_apart(3, 4 * 70, torch.float16).unflatten(1, (4, 70)))


def check_far(x, ends, factor):
    h = experts_down(x, offsets_of(ends), factor)
    assert error(h[:, :4], by_expert(x, ends, factor.transpose(1, 2))) <= RELATIVE[torch.float16]


def test_many_experts_with_few_rows():
    ends = [min(expert // 12, 30) for expert in range(512)]
    check(operand(30, 40, torch.float32), ends, stack(512, 3, 40, torch.float32), torch.float32)


def test_no_rows():
    empty = operand(0, 8, torch.float32, "contiguous")
    assert experts_down(empty, offsets_of([0, 0]), stack(2, 2, 8, torch.float32)).shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.randn(3)}, ValueError, r"x must have 2 dimension\(s\)"),
        ({"x": torch.randn(3, 5)}, ValueError, "dimension 1 of x and dimension 2 of factor must be equal"),
        ({"factor": torch.randn(2, 4)}, ValueError, r"factor must have 3 dimension\(s\)"),
        ({"factor": torch.randn(2, 257, 4)}, ValueError, "rank from 1 to 256.*is 257"),
        ({"factor": torch.randn(3, 2, 4)}, ValueError, "offsets and factor must have one entry per expert"),
        ({"offsets": torch.ones(2)}, TypeError, "offsets must be int32 or int64.*torch.float32"),
        ({"offsets": torch.ones(4, dtype=torch.int32)[::2]}, ValueError, "offsets must be.*contiguous"),
        ({"offsets": torch.ones(1, 2, dtype=torch.int32)}, ValueError, r"shape is \(1, 2\)"),
        ({"offsets": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "offsets on meta"),
        ({"compute_dtype": torch.float64}, TypeError, "compute_dtype must be float32"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {"x": torch.randn(3, 4), "offsets": torch.tensor([1, 3]), "factor": torch.randn(2, 2, 4)}
    with pytest.raises(kind, match=message):
        experts_down(**arguments | change)
