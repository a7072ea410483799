"""``minor_subspace``: the left singular vectors of a weight that have the smallest singular values."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from mica.dtypes import FLOATING
from mica.memory import in_memory
from mica.subspace.candidate import Problem, judge
from mica.subspace.device import batch_size, is_on_host, try_batch
from mica.subspace.gram import extremes
from mica.subspace.host import HostGram
from mica.subspace.methods import BY, chain
from mica.subspace.result import MinorSubspace, move
from mica.subspace.threads import one_pool

# Sums of fourth powers of entries between 2^-200 and 2^200 stay within fp64's range. All entries in fp32 are
# between these limits: they range from 2^-149 to 2^128.
SMALLEST = 2.0**-200
LARGEST = 2.0**200

# A context without autocast, under which fp32 products would have 16 bits: C off by 2e-3, not 1e-7.
no_autocast = torch._C._DisableAutocast


@torch.no_grad()
def minor_subspace(weight: Tensor, rank: int) -> MinorSubspace:
    """The ``rank`` left singular vectors of ``weight`` with the smallest singular values (arXiv 2604.01694).

    The definition is ``torch.linalg.svd(weight, full_matrices=False).U[..., -rank:]``, here in fp64
    arithmetic and from a partial eigenproblem in place of the whole SVD. For an embedding pass ``weight.T``.
    Of the ways to it (``methods``) the fastest one for this shape, rank and device is tried first, and the
    next one if its result is not certified.

    Args:
        weight: The matrix, (out_features, in_features), in fp64, fp32, bf16 or fp16 and with any strides. It
            is not modified.
        rank: The number of vectors, between 1 and min(out_features, in_features).

    Returns:
        The basis (out_features, rank), its singular values, and what is proven of them.

    Raises:
        TypeError: ``weight`` is not a tensor, not dense, or not of one of the four dtypes; or ``rank`` is not
            an int.
        ValueError: ``weight`` has not two dimensions, is empty, is on the meta device or is not finite, or
            the largest entry of an fp64 matrix is beyond 2^±200; or ``rank`` is out of range.

    Warns:
        UserWarning: Singular values of a tall weight among the requested ones are zero; their vectors are an
            orthonormal completion, which the weight does not determine. Or no method's result could be
            proven.
    """
    _check_weight(weight)
    _check_rank(weight, rank)
    check_entries(weight)
    (result,) = solve_stack(weight.unsqueeze(0), rank)
    for message in warnings_about(result, f"a weight of shape {tuple(weight.shape)}"):
        warnings.warn(message, UserWarning, stacklevel=3)  # past the frame that the no_grad decorator adds
    return move(result, weight.device)


def warnings_about(result: MinorSubspace, name: str) -> list[str]:
    """The warnings that a result deserves, as sentences, which call the weight so, such as "layer 'up'"."""
    rank = result.basis.shape[-1]
    messages = []
    if result.null_count:
        messages.append(
            f"{result.null_count} of the {rank} smallest singular values of {name} are numerically null; "
            "their left singular vectors are an arbitrary orthonormal completion."
        )
    if not result.certified:
        messages.append(
            f"the minor subspace of {name} is not proven to be minor (method {result.method!r}, "
            f"energy at most {result.energy_excess:.1e} above the smallest possible)."
        )
    return messages


@torch.no_grad()
def solve_stack(weights: Tensor, rank: int) -> list[MinorSubspace]:
    """``minor_subspace`` of each matrix of a stack, without its checks and warnings.

    Matrices that an accelerator cannot settle are solved on the host, and their results lie there.

    Args:
        weights: The matrices, (count, out_features, in_features), finite, on one device.
        rank: The number of vectors, at most min(out_features, in_features).
    """
    matrices = in_memory(weights.detach())
    with no_autocast():
        results = [None] * len(matrices)
        if not is_on_host(matrices.device):
            results = []
            for batch in matrices.split(batch_size(*matrices.shape[-2:], matrices.device)):
                results += try_batch(batch, rank)
        for index, result in enumerate(results):
            if result is None:
                results[index] = solve_matrix(matrices[index].cpu(), rank)
        return results


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, but got {type(weight).__name__}.")
    if weight.layout is not torch.strided or weight.is_nested:
        layout = "a nested one" if weight.is_nested else f"layout {weight.layout}"
        raise TypeError(f"weight must be a dense tensor, but got {layout}.")
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"weight must be of dtype float64, float32, bfloat16 or float16, but got {weight.dtype}."
        )
    if weight.ndim != 2:
        raise ValueError(
            f"weight must have the shape (out_features, in_features), but got {tuple(weight.shape)}."
        )
    if weight.device.type == "meta":
        raise ValueError("weight must hold data, but got a tensor on the meta device; load the weight first.")
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, but got shape {tuple(weight.shape)}.")


def _check_rank(weight: Tensor, rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, but got {rank!r} of type {type(rank).__name__}.")
    limit = min(weight.shape)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank must be between 1 and min(out_features, in_features) = {limit} for a weight of shape "
            f"{tuple(weight.shape)}, but got {rank!r}."
        )


@one_pool()
def check_entries(weight: Tensor) -> None:
    """Raise ValueError unless a weight is finite and its fourth powers are within fp64's range.

    By one thread: after a look by two, PyTorch's threads spin while BLAS computes the Gram (of 576 x 576 in
    10 instead of 3 ms on two cores).

    Args:
        weight: (out_features, in_features), of one of the four dtypes.
    """
    magnitude = extremes(weight).double().abs().max().item()  # NaN if any entry is
    if not math.isfinite(magnitude):
        count = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"weight must be finite, but got {count} NaN or infinite of {weight.numel()} entries."
        )
    if magnitude and not SMALLEST <= magnitude <= LARGEST:
        raise ValueError(
            f"the largest entry of weight must be between 2**-200 and 2**200 in magnitude, or 0, but it is "
            f"{magnitude:.1e}: scale the weight, which changes no singular vector."
        )


def solve_matrix(weight: Tensor, rank: int) -> MinorSubspace:
    """Solve one matrix on the CPU by the first method whose result is certified, else by the last one.

    Args:
        weight: The matrix, (out_features, in_features), finite, on the CPU.
        rank: The number of vectors.
    """
    names = chain(min(weight.shape), rank)
    with one_pool():
        state = Problem(weight, HostGram, rank)

    for name in names:
        triplets = BY[name](state)
        if triplets is None:
            continue
        with one_pool():
            judgement = judge(state, triplets)
        if judgement.certified:
            break

    return judgement.result(name)
