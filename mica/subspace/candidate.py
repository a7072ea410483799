"""From the small eigenvectors of a Gram matrix to a basis as it is returned, and the judgement on it.

Everything here works on one matrix (``HostGram``, no batch dimensions) and on a batch (``BatchGram``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mica.subspace import krylov
from mica.subspace.certificate import ROUNDING, certify
from mica.subspace.gram import image, transposed_image
from mica.subspace.result import NULL_RESOLUTIONS, MinorSubspace, is_certified


class Problem:
    """One weight, or a batch of them, as the methods see it: its tall view and the Gram matrix of that.

    Args:
        weight: One matrix (out_features, in_features), or a batch (batch, out_features, in_features).
        gram_of: The class of the Gram matrix, ``HostGram`` for one matrix or ``BatchGram`` for a batch. It is
            called with the tall view (..., long, short).
        rank: The number of vectors that are requested.
    """

    def __init__(self, weight: Tensor, gram_of: Callable[[Tensor], object], rank: int):
        self.basis_is_long = weight.shape[-2] > weight.shape[-1]  # the requested vectors are on the long side
        self.tall = weight if self.basis_is_long else weight.mT
        self.gram = gram_of(self.tall)
        self.rank = rank
        self.dtype = torch.promote_types(weight.dtype, torch.float32)  # the result's


class Candidate(NamedTuple):
    """Singular triplets in fp64, as a method has found them.

    Attributes:
        basis: The requested vectors, (batch, out_features, rank); one matrix has no batch dimension.
        short_vectors: The same triplets' vectors on the short side of the weight, (batch, short, rank).
        singular_values: Their singular values in descending order, (batch, rank).
        norm: The norm ‖C‖ of the Gram matrix C, or up to a quarter less, (batch) on the host.
        resolved: Whether the Gram matrix alone shows energies as precisely as the result's dtype does.
        null_count: How many of the vectors the weight does not determine, as in ``MinorSubspace``.
    """

    basis: Tensor
    short_vectors: Tensor
    singular_values: Tensor
    norm: Tensor
    resolved: bool = False
    null_count: int = 0


class Judged(NamedTuple):
    """A basis as it is returned, and what is proven of it.

    Attributes:
        basis: The vectors, (batch, out_features, rank), in the result's dtype and with their signs fixed.
        singular_values, certified, energy_excess, resolution: As in ``MinorSubspace``, each with the batch
            dimension in front.
        null_count: As in ``MinorSubspace``, the same for the whole batch.
    """

    basis: Tensor
    singular_values: Tensor
    certified: Tensor
    energy_excess: Tensor
    resolution: Tensor
    null_count: int

    def result(self, method: str, index=...) -> MinorSubspace:
        """The result for the matrix at ``index`` of the batch."""
        return MinorSubspace(
            basis=self.basis[index],
            singular_values=self.singular_values[index].to(self.basis.dtype),
            method=method,
            certified=bool(self.certified[index]),
            energy_excess=self.energy_excess[index].item(),
            resolution=self.resolution[index].item(),
            null_count=self.null_count,
        )


def candidate(problem: Problem, values: Tensor, vectors: Tensor, norm: Tensor) -> Candidate | None:
    """The singular triplets of the weight from eigenpairs of its Gram matrix.

    ``values`` (batch, rank), on the host, ascend; ``vectors`` are (batch, short, rank), orthonormal;
    ``norm`` is as in `Candidate`.

    With A the tall view and X the vectors, A X = P S Qᵀ: the columns of X Q and of P are the singular vectors
    on the short and on the long side. P is orthonormal however ill-conditioned A X is, and S keeps the digits
    that the square roots of the Gram's eigenvalues have lost. Where none are lost, S are these roots, Q is I,
    and P = A X S⁻¹ is orthonormal to the precision of the result.

    Returns None where a requested singular value of a tall weight is numerically null: the Gram does not show
    its vector.
    """
    gram = problem.gram
    smallest = values[..., 0]
    floor = krylov.resolution(gram.size, norm)
    if problem.basis_is_long and (smallest <= NULL_RESOLUTIONS * floor).any():
        return None

    unresolved = smallest * torch.finfo(problem.dtype).eps / 2 < floor
    resolved = not unresolved.any()
    if resolved:
        vectors = vectors.flip(-1)
        singular_values = values.flip(-1).sqrt().to(gram.device)
        basis = vectors
        if problem.basis_is_long:
            basis = image(problem.tall, vectors) / singular_values.unsqueeze(-2)
        return Candidate(basis, vectors, singular_values, norm, resolved)

    long_vectors, singular_values, rotation = gram.svd(image(problem.tall, vectors))
    short_vectors = gram.combine(vectors, rotation.mT)
    basis = long_vectors if problem.basis_is_long else short_vectors
    return Candidate(basis, short_vectors, singular_values, norm)


def judge(problem: Problem, triplets: Candidate) -> Judged:
    """Cast a candidate, fix its signs, and judge it as it will be returned, rounded to its dtype.

    Args:
        problem: The problem that the candidate solves; its Gram matrix's factor is overwritten.
        triplets: The candidate.
    """
    rounded = triplets.basis.to(problem.dtype)
    signs = signs_of(rounded)
    basis = (rounded * signs).contiguous()

    rank = problem.rank
    floor = krylov.resolution(problem.gram.size, triplets.norm)
    energy = energy_of(problem, triplets, basis, signs)
    certificate = certify(problem.gram, triplets.short_vectors, triplets.norm, energy)
    (energy,) = certificate.read
    least = (certificate.ritz_sum - certificate.deficit).clamp_min(0)  # proven: Σσ² is at least this
    excess = (energy - least).clamp_min(0)
    reference = torch.maximum(least, rank * floor)
    return Judged(
        basis=basis,
        singular_values=triplets.singular_values,
        certified=certificate.passed & is_certified(excess, least, rank, floor),
        energy_excess=torch.where(reference > 0, excess / reference, 0.0),
        resolution=floor,
        null_count=triplets.null_count,
    )


def signs_of(basis: Tensor) -> Tensor:
    """The sign of each column's entry of largest magnitude (the first one of several): (batch, 1, rank)."""
    return basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True)).sign()


def energy_of(problem: Problem, triplets: Candidate, basis: Tensor, signs: Tensor) -> Tensor:
    """‖weightᵀ basis‖², (batch); an upper bound where it comes from the Gram."""
    if problem.basis_is_long:
        return transposed_image(problem.tall, basis).square().sum((-2, -1))

    gram = problem.gram
    rounded = gram.empty(problem.rank)
    rounded.copy_(basis)
    floor = krylov.resolution(gram.size, triplets.norm)
    unseen = (ROUNDING * floor).to(gram.device)
    if triplets.resolved:
        return (rounded * gram.apply(rounded)).sum((-2, -1)) + problem.rank * unseen

    # The energy of X, the basis before rounding, is Σσ². The Gram is only asked for what rounding to Z
    # changes, tr (Z + X)ᵀ C (Z − X), in which its error is multiplied by no more than ‖Z + X‖ ‖Z − X‖.
    exact = triplets.basis * signs
    change = rounded - exact
    total = rounded + exact
    size = torch.linalg.matrix_norm(change) * torch.linalg.matrix_norm(total)
    difference = (total * gram.apply(change)).sum((-2, -1))
    return triplets.singular_values.square().sum(-1) + difference + size * unseen
