"""Small kernels whose results are known, for the checks of the emulator itself."""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask) + tl.load(y_ptr + i, mask=mask), mask=mask)


@triton.jit
def dot(
    a_ptr, b_ptr, out_ptr, M, N, K, sam, sak, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    n = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        of_a, of_b = k[None, :], k[:, None]
        a = tl.load(a_ptr + m * sam + of_a * sak, mask=(m < M) & (of_a < K), other=0.0)
        b = tl.load(b_ptr + of_b * sbk + n * sbn, mask=(of_b < K) & (n < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out_ptr + m * N + n, acc, mask=(m < M) & (n < N))


@triton.jit
def rounding(x_ptr, out_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def branch(x_ptr, out_ptr, n, B: tl.constexpr):
    more, place, total = True, 0, 0
    while more:
        x = tl.load(x_ptr + place + tl.arange(0, B))
        total += tl.sum(x)
        place += B
        more = (tl.max(x) < 90) & (place < n)
    if total % 2 == 0:
        tl.store(out_ptr, total)
    else:
        tl.store(out_ptr, -total)
    tl.store(out_ptr + 1, place)


@triton.jit
def parts(
    out_ptr, partial_ptr, counter_ptr, splits, B: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr
):
    """The protocol of `split_sum`; without its barrier, or relaxed, it is wrong."""
    i, split = tl.arange(0, B), tl.program_id(0)
    tl.store(partial_ptr + split * B + i, (i + split).to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem=SEM) == splits - 1:
        total = tl.zeros((B,), tl.float32)
        for s in range(splits):
            total += tl.load(partial_ptr + s * B + i, cache_modifier=".cg")
        tl.store(out_ptr + i, total)


@triton.jit
def halves(x_ptr, out_ptr, B: tl.constexpr):
    """Arithmetic in bf16, which no kernel here has, and the emulator has not."""
    i = tl.arange(0, B)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + 1)
