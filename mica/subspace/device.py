"""Weights of one shape on an accelerator, as many at a time as the memory allows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mica.subspace import batched, krylov
from mica.subspace.batched import BatchGram
from mica.subspace.candidate import judged, problem
from mica.subspace.methods import by_gram, by_krylov
from mica.subspace.result import MinorSubspace

# Devices whose weights the host solves: MPS has no fp64.
ON_HOST = ("cpu", "mps")

# Memory that a batch may use, in bytes, where 3 times the largest fp32 matrix is less.
MEMORY_AT_LEAST = 256 << 20

# (n, n) fp64 matrices that exist at once: the Gram, a shifted copy and its factor, then that and its
# inverse; and the basis of the Krylov subspaces, which is no larger. n = 2600, 16 vectors: 3.6.
_MATRICES_AT_A_TIME = 4


def is_on_host(device: torch.device) -> bool:
    return device.type in ON_HOST


def batch_size(out_features: int, in_features: int, memory: int | None = None) -> int:
    """How many weights of that shape are solved at once in ``memory`` bytes; at least one."""
    short = min(out_features, in_features)
    memory = memory or max(3 * 4 * out_features * in_features, MEMORY_AT_LEAST)
    return max(1, memory // (_MATRICES_AT_A_TIME * 8 * short * short))


def solve_batch(
    matrices: torch.Tensor, rank: int, method: str, strict: bool, seed: int
) -> Iterator[tuple[int, MinorSubspace]]:
    """The certified results (without ``strict``: all) for ``matrices`` (batch, out, in), with their indices.

    What is missing (ill-conditioned weights; numerically null, tall ones) is left to the host.
    """
    out_features, in_features = matrices.shape[-2:]
    size = min(out_features, in_features)
    if method == "svd" or 4 * rank > 3 * size or (method == "krylov" and not krylov.fits(size, rank)):
        return
    name = "krylov" if method != "gram" and krylov.fits(size, rank) else "gram"
    mixed = batched.may_be_mixed(matrices)
    yield from _solved(matrices, list(range(len(matrices))), rank, name, strict, seed, mixed)


def _solved(
    matrices: torch.Tensor, indices: list[int], rank: int, name: str, strict: bool, seed: int, mixed: bool
) -> Iterator[tuple[int, MinorSubspace]]:
    chosen = matrices if len(indices) == len(matrices) else matrices[indices]
    basis_is_long = chosen.shape[-2] > chosen.shape[-1]
    tall = chosen if basis_is_long else chosen.mT
    state = problem(tall, BatchGram(tall, mixed), rank, basis_is_long, seed, name)
    triplets = (by_krylov if name == "krylov" else by_gram)(state)
    failed = indices
    if triplets is not None:
        judgement = judged(state, triplets, strict)
        done = judgement.certified if strict else torch.ones_like(judgement.certified)
        failed = [index for index, good in zip(indices, done.tolist(), strict=True) if not good]
        for position, index in enumerate(indices):
            if done[position]:
                yield index, judgement.result(name, state.resolution[position].item(), position)
    del state, triplets
    if failed and mixed:
        yield from _solved(matrices, failed, rank, name, strict, seed, mixed=False)
    elif failed and len(indices) > 1:  # one of them may have made the others fail
        for index in failed:
            yield from _solved(matrices, [index], rank, name, strict, seed, mixed=False)
