"""What a MiCA layer is, as plainly as it can be said: every path and every test is compared with this.

    y  = x Wᵀ + bias + s·(drop(x) Aᵀ) Bᵀ    W (N×K) and B (N×r) frozen, A (r×K) trained
    g  = s·dy B                             (M×r)
    dA = gᵀ drop(x)                         (r×K)
    dx = dy W + mask⊙(g A)                  (M×K)

M tokens, K in_features, N out_features, r rank, s scaling = lora_alpha / r. drop(x) = mask⊙x, where the mask
is keep / (1 − p) for a dropout of p, and 1 without. There is no dB, and h = drop(x) Aᵀ need not be kept: the
backward needs x only. Source: MiCA, arXiv 2604.01694, on LoRA's layer, arXiv 2106.09685.

On a stack of experts it is the same, expert by expert: W (E×N×K), B (E×N×r), A (E×r×K), bias (E×N). The rows
of x (S×K) are sorted by expert. Those of expert e reach from offsets[e-1] to offsets[e] (E ends), and a token
of k experts has k rows. y and dx of rows after the last offset are 0, and so is dA of an expert without rows.

All operands have one floating-point dtype. Nothing here is fast, and nothing in the product calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | float = 0.0,
    mask: Tensor | float = 1.0,
) -> Tensor:
    """y (..., N) from x (..., K); mask: shape of x."""
    h = (mask * x) @ lora_A.T
    return x @ weight.T + bias + scaling * (h @ lora_B.T)


def linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(dx (..., K), dA (r×K)) from dy (..., N)."""
    g = scaling * (grad_output @ lora_B)
    grad_x = grad_output @ weight + mask * (g @ lora_A)
    grad_A = torch.einsum("...r,...k->rk", g, mask * x)
    return grad_x, grad_A


def experts_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor,
) -> Tensor:
    """y (S×N) from x (S×K)."""
    y = x.new_zeros(len(x), weight.shape[1])
    for expert, rows in rows_of(offsets):
        y[rows] = linear(x[rows], weight[expert], lora_A[expert], lora_B[expert], scaling, bias[expert])
    return y


def experts_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """(dx (S×K), dA (E×r×K)) from dy (S×N)."""
    grad_x = torch.zeros_like(x)
    grad_A = torch.zeros_like(lora_A)
    for expert, rows in rows_of(offsets):
        operands = weight[expert], lora_A[expert], lora_B[expert], scaling
        grad_x[rows], grad_A[expert] = linear_backward(grad_output[rows], x[rows], *operands)
    return grad_x, grad_A


def rows_of(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert and its rows."""
    for expert, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        yield expert, slice(start, end)
