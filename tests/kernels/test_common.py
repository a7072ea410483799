import pytest
import torch
import triton
import triton.language as tl

from mica.kernels import common, limits
from mica.paths import dropout
from tests.support.kernel_cases import DEVICE, seed_of

in_each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@triton.jit
def _keep_kernel(seed_ptr, out_ptr, first_row, columns, threshold, BLOCK: tl.constexpr):
    rows, cols = first_row + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    keep = common.dropout_keep(tl.load(seed_ptr), rows, cols, threshold)
    offsets = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None] * columns + cols[None, :]
    tl.store(out_ptr + offsets, keep.to(tl.int8), mask=(cols < columns)[None, :])


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, common.cast(tl.load(x_ptr + index), out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    index = tl.arange(0, 16)
    places = index[:, None] * 16 + index[None, :]
    acc = tl.full((16, 16), 1.0, tl.float32)
    acc = common.dot(tl.load(a_ptr + places), tl.load(b_ptr + places), acc, PRECISION)
    tl.store(out_ptr + places, acc)


@pytest.mark.whole
@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 7, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("dropout_p", [0.0, 2**-24, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("first_row", [0, 1_000_000])
def test_the_mask_is_the_references_bit_for_bit(seed, dropout_p, first_row):
    out = torch.empty(64, 50, dtype=torch.int8, device=DEVICE)
    threshold = common.dropout_numbers(dropout_p)["threshold"]
    _keep_kernel[(1,)](seed_of(seed), out, first_row, 50, threshold, BLOCK=64)
    expected = dropout.keep_rows(seed_of(seed), first_row, 64, 50, threshold)
    assert torch.equal(out.bool(), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of NumPy, where fp16 becomes infinite
@in_each_dtype
def test_cast_rounds_to_nearest_even(dtype):
    ties = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-8, 3.39e38, 0.0, -0.0]
    )
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40])
    x = torch.cat([ties, special, torch.randn(244)]).to(DEVICE)
    out = torch.empty(256, dtype=dtype, device=DEVICE)
    _cast_kernel[(1,)](x, out, BLOCK=256)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@in_each_dtype
def test_dot_adds_an_exact_product(dtype):
    """Small integers: every product and every sum is exact, so one wrong bit shows."""
    a, b = (torch.randint(-8, 9, (16, 16), device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty(16, 16, device=DEVICE)
    _dot_kernel[(1,)](a, b, out, PRECISION="ieee")
    assert torch.equal(out, 1.0 + a.float() @ b.float())


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")]
)
def test_precision_follows_torch(request, setting, precision):
    before = torch.get_float32_matmul_precision()
    request.addfinalizer(lambda: torch.set_float32_matmul_precision(before))
    torch.set_float32_matmul_precision(setting)
    assert common.precision(torch.float32) == precision
    assert common.precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize(
    ("rank", "block", "columns"), [(1, 16, 16), (16, 16, 16), (17, 32, 32), (48, 64, 48), (256, 256, 256)]
)
def test_padding_of_the_rank(rank, block, columns):
    assert common.padded_rank(rank) == block
    assert limits.padded_columns(rank) == columns


def test_target_of(monkeypatch):
    target_of = common.target_of.__wrapped__
    monkeypatch.setattr(common, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert target_of(torch.device("cpu")) == "sm_90"
    assert target_of(torch.device("cuda")) == "sm_120"
