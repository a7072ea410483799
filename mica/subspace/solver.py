"""``minor_subspace``: the left singular vectors of a weight that have the smallest singular values."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch

from mica.dtypes import FLOATING
from mica.memory import in_memory
from mica.subspace.candidate import judged, problem
from mica.subspace.device import batch_size, is_on_host, solve_batch
from mica.subspace.gram import extremes
from mica.subspace.host import HostGram
from mica.subspace.methods import BY, METHODS, chain
from mica.subspace.result import MinorSubspace
from mica.subspace.threads import one_pool

# Sums of fourth powers of entries between 2^-200 and 2^200 stay within fp64's range. All entries in fp32 are
# between these limits: they range from 2^-149 to 2^128.
LARGEST_EXPONENT = 200


@torch.no_grad()
def minor_subspace(
    weight: torch.Tensor, rank: int, *, method: str = "auto", strict: bool = True, seed: int = 0
) -> MinorSubspace:
    """The ``rank`` left singular vectors of ``weight`` with the smallest singular values (arXiv 2604.01694).

    The definition is ``torch.linalg.svd(weight, full_matrices=False).U[..., -rank:]``, here in fp64
    arithmetic and, by default, from a partial eigenproblem in place of the whole SVD. For an embedding
    pass ``weight.T``.

    Args:
        weight: (..., out_features, in_features), fp64, fp32, bf16 or fp16, any strides; it is not modified.
        rank: between 1 and min(out_features, in_features).
        method: where to start; each falls back to the next one if its result is not certified.
            "krylov": block Krylov subspaces of the shifted inverse of the fp64 Gram matrix;
            "gram": LAPACK's partial eigensolver on that Gram matrix;
            "svd": whole fp64 SVD, the definition;
            "auto": the fastest for this shape, rank and device.
        strict: prove the result by an inertia test, which costs one Cholesky factorisation. Without it
            nothing is certified, nothing falls back, and ``energy_excess`` is an estimate.
        seed: of the random vectors that the Krylov subspaces start from.

    Raises:
        TypeError: weight is not a tensor, not dense, or not of one of the four dtypes; rank or seed is not
            an int.
        ValueError: weight has less than 2 dimensions, is empty, on the meta device or not finite; rank or
            seed is out of range; method is unknown.

    Warns:
        UserWarning: singular values of a tall weight among the requested ones are zero; their vectors are an
            orthonormal completion, which the weight does not determine. Or: strict, and no method's result
            could be proven.
    """
    result = _assembled(solve_each(weight, rank, method=method, strict=strict, seed=seed), weight)
    for message in warnings_about(result, f"a weight of shape {tuple(weight.shape)}", strict):
        warnings.warn(message, UserWarning, stacklevel=3)  # past the frame that the no_grad decorator adds
    return result


def warnings_about(result: MinorSubspace, name: str, strict: bool = True) -> list[str]:
    """The warnings that a result deserves, in sentences that call the weight ``name``."""
    rank = result.basis.shape[-1]
    messages = []
    if result.null_count:
        messages.append(
            f"{result.null_count} of the {rank} smallest singular values of {name} are numerically null; "
            "their left singular vectors are an arbitrary orthonormal completion."
        )
    if strict and not result.certified:
        messages.append(
            f"the minor subspace of {name} is not proven to be minor (method {result.method!r}, "
            f"energy at most {result.energy_excess:.1e} above the smallest possible)."
        )
    return messages


@torch.no_grad()
def solve_each(
    weight: torch.Tensor,
    rank: int,
    *,
    method: str = "auto",
    strict: bool = True,
    seed: int = 0,
) -> list[MinorSubspace]:
    """``minor_subspace`` of each matrix of a batch, row-major, without the warnings (``warnings_about``).

    Matrices that an accelerator cannot settle are solved on the host, and their results lie there.
    """
    _check_weight(weight)
    _check_rank(weight, rank)
    _check_seed(seed)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, but got {method!r}.")

    matrices = in_memory(weight.detach())
    if matrices.ndim != 3:
        matrices = matrices.reshape(-1, *weight.shape[-2:])
    try:
        with without_autocast(matrices.device.type):
            return _solved(matrices, rank, method, strict, seed)
    except _NotFiniteError as error:
        count = weight.numel() - int(torch.isfinite(weight).sum())
        raise ValueError(
            f"weight must be finite, but got {count} NaN or infinite of {weight.numel()} entries."
        ) from error


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context without autocast, under which fp32 products would have 16 bits: C off by 2e-3, not 1e-7."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class _NotFiniteError(ArithmeticError):
    """A weight has a NaN or infinite entry."""


def _solved(matrices: torch.Tensor, rank: int, method: str, strict: bool, seed: int) -> list[MinorSubspace]:
    """Results for ``matrices`` (batch, out, in), on an accelerator where they lie there, else on the host."""
    results: dict[int, MinorSubspace] = {}
    if not is_on_host(matrices.device) and max(map(abs, _exponents(matrices))) <= LARGEST_EXPONENT:
        size = batch_size(*matrices.shape[-2:], matrices.device)
        for start in range(0, len(matrices), size):
            for index, result in solve_batch(matrices[start : start + size], rank, method, strict, seed):
                results[start + index] = result

    for index in range(len(matrices)):
        if index not in results:
            results[index] = _solve_on_host(matrices[index].cpu(), rank, method, strict, seed)
    return [results[index] for index in range(len(matrices))]


def _check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch.Tensor, but got {type(weight).__name__}.")
    if weight.layout is not torch.strided or weight.is_nested:
        layout = f"layout {weight.layout}"
        if weight.is_nested:
            layout = "a nested one"
        raise TypeError(f"weight must be a dense tensor, but got {layout}.")
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"weight must be of dtype float64, float32, bfloat16 or float16, but got {weight.dtype}."
        )
    if weight.ndim < 2:
        raise ValueError(
            f"weight must have the shape (..., out_features, in_features), but got {tuple(weight.shape)}."
        )
    if weight.device.type == "meta":
        raise ValueError("weight must hold data, but got a tensor on the meta device; load the weight first.")
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, but got shape {tuple(weight.shape)}.")


def _check_rank(weight: torch.Tensor, rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, but got {rank!r} of type {type(rank).__name__}.")
    limit = min(weight.shape[-2:])
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank must be between 1 and min(out_features, in_features) = {limit} for a weight of shape "
            f"{tuple(weight.shape)}, but got {rank!r}."
        )


def _check_seed(seed: int) -> None:
    """A seed must be what PyTorch's generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, but got {seed!r} of type {type(seed).__name__}.")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be at least -2**63 and below 2**64, but got {seed}.")


def _exponents(matrices: torch.Tensor) -> list[int]:
    """For each matrix, the least e with all entries below 2^e in magnitude."""
    limits = torch.stack([extremes(matrix) for matrix in matrices]).double().cpu()
    if not torch.isfinite(limits).all():
        raise _NotFiniteError
    return [math.frexp(largest)[1] for largest in limits.abs().amax(-1).tolist()]


def _solve_on_host(weight: torch.Tensor, rank: int, method: str, strict: bool, seed: int) -> MinorSubspace:
    """One matrix, on the CPU, by the first method whose result is certified, else by the last one."""
    basis_is_long = weight.shape[0] > weight.shape[1]
    tall = weight if basis_is_long else weight.T
    names = chain(method, min(weight.shape), rank)
    with one_pool():
        gram = HostGram(tall)
        scale = _needed_scale(weight, gram)
        if scale != 1:
            tall = tall * scale
            gram = HostGram(tall)
        state = problem(tall, gram, rank, basis_is_long, seed, names[0])

    for name in names:
        triplets = BY[name](state)
        if triplets is None:
            continue
        with one_pool():
            judgement = judged(state, triplets, strict)
        if judgement.certified or not strict:
            break

    judgement = judgement._replace(singular_values=judgement.singular_values / scale)
    return judgement.result(name, _unscaled(state.resolution.item(), scale))


def _needed_scale(weight: torch.Tensor, gram: HostGram) -> float:
    """The power of two to multiply a weight by so that fourth powers of its entries fit fp64; as a rule 1.

    The Gram shows whether a pass over the weight is worthwhile: only then are there NaN or infinite entries,
    for which `_NotFiniteError` is raised, or entries whose fourth powers leave the range.
    """
    if 2.0 ** (-2 * LARGEST_EXPONENT) <= gram.largest_diagonal <= 2.0 ** (2 * LARGEST_EXPONENT):
        return 1.0
    (exponent,) = _exponents(weight.unsqueeze(0))
    if abs(exponent) <= LARGEST_EXPONENT:
        return 1.0
    return 2.0 ** max(-1000, min(1000, -exponent))


def _unscaled(resolution: float, scale: float) -> float:
    """``resolution`` / scale², kept within the range of fp64, which it leaves for weights beyond 1e±154."""
    unscaled = resolution / scale / scale
    if resolution == 0 or scale == 1:
        return unscaled
    limits = torch.finfo(torch.float64)
    return min(max(unscaled, limits.tiny), limits.max)


def _assembled(results: list[MinorSubspace], weight: torch.Tensor) -> MinorSubspace:
    """The results of a weight's matrices as one, in the weight's shape and on its device."""
    basis = torch.stack([result.basis.to(weight.device) for result in results])
    singular_values = torch.stack([result.singular_values.to(weight.device) for result in results])
    names = list(BY)
    return MinorSubspace(
        basis=basis.reshape(*weight.shape[:-1], -1),
        singular_values=singular_values.reshape(*weight.shape[:-2], -1),
        method=max((result.method for result in results), key=names.index),
        certified=all(result.certified for result in results),
        energy_excess=max(result.energy_excess for result in results),
        resolution=max(result.resolution for result in results),
        null_count=max(result.null_count for result in results),
    )
