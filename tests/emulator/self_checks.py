"""The emulator on small kernels: faulty launches that it must refuse. Results are those of `make emulate`.

``python -m tests.emulator.self_checks 90`` prints {check: what is wrong, or ""} as JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl

from tests.emulator.driver import installed, settings
from tests.emulator.program import FaultError, Program

OUTPUTS = ("out_ptr", "partial_ptr", "counter_ptr")
I32, BF16 = torch.int32, torch.bfloat16


# -- kernels --------------------------------------------------------------------------------------------


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


@contextmanager
def without(program: Program, op: str):
    """Without the program's instructions whose name begins so, of which there must be some."""
    kept = program.blocks
    program.blocks = [[one for one in block if not one.op.startswith(op)] for block in kept]
    assert sum(map(len, program.blocks)) < sum(map(len, kept)), f"no {op} in {program.name}"
    try:
        yield
    finally:
        program.blocks = kept


# -- checks ---------------------------------------------------------------------------------------------


def refuses(pattern, function):
    with pytest.raises(FaultError, match=pattern):
        function()


def product(a, b):
    """As compiled, pipelined in three stages."""
    (m, k), n = a.shape, b.shape[1]
    out, grid = torch.full((m, n), float("nan")), (triton.cdiv(m, 64), triton.cdiv(n, 64))
    return dot[grid](a, b, out, m, n, k, *a.stride(), *b.stride(), 64, 64, 32, "ieee", 3)


def split_sum(sem="acq_rel", barrier=True):
    out, partial, counter = torch.zeros(256), torch.full((5, 256), float("nan")), torch.zeros(1, dtype=I32)
    compiled = parts[(5,)](out, partial, counter, 5, 256, barrier, sem)
    assert torch.equal(out, 5.0 * torch.arange(256) + 10)
    return compiled


def refused_accesses(capability):
    x, out = torch.randn(1000), torch.zeros(1000)
    refuses("outside all tensors|is read", lambda: add[(4,)](x, x.clone()[:990], out, 1000, B=256))
    refuses("is written", lambda: add[(4,)](x, x, out[:-4], 1000, B=256))
    gaps = torch.randn(500, 3)
    refuses("is read", lambda: add[(4,)](gaps[:, :2], x, out, 1000, B=256))


def refused_protocols(capability):
    """A split sum without the order that it rests on."""
    refuses("race in partial_ptr", lambda: split_sum("relaxed", False))
    program = split_sum(barrier=False).function[0]
    with without(program, "bar.sync"):
        refuses("race in (partial|shared)", lambda: split_sum(barrier=False))


def refused_products(capability):
    """A pipelined product with one synchronisation taken out."""
    a, b = torch.randn(33, 96).bfloat16(), torch.randn(96, 50).bfloat16()
    compiled = product(a, b)
    taken = {"cp.async.wait_group": "being copied to", "bar.sync": "race"}
    if capability >= 90:
        taken |= {"wgmma.wait_group": "unwritten|read by a product", "wgmma.fence": "no wgmma.fence"}
        taken |= {"fence.proxy.async": "no fence.proxy.async"}
    for op, pattern in taken.items():
        with without(compiled.function[0], op):
            refuses(pattern, lambda: product(a, b))


CHECKS = (
    refused_accesses,
    refused_protocols,
    refused_products,
)


def outcome(check, capability) -> str:
    torch.manual_seed(0)
    settings.order, settings.seed = "forward", 0
    try:
        check(capability)
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    capability = int(sys.argv[1])
    with installed(capability, OUTPUTS):
        print(json.dumps({check.__name__: outcome(check, capability) for check in CHECKS}))


if __name__ == "__main__":
    main()
