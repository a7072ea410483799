"""The bounds are bounds, the subspaces orthonormal, and convergence is reported as it is."""

import pytest
import torch

from mica.subspace import krylov
from mica.subspace.host import HostGram
from tests.support.judging import gram_of
from tests.support.spectra import NULL, RANK, SPECTRA, weight
from tests.support.tolerances import error

SHAPES = [(1, 1), (3, 2), (90, 40), (60, 60), (150, 140), (330, 300)]
EPS = torch.finfo(torch.float32).eps
# Spectra that fit the small matrices' few steps; those that begin well above what fp64 resolves.
ABOVE_ZERO = SPECTRA.keys() - NULL - {"flat", "tail x 1e-6", "hard edge"}


def host(name: str, *shape: int) -> tuple[HostGram, torch.Tensor, torch.Tensor]:
    """The Gram matrix of a weight, the same dense, and its eigenvalues."""
    tall = weight(name, *shape)
    return HostGram(tall), gram_of(tall), torch.linalg.eigvalsh(gram_of(tall))


def found(gram, rank: int = RANK, limits: krylov.Bounds | None = None, eps: float = EPS):
    return krylov.smallest_eigenpairs(gram, rank, limits or krylov.bounds(gram), eps)


def assert_smallest(pairs: tuple[torch.Tensor, torch.Tensor], exact: torch.Tensor) -> None:
    values, vectors = torch.linalg.eigh(exact)
    torch.testing.assert_close(pairs[0], values[..., :RANK], rtol=1e-6, atol=0)
    assert error(pairs[1] @ pairs[1].mT, vectors[..., :RANK] @ vectors[..., :RANK].mT) <= 1e-4
    assert error(exact @ pairs[1], pairs[1] * pairs[0].unsqueeze(-2)) <= 1e-4


# The bounds


@pytest.mark.parametrize("steps", [krylov.NORM_STEPS, krylov.LANCZOS_STEPS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_and_shifts_down_from_just_below_the_spectrum(name, shape, steps, monkeypatch):
    monkeypatch.setattr(krylov, "LANCZOS_STEPS", steps)
    gram, _, values = host(name, *shape)
    limits, norm = krylov.bounds(gram), values[-1]
    assert 0.75 * norm <= limits.norm <= (1 + 1e-12) * norm
    floor = krylov.resolution(gram.size, limits.norm)
    first, second, last = limits.shifts
    assert all(shift == -floor or shift > 16 * floor for shift in limits.shifts)
    assert last == -floor
    if norm > 0:
        assert gram.factor(last)
    if steps > krylov.NORM_STEPS and name in ABOVE_ZERO and shape in SHAPES[2:]:
        assert last <= second <= first < values[0]
        assert gram.factor(first)
        if name in ("gaussian", "times 1e4", "times 1e-4") and shape == (90, 40):
            assert first >= 0.9 * values[0]


@pytest.mark.parametrize("rest", [0.7, 0.75])
def test_the_norm_is_found_from_nearly_every_start(rest, monkeypatch):
    """One eigenvalue above a dense rest is what few steps miss: with 6 instead of 12, 3 of 150 starts."""
    angles = torch.pi * (torch.arange(191, dtype=torch.float64) + 0.5) / 191
    eigenvalues = torch.cat([torch.ones(1, dtype=torch.float64), rest * (1 + angles.cos()) / 2])
    gram = HostGram(eigenvalues.sqrt().diag())
    monkeypatch.setattr(krylov, "LANCZOS_STEPS", krylov.NORM_STEPS)
    for seed in range(150):
        monkeypatch.setattr(krylov, "SEED", seed)
        assert 0.75 <= krylov.bounds(gram).norm <= 1 + 1e-12


# The subspaces


def test_no_convergence_in_one_step_is_admitted_and_the_space_is_never_more_than_whole(monkeypatch, calls_of):
    gram, calls = host("gaussian", 60, 50)[0], calls_of(krylov, "block_lanczos")
    for rank in (1, 8, 20):
        found(gram, rank, eps=1e-300)
    assert max(block.shape[1] * steps for _, block, steps, *_ in calls) <= 50
    monkeypatch.setattr(krylov, "MOST_STEPS", 1)
    assert found(host("gaussian", 150, 140)[0]) is None


@pytest.mark.parametrize(
    "guesses", [(0.5, 1.5, 0.9), (1.5, 0.5, 0.0), (1.5, 1.2, 0.8), (2.0, 1.5, 1.1)], ids=str
)
def test_a_shift_that_is_too_high_is_lowered(guesses, calls_of):
    """Shifts in units of the smallest eigenvalue; nothing is found without a factor."""
    gram, exact, values = host("gaussian", 200, 140)
    limits = krylov.Bounds(values[-1], tuple(guess * values[0] for guess in guesses))
    tried = calls_of(gram, "factor")
    pairs = found(gram, limits=limits)
    good = [index for index, guess in enumerate(guesses) if guess < 1]
    assert [shift for (shift,) in tried] == list(limits.shifts[: good[0] + 1 if good else 3])
    if good:
        assert_smallest(pairs, exact)
    else:
        assert pairs is None
