"""The singular values of one weight: the largest, or all. The solver needs neither."""

from __future__ import annotations

import torch

from mica.subspace import krylov
from mica.subspace.batched import BatchGram
from mica.subspace.device import is_on_host
from mica.subspace.gram import row_blocks
from mica.subspace.host import HostGram
from mica.subspace.threads import one_pool

# min(out_features, in_features) up to which `spectrum` uses the SVD; beyond it uses the Gram matrix.
LARGEST_SVD = 2048

# Lanczos steps for σ_max. Random matrices, whose largest singular values crowd, need most: with 60 steps a
# 2048 x 2048 one is 3e-10 short.
_STEPS = 60


def _tall(weight: torch.Tensor) -> torch.Tensor:
    """The weight as (long, short), a view, on a device with fp64."""
    weight = weight.detach()
    if is_on_host(weight.device):
        weight = weight.cpu()
    if weight.shape[0] >= weight.shape[1]:
        return weight
    return weight.T


def _gram(tall: torch.Tensor) -> HostGram | BatchGram:
    if is_on_host(tall.device):
        return HostGram(tall)
    return BatchGram(tall.unsqueeze(0))


@torch.no_grad()
def sigma_max(weight: torch.Tensor) -> float:
    """σ_max of a finite (out_features, in_features) weight, to about 1e-9, from below."""
    with one_pool():
        return krylov.norm(_gram(_tall(weight)), 0, _STEPS).sqrt().item()


@torch.no_grad()
def squared_norm(weight: torch.Tensor) -> float:
    """‖weight‖_F² of a (out_features, in_features) weight, summed in fp64."""
    return sum(block.square().sum().item() for _, block in row_blocks(_tall(weight)))


@torch.no_grad()
def spectrum(weight: torch.Tensor) -> torch.Tensor:
    """All singular values of a finite (out_features, in_features) weight: descending, fp64 on the CPU.

    For min(out_features, in_features) <= 2048 they have fp64's precision: they come from `svdvals` of the
    tall orientation, or of the triangle R of a streamed QR decomposition where that is less than half as
    long. For larger weights they are roots of the eigenvalues of the Gram matrix, which show σ only down to
    about 1e-7 σ_max: smaller ones are raised to that resolution, √(4 √n ε₆₄) σ_max.
    """
    tall = _tall(weight)
    long_features, short_features = tall.shape
    if short_features > LARGEST_SVD:
        with one_pool():
            eigenvalues = _gram(tall).eigenvalues().flatten().flip(0).cpu()
        floor = krylov.resolution(short_features, eigenvalues[0].item())
        return eigenvalues.clamp_min(floor).sqrt()

    if long_features > 2 * short_features:
        tall = _triangle(tall)
    return torch.linalg.svdvals(tall.double()).cpu()


def _triangle(tall: torch.Tensor) -> torch.Tensor:
    """R, (short, short) fp64, of the QR decomposition of ``tall``: the same singular values."""
    short_features = tall.shape[1]
    triangle = torch.empty(0, short_features, dtype=torch.float64, device=tall.device)
    for block in tall.split(2 * short_features):  # a block costs a QR of 3/2 of its rows
        triangle = torch.linalg.qr(torch.cat([triangle, block.double()]), mode="r").R
    return triangle
