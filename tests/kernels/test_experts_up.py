import pytest
import torch

from mica.kernels import configs
from mica.kernels.experts_up import experts_up_, plan_experts_up
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


def expected(y, h, ends, factor, bias=None):
    exact = y.double() + by_expert(h, ends, factor)
    for expert, rows in enumerate(slices(ends)):
        if bias is not None:
            exact[rows] += bias[expert].double()
    exact[ends[-1] :] = 0
    return exact


def check(y, h, ends, factor, bias=None, index=torch.int32, **options):
    exact = expected(y, h, ends, factor, bias)
    y[ends[-1] :] = float("nan")
    out, launch = plan_experts_up(y, h, offsets_of(ends, index), factor, bias=bias, **options).bound()
    actual = run_guarded(out, launch)
    assert not actual[ends[-1] :].any()
    assert error(actual, exact) <= RELATIVE[y.dtype]


@pytest.mark.parametrize(("dtype", "factor_dtype", "compute_dtype"), DTYPES)
@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_agrees_with_fp64(dtype, factor_dtype, compute_dtype, name, with_bias):
    (rows, ends), width, rank = ROUTES[name], 140, 5
    factor = stack(len(ends), rank, width, factor_dtype, "gaps", rank**-0.5)
    bias = operand(len(ends), width, dtype) if with_bias else None
    factor[idle(ends)] = float("nan")  # not read
    y, h = operand(rows, width, dtype), operand(rows, rank, compute_dtype)
    h[ends[-1] :] = float("nan")
    check(y, h, ends, factor, bias, compute_dtype=compute_dtype)


@given(
    counts=counts,
    leftover=leftovers,
    width=st.integers(1, 90),
    rank=ranks,
    kinds=dtypes,
    y=layouts,
    h=layouts,
    p=st.sampled_from(STACKS),
)
def test_any_shape_and_layout(counts, leftover, width, rank, kinds, y, h, p):
    rows, ends = route(counts, leftover)
    factor = stack(len(ends), rank, width, kinds[1], p, rank**-0.5)
    y, h = operand(rows, width, kinds[0], y), operand(rows, rank, kinds[2], h)
    check(y, h, ends, factor, operand(len(ends), width, kinds[0]), index=torch.int64)


@pytest.mark.parametrize("rank", [1, 16, 20])
def test_padding_of_either_side_is_not_read(rank):
    (rows, ends), columns = ROUTES["rows of none"], padded_columns(rank)
    y, h = operand(rows, 40, torch.float32), operand(rows, rank, torch.float32)
    factor = stack(len(ends), rank, 40, torch.float32, "gaps")
    wide_h, wide_factor = h.new_zeros(rows, columns), factor.new_zeros(len(ends), columns, 40)
    wide_h[:, :rank], wide_factor[:, :rank] = h, factor
    for left, right in ((wide_h, factor), (h, wide_factor), (wide_h, wide_factor)):
        check(y, left, ends, right)


def test_rows_of_other_experts():
    rows, ends = ROUTES["tiles"]
    h, factor = operand(rows, 5, torch.bfloat16), stack(len(ends), 5, 70, torch.float32)
    h[slices(ends)[2]] = float("nan")
    y = experts_up_(operand(rows, 70, torch.bfloat16), h, offsets_of(ends), factor)
    assert y[slices(ends)[2]].isnan().all()
    assert int(y.isnan().any(dim=1).sum()) == 1


def test_in_place_and_the_same_again():
    rows, ends = ROUTES["first and last idle"]
    y, h, factor = (
        operand(rows, 33, torch.bfloat16),
        operand(rows, 3, torch.bfloat16),
        stack(6, 3, 33, torch.bfloat16),
    )
    again = y.clone()
    assert experts_up_(y, h, offsets_of(ends), factor) is y
    assert torch.equal(y, experts_up_(again, h, offsets_of(ends), factor))


def test_one_rounding():
    """The sum of base, bias and product is formed in fp32: at most half a unit in the last place."""
    y, h, bias = (
        operand(64, 64, torch.bfloat16),
        operand(64, 4, torch.float32),
        operand(1, 64, torch.bfloat16),
    )
    factor = stack(1, 4, 64, torch.float32)
    exact = expected(y, h, [64], factor, bias)
    experts_up_(y, h, offsets_of([64]), factor, bias=bias)
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_every_configuration():
    rows, ends = ROUTES["tiles"]
    h, factor = operand(rows, 9, torch.bfloat16), stack(len(ends), 9, 150, torch.float32, scale=0.3)
    for config in {c for t in configs.SHARED_MEMORY for c in configs.experts_up(t, 1, 16, 2)}:
        check(operand(rows, 150, torch.bfloat16), h, ends, factor, config=config)


def test_offsets_beyond_32_bit():
    """Of the rows of y and h, and of the third expert's factor and bias."""
    y, ends = far_apart(3, 70, torch.float16), [1, 2, 3]
    far = far_apart(3, 4 * 70, torch.float16).unflatten(1, (4, 70))
    for base, h, factor in (
        (y, operand(3, 4, torch.float16), stack(3, 4, 70, torch.float16)),
        (y.contiguous(), far_apart(3, 4, torch.float16), far),
    ):
        exact = expected(base, h, ends, factor, y)
        actual = experts_up_(base, h, offsets_of(ends), factor, bias=y if base is not y else y.contiguous())
        assert error(actual, exact) <= RELATIVE[torch.float16]


def test_many_experts_with_few_rows():
    ends = [min(expert // 12, 15) for expert in range(200)]
    h, factor = operand(32, 3, torch.float32), stack(200, 3, 40, torch.float32)
    check(operand(32, 40, torch.float32), h, ends, factor)


def test_no_rows():
    empty = operand(0, 8, torch.float32, "contiguous")
    assert experts_up_(empty, empty[:, :2], offsets_of([0, 0]), stack(2, 2, 8, torch.float32)).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"y": torch.randn(3, 5)}, ValueError, "dimension 1 of y and dimension 2 of factor"),
        ({"y": torch.randn(4, 4)}, ValueError, "dimension 0 of y and dimension 0 of h"),
        ({"h": torch.randn(3, 3)}, ValueError, "h must have as many columns as factor has rows"),
        ({"factor": torch.randn(3, 2, 4)}, ValueError, "offsets and factor must have one entry per expert"),
        ({"factor": torch.randn(2, 0, 4)}, ValueError, "rank from 1 to 256.*is 0"),
        ({"bias": torch.randn(2, 3)}, ValueError, r"bias must be \(num_experts, out_features\) = \(2, 4\)"),
        ({"bias": torch.randn(2, 4).double()}, TypeError, "bias must be of dtype"),
        ({"bias": torch.randn(2, 4, device="meta")}, ValueError, "bias on meta"),
        ({"compute_dtype": torch.float64}, TypeError, "compute_dtype must be float32"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    arguments = {"y": torch.randn(3, 4), "h": torch.randn(3, 2), "offsets": torch.tensor([1, 3])}
    arguments |= {"factor": torch.randn(2, 2, 4)}
    with pytest.raises(kind, match=message):
        experts_up_(**arguments | change)
