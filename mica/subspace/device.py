"""Weights of one shape on an accelerator, as many at a time as the memory allows."""

from __future__ import annotations

import torch
from torch import Tensor

from mica.subspace import krylov
from mica.subspace.batched import BatchGram
from mica.subspace.candidate import Problem, judge
from mica.subspace.methods import BY
from mica.subspace.result import MinorSubspace

# Devices whose weights the host solves: MPS has no fp64.
ON_HOST = ("cpu", "mps")

# The most weights of one shape in a batch. For more than 8, cuBLAS takes other routines.
MOST_AT_ONCE = 8

# From this short side on, weights are solved one by one: for a batch of more than one matrix PyTorch calls
# cuSOLVER's batched Cholesky, which is meant for small ones (n <= 256), and one large matrix fills a device.
# That is a reading of their code: no device has been timed.
ALONE_FROM = 1536

# The share of the free memory that a batch may take.
SHARE_OF_FREE = 0.25

# Bytes, for a device that does not tell how much memory is free.
FREE_UNKNOWN = 1 << 30

# (n, n) fp64 matrices that exist at once: the Gram, a shifted copy and its factor, then the factor and its
# inverse; and the basis of the Krylov subspaces, which is no larger. For n = 2600 and 16 vectors it is 3.6.
_MATRICES_AT_A_TIME = 4


def is_on_host(device: torch.device) -> bool:
    """Whether weights on this device are solved on the CPU."""
    return device.type in ON_HOST


def batch_size(out_features: int, in_features: int, device: torch.device) -> int:
    """How many weights of one shape are solved at once; at least one.

    Args:
        out_features, in_features: The shape of each weight.
        device: The device on which they are solved, whose free memory is looked at.
    """
    if min(out_features, in_features) >= ALONE_FROM:
        return 1
    weights = 2 * 4 * out_features * in_features  # one by one, and stacked
    each = weights + _MATRICES_AT_A_TIME * 8 * min(out_features, in_features) ** 2
    fitting = int(SHARE_OF_FREE * free_memory(device)) // each
    return max(1, min(MOST_AT_ONCE, fitting))


def free_memory(device: torch.device) -> int:
    """Free bytes on ``device``, including those that PyTorch holds for tensors to come."""
    module = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return FREE_UNKNOWN
    held = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + held


def try_batch(matrices: Tensor, rank: int) -> list[MinorSubspace | None]:
    """The results of a batch on its device, without those that have to be left to the host.

    Args:
        matrices: The weights, (batch, out_features, in_features), on one accelerator.
        rank: The number of vectors.

    Returns:
        One result for each matrix; None in place of those that are not certified, and of tall ones that are
        numerically null.
    """
    size = min(matrices.shape[-2:])
    if 4 * rank > 3 * size:
        return [None] * len(matrices)
    name = batch_method(size, rank)
    results = _attempt(matrices, rank, name)
    if len(matrices) > 1:
        for index, result in enumerate(results):
            if result is None:  # another one of the batch may have made it fail
                results[index] = _attempt(matrices[index : index + 1], rank, name)[0]
    return results


def batch_method(size: int, rank: int) -> str:
    """How a batch of Gram matrices (size, size) is solved."""
    return "krylov" if krylov.fits(size, rank) else "gram"


def _attempt(matrices: Tensor, rank: int, name: str) -> list[MinorSubspace | None]:
    """The result of each matrix by that method; None where it fails or is not certified."""
    state = Problem(matrices, BatchGram, rank)
    triplets = BY[name](state)
    if triplets is None:
        return [None] * len(matrices)
    judgement = judge(state, triplets)
    return [
        judgement.result(name, index) if is_certified else None
        for index, is_certified in enumerate(judgement.certified.tolist())
    ]
