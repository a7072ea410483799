"""What all kernels share: product, rounding, dropout mask, and helpers on the host.

Conventions: M tokens, K in_features, N out_features, rank r. R is r rounded up to a power of two ≥ 16
(`padded_rank`), because tensor cores take no smaller tile. Every offset that is multiplied by a stride is
int64: a matrix, or the buffer it lies in, may have more than 2^31 elements. Products accumulate in fp32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mica.kernels.limits import DTYPES, names_of

# Triton raises it where a kernel cannot be compiled, or needs more than the device has.
LaunchError = triton.runtime.errors.TritonError


class NotLoadedError(LaunchError):
    """A kernel would have to be loaded while a CUDA graph is captured, and CUDA does not permit that."""


TRITON_DTYPES = {dtype: getattr(tl, names_of([dtype])) for dtype in DTYPES}

# Read once, when the kernels are decorated, as Triton does.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---------------------------------------------------------------------------------------------------
# on the device
# ---------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. PRECISION says how fp32 factors are multiplied; 16-bit products are exact."""
    if INTERPRETED:  # the interpreter keeps bf16 as uint16, and `tl.dot` would multiply those integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    """value in DTYPE, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16 and value.dtype == tl.float32:
        # the interpreter would truncate, and flush numbers that are subnormal in bf16
        bits = value.to(tl.uint32, bitcast=True)
        upper = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        result = tl.where(value == value, upper, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def _mix(z):
    """A bijection of 32 bits in which every input bit moves every output bit (hash prospector's)."""
    z ^= z >> 16
    z *= 0x21F0AAAD
    z ^= z >> 15
    z *= 0xD35A2D97
    return z ^ (z >> 15)


@triton.jit
def dropout_keep(seed, rows, columns, threshold):
    """Which elements of rows x columns dropout keeps, an (a, b) mask: `mica.paths.dropout`, bit for bit.

    seed is int64, loaded before any loop; rows (a) and columns (b) are 1-d; threshold has 24 bits. It takes
    about a dozen instructions per element, Philox four times as many. What depends on the row only is
    computed once per row.
    """
    first = _mix(rows.to(tl.uint32) ^ (seed & 0xFFFFFFFF).to(tl.uint32))
    second = _mix(first + (seed >> 32).to(tl.uint32))
    z = columns.to(tl.uint32)[None, :] * 0x9E3779B9 + first[:, None]
    z ^= z >> 16
    z *= 0x21F0AAAD
    z ^= second[:, None]
    z ^= z >> 15
    z *= 0xD35A2D97
    z ^= z >> 15
    return (z >> 8).to(tl.int32) >= threshold


@triton.jit
def wide_product(
    h_ptr, p_ptr, rows, columns, num_rows, num_columns, stride_hm, stride_hr, stride_pr, stride_pn,
    H_RANK: tl.constexpr, P_RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile rows (a) x columns (b) of h P in fp32.

    The sum takes BLOCK_K of the rank at a time: all of a wide rank at once spills.
    """
    row_mask = (rows < num_rows)[:, None]
    column_mask = (columns < num_columns)[None, :]
    h_rows = h_ptr + rows.to(tl.int64)[:, None] * stride_hm
    p_columns = columns.to(tl.int64)[None, :] * stride_pn
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in tl.range(0, BLOCK_R, BLOCK_K, num_stages=1):  # more buffers would add to the main loop's
        ranks = start + tl.arange(0, BLOCK_K)
        ranks_64 = ranks.to(tl.int64)
        h_mask = row_mask & (ranks < H_RANK)[None, :]
        h = tl.load(h_rows + ranks_64[None, :] * stride_hr, mask=h_mask, other=0.0)
        p_ptrs = p_ptr + ranks_64[:, None] * stride_pr + p_columns
        if P_RANK == BLOCK_R and EVEN_N:
            p = tl.load(p_ptrs)
        else:
            p = tl.load(p_ptrs, mask=(ranks < P_RANK)[:, None] & column_mask, other=0.0)
        acc = dot(cast(h, COMPUTE), cast(p, COMPUTE), acc, PRECISION)
    return acc


# ---------------------------------------------------------------------------------------------------
# on the host
# ---------------------------------------------------------------------------------------------------


def padded_rank(rank: int) -> int:
    """R, the size of a tile along the rank: the rank rounded up to a power of two, at least 16."""
    return max(16, power_of_two(rank))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less than ``number``. Triton's own function takes 2.5 µs."""
    return 1 << (number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def target_of(device: torch.device) -> str:
    """The compilation target of a device, such as "sm_90", which the interpreter stands in for.

    Cached by the device, whose index refers to one GPU for the life of the process.
    """
    if device.type != "cuda" or INTERPRETED.value:
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# Ten times as fast as `torch.cuda.current_stream`, which makes an object. None in a build without CUDA.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def precision(dtype: torch.dtype) -> str:
    """How kernels multiply numbers of a dtype: fp32 as `torch.set_float32_matmul_precision` demands.

    For full fp32 ("highest") that is three TF32 products, whose error is fp32's and which tensor cores run.
    """
    if dtype != torch.float32:
        return "ieee"  # 16-bit products are exact anyway
    return "tf32" if fp32_setting() == "tf32" else "tf32x3"


def fp32_setting() -> str:
    """How torch multiplies fp32 matrices: "tf32", or another word."""
    if _fp32_getter is None:
        return torch.backends.cuda.matmul.fp32_precision
    return _fp32_getter("cuda", "matmul")


# Reads what the property reads, in an eighth of the time.
_fp32_getter = getattr(torch._C, "_get_fp32_precision_getter", None)


def dropout_numbers(dropout_p: float, scale: float = 1.0) -> dict[str, float | int]:
    """What kernels are told of dropout: by what to scale all that is kept, and which elements that is.

    The threshold is the probability in units of 2^-24, for `dropout_keep`.
    """
    return {"scale": float(scale) / (1.0 - dropout_p), "threshold": round(dropout_p * 2**24)}
