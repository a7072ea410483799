"""From the small eigenvectors of a Gram matrix to a basis as it is returned, and the judgement on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mica.subspace import krylov
from mica.subspace.certificate import ROUNDING, certify
from mica.subspace.gram import image, transposed_image
from mica.subspace.result import NULL_RESOLUTIONS, MinorSubspace, is_certified


class Problem:
    """One weight as the methods see it: its tall view and the Gram matrix of that.

    Args:
        weight: The matrix, (out_features, in_features).
        gram_of: The class of the Gram matrix, ``HostGram`` or ``DeviceGram``. It is called with the tall view
            (long, short).
        rank: The number of vectors that are requested.
    """

    def __init__(self, weight: torch.Tensor, gram_of: Callable[[torch.Tensor], object], rank: int):
        self.basis_is_long = weight.shape[0] > weight.shape[1]  # the requested vectors are on the long side
        self.tall = weight if self.basis_is_long else weight.mT
        self.gram = gram_of(self.tall)
        self.rank = rank
        self.dtype = torch.promote_types(weight.dtype, torch.float32)  # the result's


class Candidate(NamedTuple):
    """Singular triplets in fp64, as a method has found them.

    Attributes:
        basis: The requested vectors, (out_features, rank).
        short_vectors: The same triplets' vectors on the short side of the weight, (short, rank).
        singular_values: Their singular values in descending order, (rank).
        norm: The norm ‖C‖ of the Gram matrix C, or up to a quarter less, on the host.
        resolved: Whether the Gram matrix alone shows energies as precisely as the result's dtype does.
        null_count: How many of the vectors the weight does not determine, as in ``MinorSubspace``.
    """

    basis: torch.Tensor
    short_vectors: torch.Tensor
    singular_values: torch.Tensor
    norm: torch.Tensor
    resolved: bool = False
    null_count: int = 0


def candidate(
    problem: Problem, values: torch.Tensor, vectors: torch.Tensor, norm: torch.Tensor
) -> Candidate | None:
    """The singular triplets of the weight from eigenpairs of its Gram matrix.

    ``values`` (rank), on the host, ascend; ``vectors`` are (short, rank), orthonormal; ``norm`` is as in
    `Candidate`.

    With A the tall view and X the vectors, A X = P S Qᵀ: the columns of X Q and of P are the singular vectors
    on the short and on the long side. P is orthonormal however ill-conditioned A X is, and S keeps the digits
    that the square roots of the Gram's eigenvalues have lost. Where none are lost, S are these roots, Q is I,
    and P = A X S⁻¹ is orthonormal to the precision of the result.

    Returns None where a requested singular value of a tall weight is numerically null: the Gram does not show
    its vector.
    """
    gram = problem.gram
    smallest = values[0]
    floor = krylov.resolution(gram.size, norm)
    if problem.basis_is_long and smallest <= NULL_RESOLUTIONS * floor:
        return None

    resolved = not smallest * torch.finfo(problem.dtype).eps / 2 < floor
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


def judge(problem: Problem, triplets: Candidate, method: str) -> MinorSubspace:
    """Cast a candidate, fix its signs, and judge it as it will be returned, rounded to its dtype.

    Args:
        problem: The problem that the candidate solves; its Gram matrix's factor is overwritten.
        triplets: The candidate.
        method: The name of the method that found it.
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
    is_proven = certificate.passed & is_certified(excess, least, rank, floor)
    return MinorSubspace(
        basis=basis,
        singular_values=triplets.singular_values.to(problem.dtype),
        method=method,
        certified=bool(is_proven),
        energy_excess=torch.where(reference > 0, excess / reference, 0.0).item(),
        resolution=floor.item(),
        null_count=triplets.null_count,
    )


def signs_of(basis: torch.Tensor) -> torch.Tensor:
    """The sign of each column's entry of largest magnitude (the first one of several): (1, rank)."""
    return basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()


def energy_of(
    problem: Problem, triplets: Candidate, basis: torch.Tensor, signs: torch.Tensor
) -> torch.Tensor:
    """‖weightᵀ basis‖²; an upper bound where it comes from the Gram."""
    if problem.basis_is_long:
        return transposed_image(problem.tall, basis).square().sum()

    gram = problem.gram
    rounded = gram.empty(problem.rank)
    rounded.copy_(basis)
    floor = krylov.resolution(gram.size, triplets.norm)
    unseen = (ROUNDING * floor).to(gram.device)
    if triplets.resolved:
        return (rounded * gram.apply(rounded)).sum() + problem.rank * unseen

    # The energy of X, the basis before rounding, is Σσ². The Gram is only asked for what rounding to Z
    # changes, tr (Z + X)ᵀ C (Z − X), in which its error is multiplied by no more than ‖Z + X‖ ‖Z − X‖.
    exact = triplets.basis * signs
    change = rounded - exact
    total = rounded + exact
    size = torch.linalg.matrix_norm(change) * torch.linalg.matrix_norm(total)
    difference = (total * gram.apply(change)).sum()
    return triplets.singular_values.square().sum() + difference + size * unseen
