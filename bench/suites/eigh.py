"""The peers' way to a minor subspace: all eigenvectors of the smaller Gram matrix, in fp64.

Unsloth 2026.10.9 initialises MiCA so (its models/lora_init.py). This is the same mathematics, written anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

import mica.fast

# Eigenvalues below this share of the largest are lost in the Gram's rounding.
_LOST = 1e-12


def _smaller_gram(exact: Tensor) -> Tensor:
    """Of the smaller side of a matrix."""
    is_tall = exact.shape[0] > exact.shape[1]
    if is_tall:
        return exact.T @ exact
    return exact @ exact.T


@torch.no_grad()
def least_energy(weight: Tensor, rank: int) -> float:
    """The least that ‖BᵀW‖² can be: the sum of the ``rank`` smallest squares of singular values.

    By all eigenvalues of the Gram matrix in fp64, and by no solver of this package.
    """
    squares = torch.linalg.eigvalsh(_smaller_gram(weight.double()))
    return float(squares[:rank].clamp(min=0.0).sum())


@torch.no_grad()
def basis_by_eigh(weight: Tensor, rank: int) -> Tensor:
    """The left singular vectors of a weight with the smallest singular values, fp32 (out_features, rank)."""
    exact = weight.double()
    is_tall = weight.shape[0] > weight.shape[1]
    values, vectors = torch.linalg.eigh(_smaller_gram(exact))
    if values[0] <= _LOST * values[-1]:
        left, _, _ = torch.linalg.svd(exact, full_matrices=False)
        return left[:, -rank:].float()

    smallest = vectors[:, :rank].flip(1)
    if is_tall:
        smallest = exact @ smallest / values[:rank].flip(0).sqrt()
    return smallest.float()


def mica_init(layer: LoraLayer, adapter_name: str) -> None:
    """PEFT's `LoraLayer.mica_init` of a linear layer, with `basis_by_eigh` in place of the SVD."""
    weight = layer.get_base_layer().weight
    basis = basis_by_eigh(weight, layer.r[adapter_name])
    layer.lora_B[adapter_name].weight.data = basis.to(weight.dtype)
    lora_A = torch.zeros(basis.shape[1], weight.shape[1], device=weight.device)
    layer.lora_A[adapter_name].weight.data = lora_A.to(weight.dtype)


@contextmanager
def peft_with_eigh() -> Iterator[None]:
    """A context in which PEFT creates adapters by `mica_init` above, and this package none."""
    with mica.fast.disabled(), patch.object(LoraLayer, "mica_init", mica_init):
        yield
