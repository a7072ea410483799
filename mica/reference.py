"""The definition of a MiCA layer in plain PyTorch: every kernel and every test is compared with it.

    y  = x Wᵀ + bias + s·(x Aᵀ) Bᵀ          W (N×K) and B (N×r) frozen, A (r×K) trained
    g  = s·dy B                             (M×r)
    dA = gᵀ x                               (r×K), accumulated in fp32
    dx = dy W + g A                         (M×K)

M tokens, K in_features, N out_features, r rank, s scaling. There is no dB, and h = x Aᵀ is never
kept: the backward needs x only. Source: MiCA, arXiv 2604.01694, on LoRA's layer (arXiv 2106.09685).

The low-rank products run in ``compute_dtype`` (default: the dtype of x), so A and B may be fp32 masters
over a bf16/fp16 base. The scaling is folded into A (forward) or B (backward) *before* that cast: one
rounding instead of two, on r·K or N·r numbers instead of M·r. Everything here is differentiable by
autograd and runs on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens whose fp32 copy is alive at a time in `grad_a`: 1024 x 14336 fp32 are 59 MB. Measured on two CPU
# cores at K = 576 and 1536, r = 16: the same speed within noise from 256 to 2048.
_TOKENS_PER_CHUNK = 1024


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y (M×N) in the dtype of x, from x (M×K), weight (N×K), lora_A (r×K), lora_B (N×r), bias (N)."""
    dtype = compute_dtype or x.dtype
    h = x.to(dtype) @ (lora_A * scaling).to(dtype).t()
    y = F.linear(x, weight, bias)
    if y.dtype == dtype:
        return y.addmm_(h, lora_B.to(dtype).t())  # in place: y is ours, and nothing else has seen it
    return torch.addmm(y.to(dtype), h, lora_B.to(dtype).t()).to(y.dtype)


def grad_h(grad_output: Tensor, lora_B: Tensor, scaling: float, compute_dtype: torch.dtype) -> Tensor:
    """g (M×r) in ``compute_dtype`` from grad_output dy (M×N) and lora_B (N×r)."""
    return grad_output.to(compute_dtype) @ (lora_B * scaling).to(compute_dtype)


def grad_a(g: Tensor, x: Tensor) -> Tensor:
    """dA (r×K) from g (M×r) and x (M×K), in fp32 (fp64 where g or x is).

    A 16-bit matrix product would round dA to 8 (bf16) or 11 bits at the end; the fp32 product costs
    3 % of a training step of SmolLM2-135M on two CPU cores and leaves the rounding of g as the largest.
    """
    dtype = torch.promote_types(torch.promote_types(g.dtype, x.dtype), torch.float32)
    if g.dtype == x.dtype == dtype:
        return g.t() @ x
    grad = g.new_zeros(g.shape[1], x.shape[1], dtype=dtype)
    for g_part, x_part in zip(g.split(_TOKENS_PER_CHUNK), x.split(_TOKENS_PER_CHUNK), strict=True):
        grad = torch.addmm(grad, g_part.to(dtype).t(), x_part.to(dtype))
    return grad


def grad_x(grad_output: Tensor, weight: Tensor, g: Tensor, lora_A: Tensor) -> Tensor:
    """dx (M×K) in the dtype of grad_output, from dy (M×N), weight (N×K), g (M×r) and lora_A (r×K)."""
    dx = grad_output @ weight
    if dx.dtype == g.dtype:
        return dx.addmm_(g, lora_A.to(g.dtype))
    return dx.add_((g @ lora_A.to(g.dtype)).to(dx.dtype))  # where autograd would round and add in stock PEFT


def embedding(
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The low-rank term of an embedding: s·A[:, indices]ᵀ Bᵀ (M×N), in compute_dtype (default A's).

    indices (M) integers below num_embeddings, lora_A (r×num_embeddings), lora_B (N×r), N = embedding_dim.
    """
    h = lora_A.index_select(1, indices).t().to(compute_dtype or lora_A.dtype)
    return h @ (lora_B * scaling).to(h.dtype).t()


def grad_a_embedding(
    grad_output: Tensor, indices: Tensor, lora_B: Tensor, scaling: float, size: int
) -> Tensor:
    """dA (r×size) of `embedding`: column j is the sum of g's rows whose index is j; g as in `grad_h`."""
    g = grad_h(grad_output, lora_B, scaling, torch.promote_types(grad_output.dtype, torch.float32))
    return g.new_zeros(g.shape[1], size).index_add(1, indices, g.t())


def delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The update s·B A (N×K) in fp32 (fp64 where A or B is), whatever the adapter's own dtype."""
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    return lora_B.to(dtype) @ (lora_A.to(dtype) * scaling)


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """W + s·B A (N×K): summed in fp32 (fp64), rounded once to the dtype of the weight."""
    update = delta(lora_A, lora_B, scaling)
    return (weight.to(torch.promote_types(weight.dtype, update.dtype)) + update).to(weight.dtype)
