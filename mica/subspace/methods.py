"""The ways to a candidate, in the order of falling back, and which one to start with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mica.subspace import krylov
from mica.subspace.candidate import Candidate, Problem, candidate
from mica.subspace.threads import one_pool

# Up to this n = min(out_features, in_features), LAPACK's partial eigensolver is at least as fast on the CPU
# as Krylov subspaces (16 vectors, one thread, the whole solution: 150 real weights with n = 576 take 4.7
# against 8.1 s, 768 x 3072 77 against 93 ms, but 1024 x 4096 172 against 161, 1024 x 1024 122 against 87).
SMALL = 1000

# It is also faster where n is less than this many times the width of the Krylov blocks (2 threads: 2048 x
# 4096, 128 vectors, 24 times: 681 against 912 ms; 4096 x 4096, 256 vectors, 25 times: 4.7 against 3.6 s).
BLOCKS = 25


@one_pool()
def by_krylov(problem: Problem) -> Candidate | None:
    """By block Krylov subspaces; None where they are too large for the matrix or do not converge."""
    if not krylov.fits(problem.gram.size, problem.rank):
        return None
    limits = krylov.bounds(problem.gram)
    eps = torch.finfo(problem.dtype).eps
    pairs = krylov.smallest_eigenpairs(problem.gram, problem.rank, limits, eps)
    if pairs is None:
        return None
    return candidate(problem, *pairs, limits.norm)


@one_pool()
def by_gram(problem: Problem) -> Candidate | None:
    """By LAPACK's eigensolvers on the Gram matrix."""
    return candidate(problem, *problem.gram.smallest(problem.rank))


def by_svd(problem: Problem) -> Candidate:
    """By the whole fp64 SVD of the tall view, which for a wide weight is 1.9 to 2.9 times as fast as its own.

    Where singular values are zero, LAPACK's long vectors are an orthonormal completion.
    """
    tall = problem.tall
    rank = problem.rank
    long_vectors, singular_values, short_vectors = torch.linalg.svd(tall.double(), full_matrices=False)
    norm = singular_values[0].square()
    noise = tall.shape[0] * torch.finfo(torch.float64).eps * singular_values[0]
    singular_values = singular_values[-rank:]
    short_vectors = short_vectors[-rank:].T
    if not problem.basis_is_long:
        return Candidate(short_vectors, short_vectors, singular_values, norm)
    null_count = int((singular_values <= noise).sum())
    return Candidate(long_vectors[:, -rank:], short_vectors, singular_values, norm, null_count=null_count)


BY: dict[str, Callable[[Problem], Candidate | None]] = {
    "krylov": by_krylov,
    "gram": by_gram,
    "svd": by_svd,
}


def chain(size: int, rank: int) -> list[str]:
    """The names of the methods to try on the host, the fastest one for this size and rank first.

    Args:
        size: The side of the Gram matrix, min(out_features, in_features).
        rank: The number of vectors.
    """
    names = list(BY)
    if size > max(SMALL, BLOCKS * krylov.block_size(rank)):
        return names
    return names[names.index("gram") :]
