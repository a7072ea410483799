"""What an adapted layer is, as plainly as it can be said: every path and every test is compared with this.

    h  = s·drop(x) Aᵀ                       (M×r)
    y  = x Wᵀ + bias + h Bᵀ                 W (N×K) frozen, A (r×K) and B (N×r)
    g  = s·dy B                             (M×r)
    dA = gᵀ drop(x)                         (r×K)
    dB = dyᵀ h                              (N×r)
    dx = dy W + mask⊙(g A)                  (M×K)

M tokens, K in_features, N out_features, r rank, s scaling = lora_alpha / r. drop(x) = mask⊙x, where the mask
is keep / (1 − p) for a dropout of p, and 1 without. LoRA (arXiv 2106.09685) trains A and B. MiCA (arXiv
2604.01694) trains A: there is no dB, and h need not be kept, as the backward needs x only. LoRA-FA (arXiv
2308.03303) trains B: the backward needs h only.

On a stack of experts it is the same, expert by expert: W (E×N×K), B (E×N×r), A (E×r×K), bias (E×N). The rows
of x (S×K) are sorted by expert. Those of expert e reach from offsets[e-1] to offsets[e] (E ends), and a token
of k experts has k rows. y and dx of rows after the last offset are 0, and so are dA and dB of an expert
without rows.

The functions compute y, and PyTorch's autograd the gradients. All operands have one floating-point dtype.
"""

from __future__ import annotations

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
    h = scaling * ((mask * x) @ lora_A.T)
    return x @ weight.T + bias + h @ lora_B.T


def dora(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    bias: Tensor | float = 0.0,
    mask: Tensor | float = 1.0,
) -> Tensor:
    """y of a layer with DoRA (arXiv 2402.09353), with the dropout of PEFT's; a row without a norm has g = 1.

    g = magnitude / n, and n, the norms of the rows of W + s·B·A, is a constant.
    """
    norms = (weight + scaling * lora_B @ lora_A).norm(dim=1).detach()
    g = torch.where(norms == 0, 1.0, magnitude / torch.where(norms == 0, 1.0, norms))
    z = linear(mask * x, weight, lora_A, lora_B, scaling)
    return linear(x, weight, lora_A, lora_B, scaling, bias, mask) + (g - 1) * z


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
    for expert, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        rows = slice(start, end)
        y[rows] = linear(x[rows], weight[expert], lora_A[expert], lora_B[expert], scaling, bias[expert])
    return y
