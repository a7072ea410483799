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


@torch.no_grad()
def basis_by_eigh(weight: Tensor, rank: int) -> Tensor:
    """The left singular vectors of a weight with the smallest singular values, fp32 (out_features, rank)."""
    exact = weight.double()
    is_tall = weight.shape[0] > weight.shape[1]
    if is_tall:
        gram = exact.T @ exact
    else:
        gram = exact @ exact.T
    values, vectors = torch.linalg.eigh(gram)
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
