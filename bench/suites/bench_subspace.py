"""One weight's minor subspace: `mica.minor_subspace` against what stock PEFT and Unsloth compute.

Gaussian weights of the shapes that models have. Implementations: stock's full fp32 SVD, all eigenvectors of
the fp64 Gram matrix as Unsloth has them, and the solver at several ranks. No time is reported for a result
that the solver could not certify, or for one that is not the minor subspace. On an accelerator, where one SVD
may take seconds, small weights come first, and for each of them the solver before the SVD, whose libraries
are warmed up by a small one.
``peak_extra`` is the growth of memory at its highest point over the fp32 size of the weight, for weights of
16 MB and more.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.results.names import EIGH, SVD
from bench.results.throughput import FLOP, MATRICES, gram_flop
from bench.suites import harness
from bench.suites.eigh import basis_by_eigh, least_energy
from bench.suites.harness import build_all, each, iterations, pick
from bench.suites.rounds import Once, prepared, rounds
from mica import minor_subspace

SOLVERS = {f"minor_subspace, auto, r = {rank}": rank for rank in (16, 64, 128)}


@dataclass(frozen=True)
class Cell(harness.Cell):
    out: int
    inner: int
    ranks: tuple[int, ...] = (16, 64, 128)

    @property
    def axes(self) -> dict[str, str | int]:
        return {"suite": "subspace", "out": self.out, "in": self.inner}

    @property
    def work(self) -> dict[str, float]:
        return {MATRICES: 1, FLOP: gram_flop(self.out, self.inner)}

    @property
    def implementations(self) -> list[str]:
        ours = [name for name, rank in SOLVERS.items() if rank in self.ranks]
        return [*ours, EIGH, SVD] if ON_ACCELERATOR else [SVD, EIGH, *ours]


CELLS = pick(
    default=[
        Cell(192, 576),
        Cell(576, 576),
        Cell(1536, 576),
        Cell(576, 1536),
        Cell(1024, 1024),
        Cell(1024, 4096),
        Cell(4096, 1024),
        Cell(2048, 2048),
    ],
    cuda=[Cell(1024, 4096), Cell(2048, 2048), Cell(4096, 4096), Cell(14336, 4096)],
    dry=[Cell(96, 64, ranks=(16,)), Cell(64, 96, ranks=(16,))],
)
FEWEST = pick(default=3, cuda=1, dry=1)  # rounds
SECONDS = pick(default=60.0, cuda=4.0, dry=0.0)  # of a cell


def weight_of(cell: Cell) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(cell.out, cell.inner, generator=generator).to(DEVICE)


def certified(weight: Tensor, rank: int) -> Callable:
    """The call that computes its minor subspace, once the result is certified."""
    result = minor_subspace(weight, rank)
    assert result.certified, "not certified"
    check_orthonormal(result.basis)
    return functools.partial(minor_subspace, weight, rank)


def by_eigh(weight: Tensor, rank: int) -> Callable:
    """The call that computes a basis by `basis_by_eigh`, once that has the energy of the minor subspace."""
    basis = basis_by_eigh(weight, rank)
    check_orthonormal(basis)
    spent = float((weight.T @ basis).double().square().sum())
    least = least_energy(weight, rank)
    assert spent <= 1.001 * least, f"‖BᵀW‖² is {spent}, and can be {least}"
    return functools.partial(basis_by_eigh, weight, rank)


def check_orthonormal(basis: Tensor) -> None:
    error = float((basis.T @ basis - torch.eye(basis.shape[1], device=DEVICE)).abs().max())
    assert error <= 1e-6, f"BᵀB is off by {error:.1e}"


def small_svd() -> None:
    """Loads and warms up the libraries of a large one."""
    torch.linalg.svd(torch.randn(64, 64, device=DEVICE))


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> tuple[dict[str, Callable], int]:
    weight = weight_of(cell)
    small_svd()

    def build(name: str) -> Callable:
        if name == SVD:
            return functools.partial(torch.linalg.svd, weight, full_matrices=False)
        if name == EIGH:  # which takes as long for any rank
            return by_eigh(weight, min(cell.ranks))
        return certified(weight, SOLVERS[name])

    calls = build_all(cell.name, cell.implementations, build)
    ours = [name for name in SOLVERS if name in calls]
    if not ours:
        return calls, 1
    return calls, iterations(seconds(calls[ours[-1]]))


@each(CELLS)
def bench_subspace(cell):
    calls, count = prepared(cell.name, lambda: setting(cell))
    elements = cell.out * cell.inner
    is_large = elements >= 2**22

    def sample(once: Once, name: str) -> None:
        if name == SVD and ON_ACCELERATOR:
            once(calls[name], cell.axes, work=cell.work, warm_up=small_svd)
        else:
            once(calls[name], cell.axes, count, work=cell.work, peak=is_large)
        if is_large:
            once.note_growth("peak_extra", 4 * elements)

    rounds(cell.name, cell.implementations, sample, SECONDS, FEWEST)
