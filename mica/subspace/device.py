"""Weights of one shape on an accelerator, as many at a time as the memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch

from mica.subspace import batched, krylov
from mica.subspace.batched import BatchGram, DoubtfulError
from mica.subspace.candidate import judged, problem
from mica.subspace.methods import by_gram, by_krylov
from mica.subspace.result import MinorSubspace

# Devices whose weights the host solves: MPS has no fp64.
ON_HOST = ("cpu", "mps")

# Of one shape at once, in a quarter of the free memory. cuBLAS takes other routines for more than 8.
MOST_AT_ONCE = 8
SHARE_OF_FREE = 0.25

# Bytes, for a device that does not tell.
FREE_UNKNOWN = 1 << 30

# (n, n) fp64 matrices that exist at once: the Gram, a shifted copy and its factor, then that and its
# inverse; and the basis of the Krylov subspaces, which is no larger. n = 2600, 16 vectors: 3.6.
_MATRICES_AT_A_TIME = 4


def is_on_host(device: torch.device) -> bool:
    return device.type in ON_HOST


def batch_size(out_features: int, in_features: int, device: torch.device) -> int:
    """How many weights of that shape are solved at once on ``device``; at least one."""
    weights = 2 * 4 * out_features * in_features  # one by one, and stacked
    each = weights + _MATRICES_AT_A_TIME * 8 * min(out_features, in_features) ** 2
    return max(1, min(MOST_AT_ONCE, int(SHARE_OF_FREE * free_memory(device)) // each))


def free_memory(device: torch.device) -> int:
    """Bytes on ``device``, with those that PyTorch holds for tensors to come."""
    module = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return FREE_UNKNOWN
    held = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + held


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
    chosen = matrices  # no list as index, which would be copied to the device first
    if len(indices) < len(matrices):
        chosen = torch.stack([matrices[index] for index in indices])
    basis_is_long = chosen.shape[-2] > chosen.shape[-1]
    tall = chosen if basis_is_long else chosen.mT
    state = problem(tall, BatchGram(tall, mixed), rank, basis_is_long, seed, name)
    triplets, failed = None, indices
    for state.gram.careful in (False, True):
        with suppress(DoubtfulError):
            triplets = (by_krylov if name == "krylov" else by_gram)(state)
            if triplets is not None or not mixed:
                break
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
