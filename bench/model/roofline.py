"""What a MiCA layer would cost on a GPU that is not available: MODELLED, not measured.

A roofline: a launch takes the longer of its compute and its traffic, and a gap until the next one starts.
Matrices are bf16 and sums fp32 unless stated otherwise. Assumed, besides the devices' rates:

- all operands of a launch pass through memory once. Nothing stays in the L2 cache from one launch to the next
  (harsh where M is small and all of it would); what a launch reads again, it reads from there;
- every kernel reaches those rates, the vendor's skinny products too; waves and tiles come out even;
- no dropout, no bias, a host that is never late. Ours has bf16 adapters: an fp32 A is 2·r·K bytes more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from mica.kernels import configs
from mica.kernels.common import ceil_div, padded_rank
from mica.kernels.limits import padded_columns
from mica.kernels.split_k import split_evenly

BF16, FP32 = 2, 4  # bytes


class Device(NamedTuple):
    """Assumed rates, as achieved rather than advertised: bf16 and fp32 flop/s, bytes/s; gap in s."""

    target: str
    tensor: float
    fp32: float
    bandwidth: float
    gap: float = 2e-6


H100 = Device("sm_90", 790e12, 45e12, 3.0e12)


class Layer(NamedTuple):
    """x (m×k), W (n×k), A (rank×k), B (n×rank); our own GEMM's share of the vendor's speed."""

    m: int
    n: int
    k: int
    rank: int
    target: str
    triton_gemm: float = 0.97


class Kernel(NamedTuple):
    """One launch. ``partials``: bytes of partial sums, written and read again, in addition to ``bytes``."""

    bytes: int
    flops: float = 0.0
    unit: str = "tensor"
    partials: int = 0
    speed: float = 1.0

    def seconds(self, device: Device) -> float:
        traffic = (self.bytes + self.partials) / device.bandwidth
        return max(self.flops / getattr(device, self.unit), traffic) / self.speed + device.gap


class Cost(NamedTuple):
    """The launches of forward and backward, frozen GEMM included; bytes of activations kept in between."""

    forward: list[Kernel]
    backward: list[Kernel]
    saved: int

    def microseconds(self, device: Device) -> dict[str, float]:
        forward, backward = (1e6 * sum(one.seconds(device) for one in part) for part in self[:2])
        return {"forward": forward, "backward": backward, "both": forward + backward}


def gemm(m: int, n: int, k: int, size: int = BF16, adds: bool = False) -> Kernel:
    """The vendor's: reads m×k and k×n, writes m×n; where it accumulates, it reads that too."""
    numbers = m * k + k * n + m * n * (2 if adds else 1)
    return Kernel(size * numbers, 2.0 * m * n * k, "tensor" if size == BF16 else "fp32")


def elementwise(numbers: int, *sizes: int) -> Kernel:
    """Reads and writes one matrix of ``numbers`` numbers for each size (bytes per number)."""
    return Kernel(numbers * sum(sizes))


def down(m: int, k: int, rows: int, target: str) -> Kernel:
    """`down_projection`: reads x (m×k) and P (rows×k), writes h (m×columns); partial sums of h."""
    config = configs.down_projection(target, m, padded_rank(rows), BF16)[0]
    tiles, columns = ceil_div(m, config.block_m), padded_columns(rows)
    partials = _partials(k, config.block_k, tiles, columns, m * columns)
    return Kernel(BF16 * (m * k + rows * k + m * columns), 2.0 * m * k * padded_rank(rows), partials=partials)


def grad_a(m: int, k: int, rank: int, target: str) -> Kernel:
    """`grad_a`: reads g (m×columns) and x (m×k), writes dA (rank×k); partial sums of dA."""
    config = configs.grad_a(target, m, padded_rank(rank), BF16)[0]
    tiles, columns = ceil_div(k, config.block_k), padded_columns(rank)
    partials = _partials(m, config.block_m, tiles, columns, rank * k)
    return Kernel(BF16 * (m * columns + m * k + rank * k), 2.0 * m * k * padded_rank(rank), partials=partials)


def _partials(length: int, block: int, tiles: int, columns: int, result: int) -> int:
    """Bytes written and read again by a sum over ``length`` with ``result`` numbers."""
    _, splits = split_evenly(length, block, tiles, columns, BF16)
    return 2 * FP32 * splits * result if splits > 1 else 0


def up(m: int, n: int, rows: int) -> Kernel:
    """`up_projection_`: reads and writes y (m×n), reads h (m×columns) and P (rows×n)."""
    return Kernel(BF16 * (2 * m * n + m * padded_columns(rows) + rows * n), 2.0 * m * n * padded_rank(rows))


def fused_linear(m: int, n: int, k: int, rows: int, speed: float) -> Kernel:
    """`fused_linear`: reads x (m×k), w (k×n), h (m×columns), P (rows×n), writes y (m×n), never reads it."""
    read = BF16 * (m * padded_columns(rows) + rows * n)
    base = gemm(m, n, k)
    return Kernel(base.bytes + read, base.flops + 2.0 * m * n * padded_rank(rows), speed=speed)


def bare(layer: Layer) -> Cost:
    """x Wᵀ, and dx = dy W: nothing is saved, since W is frozen."""
    m, n, k = layer[:3]
    return Cost([gemm(m, n, k)], [gemm(m, k, n)], 0)


def ours(layer: Layer, fused: bool) -> Cost:
    """`mica.paths.triton_path`, split or fused. B is prepared once and padded; g and dA are the same."""
    m, n, k, rank, target, speed = layer
    columns = padded_columns(rank)

    def wide(out: int, inner: int, rows: int) -> list[Kernel]:
        if fused:
            return [fused_linear(m, out, inner, rows, speed)]
        return [gemm(m, out, inner), up(m, out, rows)]

    forward = [down(m, k, rank, target), *wide(n, k, columns)]
    backward = [down(m, n, columns, target), grad_a(m, k, rank, target), *wide(k, n, rank)]
    return Cost(forward, backward, BF16 * m * k)


def mixed(layer: Layer) -> Cost:
    """`ours` in the form "mixed": the vendor's skinny products; dA is written in fp32, then rounded."""
    m, n, k, rank = layer[:4]
    product = gemm(rank, k, m)
    grad = product._replace(bytes=product.bytes + (FP32 - BF16) * rank * k)
    forward = [gemm(m, rank, k), gemm(m, n, k), up(m, n, rank)]
    backward = [gemm(m, rank, n), grad, elementwise(rank * k, FP32, BF16), gemm(m, k, n), up(m, k, rank)]
    return Cost(forward, backward, BF16 * m * k)


def aten(layer: Layer) -> Cost:
    """`mica.paths.torch_path` with one bf16 product for dA, the most that plain PyTorch can do.

    Skinny GEMMs and `addmm_`, for a scaling of 1, which is not multiplied.
    """
    m, n, k, rank = layer[:4]
    forward = [gemm(m, rank, k), gemm(m, n, k), gemm(m, n, rank, adds=True)]
    backward = [gemm(m, rank, n), gemm(m, k, n), gemm(m, k, rank, adds=True), gemm(rank, k, m)]
    return Cost(forward, backward, BF16 * m * k)


def stock(layer: Layer, size: int) -> Cost:
    """PEFT's result + lora_B(lora_A(x))·scaling, adapters of ``size`` bytes per number; casts if not bf16."""
    m, n, k, rank = layer[:4]

    def cast(numbers: int) -> list[Kernel]:
        return [elementwise(numbers, size, BF16)] if size != BF16 else []

    forward = [
        gemm(m, n, k),
        *cast(m * k),  # x
        gemm(m, rank, k, size),  # h = x Aᵀ
        gemm(m, n, rank, size),  # h Bᵀ, all m×n of it
        elementwise(m * n, size, size),  # · scaling
        elementwise(m * n, BF16, size, size),  # result + …
        *cast(m * n),  # in the dtype of the base layer
    ]
    backward = [
        *cast(m * n),  # dy
        *cast(m * n),  # dy for the base layer
        elementwise(m * n, size, size),  # · scaling
        gemm(m, rank, n, size),  # g
        gemm(rank, k, m, size),  # dA = gᵀ x
        gemm(m, k, rank, size),  # g A, all m×k of it
        *cast(m * k),  # g A in the dtype of x
        gemm(m, k, n),  # dy W
        elementwise(m * k, BF16, BF16, BF16),  # autograd's sum
    ]
    return Cost(forward, backward, size * m * k)


BARE, SPLIT, MIXED, FUSED, CONTROL = "bare frozen linear", "split", "mixed", "fused", "aten control"
STOCK_16, STOCK = "stock PEFT, bf16 adapters", "stock PEFT, default (fp32 adapters)"
FORMS: dict[str, Callable[[Layer], Cost]] = {
    BARE: bare,
    SPLIT: partial(ours, fused=False),
    MIXED: mixed,
    FUSED: partial(ours, fused=True),
    CONTROL: aten,
    STOCK_16: partial(stock, size=BF16),
    STOCK: partial(stock, size=FP32),
}


SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (512, 4096, 4096))  # M, N, K
RANK = 16


def percent(layer: Layer, device: Device, form: str) -> dict[str, float]:
    """What a form adds to the time of the bare layer, in forward, backward and both."""
    base, us = (FORMS[name](layer).microseconds(device) for name in (BARE, form))
    return {part: 100 * (us[part] / base[part] - 1) for part in us}
