"""Each skinny kernel in all its configurations, beside a copy that moves as many bytes and cuBLAS.

All of them are memory-bound, so a kernel is as good as the share of the copy's bandwidth that it reaches:
its work is the bytes that a launch must read and write once. Each configuration is checked against
`mica.paths.reference_path` in fp64 and refused individually.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.measure.machine import DEVICE
from bench.results.names import COPY, CUBLAS, DOWN_A, DOWN_B, GRAD_A, UP_B
from bench.results.throughput import BYTES
from bench.suites import harness
from bench.suites.case import check_error
from bench.suites.harness import build_all, each, needs_accelerator, pick
from bench.suites.rounds import Once, prepared, rounds

pytest.importorskip("triton")

from mica.kernels.common import target_of
from mica.kernels.configs import Config
from mica.kernels.launching import Launch
from mica.kernels.limits import padded_columns
from tests.support.kernel_calls import Work, down, gradient_of_a, up

pytestmark = needs_accelerator

ITERATIONS = pick(default=1, cuda=50)
DTYPE = torch.bfloat16
NAMES = {"down-A": DOWN_A, "down-B": DOWN_B, "up-B": UP_B, "grad_a": GRAD_A}


@dataclass(frozen=True)
class Cell(harness.Cell):
    """A kernel on a matrix of activations, tokens x features."""

    kernel: str
    tokens: int
    features: int
    rank: int

    @property
    def axes(self) -> dict[str, str | int]:
        return {
            "suite": "kernels",
            "kernel": NAMES[self.kernel],
            "tokens": self.tokens,
            "features": self.features,
            "rank": self.rank,
            "dtype": "bfloat16",
        }


SIZES = pick(
    default=[],
    dry=[(40, 64, 16)],
    cuda=[
        *((tokens, 4096, rank) for rank in (16, 64) for tokens in (8192, 2048, 512)),
        *((tokens, 4096, 128) for tokens in (8192, 2048)),
        (8192, 14336, 16),
    ],
)
CELLS = [Cell(kernel, *sizes) for sizes in SIZES for kernel in NAMES]


def work_of(cell: Cell, device: str) -> Work:
    """On the device "meta" without the operands' numbers."""
    columns = padded_columns(cell.rank)

    def matrix(rows: int, width: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(rows, width, device=device, dtype=dtype)

    wide = matrix(cell.tokens, cell.features)
    low = matrix(cell.tokens, columns)
    if cell.kernel == "grad_a":
        return gradient_of_a(low, wide, cell.rank)
    if cell.kernel == "down-A":
        return down(wide, matrix(cell.rank, cell.features, torch.float32))
    factor = matrix(cell.features, columns).t()
    if cell.kernel == "down-B":
        return down(wide, factor)
    return up(wide, low, factor, cell.rank)


def outer_product(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ x in fp32, as exact as the kernel; where PyTorch cannot (on a CPU), rounded before."""
    wide = {"out_dtype": torch.float32} if DEVICE == "cuda" else {}
    return torch.mm(g.t(), x, **wide).float()


PRODUCTS = {  # PyTorch's call for the same, casts included
    "down-A": lambda x, A: torch.mm(x, A.to(x.dtype).t()),
    "down-B": lambda dy, B_t: torch.mm(dy, B_t.t()),
    "up-B": torch.Tensor.addmm_,
    "grad_a": outer_product,
}


@functools.cache
def implementations(cell: Cell) -> dict[str, Config | None]:
    """The copy, every configuration of the kernel's table, the default first, and cuBLAS."""
    table = work_of(cell, "meta").plan(target=target_of(torch.device(DEVICE))).configs
    named = {f"{NAMES[cell.kernel]}, {'x'.join(map(str, config))}": config for config in table}
    return {COPY: None, **named, CUBLAS: None}


def launch_bytes(launch: Launch, out: Tensor) -> int:
    """What a launch must read and write once: its operands, and its output twice where it is updated."""
    operands = {}
    for name, value in launch.args.items():
        if isinstance(value, Tensor) and name not in ("counter_ptr", "partial_ptr"):
            operands[id(value)] = value
    size = sum(tensor.nbytes for tensor in operands.values())
    if launch.args.get("base_ptr") is out:
        size += out.nbytes
    return size


def copy(size: int) -> Callable[[], object]:
    """Reads and writes ``size`` bytes in total."""
    source, target = (torch.zeros(size // 2, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return lambda: target.copy_(source)


def checked(call: Callable[..., Tensor], operands: tuple[Tensor, ...], truth: Tensor) -> Callable[[], Tensor]:
    """The call with these operands, once its result is right; it may update the first of them."""
    first, *others = operands
    check_error(call(first.clone(), *others), truth, DTYPE)
    return functools.partial(call, *operands)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> tuple[dict[str, Callable], int]:
    """implementation -> its call, and the bytes that each of them moves."""
    torch.manual_seed(0)
    work = work_of(cell, DEVICE)
    out, launch = work.plan().bind()
    size = launch_bytes(launch, out)
    configs = implementations(cell)

    def build(name: str) -> Callable[[], object]:
        if name == COPY:
            return copy(size)
        if name == CUBLAS:
            call = PRODUCTS[cell.kernel]
        else:
            call = functools.partial(work.kernel, **work.numbers, config=configs[name])
        return checked(call, work.operands, work.expected)

    return build_all(cell.name, configs, build), size


@each(CELLS)
def bench_kernels(cell):
    calls, size = prepared(cell.name, lambda: setting(cell))
    work = {BYTES: float(size)}

    def sample(once: Once, name: str) -> None:
        once(calls[name], cell.axes, ITERATIONS, all_clocks=True, work=work)

    rounds(cell.name, implementations(cell), sample)
