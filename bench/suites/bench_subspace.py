"""One weight's minor subspace: `mica.minor_subspace` against the full fp32 SVD that stock PEFT takes.

Gaussian weights of the shapes that models have, SmolLM2's embedding, and 16 weights of one shape, solved as
`mica.fast` solves a model's. Implementations: the SVD, and the solver's methods. No time is reported for a
result that the solver could not certify. ``peak_extra`` is the growth of memory at its highest point over the
fp32 size of the weight, for weights of 16 MB and more.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE
from bench.results.names import SVD
from bench.results.throughput import FLOP, MATRICES, gram_flop
from bench.suites.harness import build_all, iterations, pick, whole_turns
from mica import minor_subspace
from mica.subspace.many import Task, solve_many
from tests.support import models

EMBEDDING = (576, 49152)
METHODS = {  # method and rank
    "auto, r = 16": ("auto", 16),
    "auto, r = 64": ("auto", 64),
    "auto, r = 128": ("auto", 128),
    "krylov, r = 16": ("krylov", 16),
    "gram, r = 16": ("gram", 16),
}
AUTO = tuple(METHODS)[:3]
MANY = "auto, r = 16"  # of several weights at once
OURS = "minor_subspace"


class Cell(NamedTuple):
    """``weights`` of them, each ``out`` x ``inner``."""

    out: int
    inner: int
    rounds: int
    methods: tuple[str, ...] = tuple(METHODS)
    weights: int = 1

    @property
    def name(self) -> str:
        shape = f"{self.out} x {self.inner}"
        return f"minor subspace, {shape}" if self.weights == 1 else f"{self.weights} minor subspaces, {shape}"

    @property
    def key(self) -> str:
        """For ``-k``."""
        shape = f"{self.out}x{self.inner}"
        return shape if self.weights == 1 else f"{self.weights}x{shape}"

    @property
    def axes(self) -> dict[str, str | int]:
        shape = {"out": self.out, "in": self.inner}
        if self.weights == 1:
            return {"suite": "subspace", **shape}
        return {"suite": "subspaces", "weights": self.weights, **shape}

    @property
    def work(self) -> dict[str, float]:
        return {MATRICES: self.weights, FLOP: self.weights * gram_flop(self.out, self.inner)}

    @property
    def implementations(self) -> list[str]:
        return [SVD, *(f"{OURS}, {name}" for name in self.methods)]


def many(rounds: int, size: int = 576, weights: int = 16) -> tuple:
    return size, size, rounds, (MANY,), weights


ROWS = pick(
    quick=[(576, 576, 3), (1024, 1024, 3, AUTO), many(2)],
    default=[
        *((576, 576, 6), (1536, 576, 6), (1024, 1024, 5), (1024, 4096, 3), (4096, 1024, 3)),
        *((2048, 2048, 3, AUTO), many(3)),
    ],
    full=[
        *((512, 512, 8), (576, 576, 8), (1536, 576, 8), (1024, 1024, 8), (1024, 4096, 5), (4096, 1024, 5)),
        *((2048, 2048, 5), (4096, 4096, 3), (4096, 11008, 2), (11008, 4096, 2), (*EMBEDDING, 5), many(5)),
    ],
    cuda=[(4096, 4096, 2, AUTO), (14336, 4096, 1, AUTO), (1024, 4096, 3, AUTO), many(3)],
    dry=[(96, 64, 1, (MANY,)), (64, 96, 1, (MANY,)), many(1, 64, 2)],
)
CELLS = [Cell(*row) for row in ROWS]


def weights_of(cell: Cell) -> list[Tensor]:
    if (cell.out, cell.inner) == EMBEDDING:
        return [models.smollm2().get_input_embeddings().weight.detach().T]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(cell.out, cell.inner, generator=generator).to(DEVICE) for _ in range(cell.weights)]


def solved(weights: list[Tensor], method: str, rank: int):
    """`MinorSubspace` of each."""
    if len(weights) == 1:
        return [minor_subspace(weights[0], rank, method=method)]
    tasks = [Task(str(number), weight, rank) for number, weight in enumerate(weights)]
    return [subspace for _, subspace in solve_many(tasks)]


def certified(weights: list[Tensor], method: str, rank: int) -> Callable:
    """The call that computes them, once their results are certified."""
    for result in solved(weights, method, rank):
        assert result.certified, "not certified"
        error = float((result.basis.T @ result.basis - torch.eye(rank, device=DEVICE)).abs().max())
        assert error <= 1e-6, f"BᵀB is off by {error:.1e}"
    return functools.partial(solved, weights, method, rank)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> tuple[dict[str, Callable], int]:
    weights = weights_of(cell)
    torch.linalg.svd(torch.randn(64, 64, device=DEVICE))  # loads libraries; the checks load ours

    def build(name: str) -> Callable:
        if name == SVD:
            return lambda: [torch.linalg.svd(one, full_matrices=False).U for one in weights]
        return certified(weights, *METHODS[name.removeprefix(f"{OURS}, ")])

    calls = build_all(cell.name, cell.implementations, build)
    *_, last = calls.values()  # ours, if any of them has a number
    return calls, iterations(seconds(last))


@whole_turns(CELLS)
def bench_subspace(once, gated, cell, round_, implementation):
    calls, count = gated(cell.name, lambda: setting(cell), implementation)
    elements = cell.weights * cell.out * cell.inner
    once(calls[implementation], cell.name, implementation, cell.axes, count, work=cell.work)
    if elements >= 2**22:
        once.note_growth(peak_extra=4 * elements)
