"""The definition of MiCA on a stack of experts, in plain PyTorch: `mica.reference.linear`, expert by expert.

    y_e  = x_e W_eᵀ + bias_e + s·(x_e A_eᵀ) B_eᵀ    W (E×N×K) and B (E×N×r) frozen, A (E×r×K) trained
    g_e  = s·dy_e B_e
    dA_e = g_eᵀ x_e                                 0 for an expert without tokens
    dx_e = dy_e W_e + g_e A_e

The rows of x (S×K) are sorted by expert: x_e are those from offsets[e-1] to offsets[e] (E ends, int32 or
int64). A token that k experts process has k rows. Neither W + s·B·A nor its gradient (both E×N×K) is formed,
which is what PEFT's path costs (`lora.ParamWrapper`), and no expert without tokens is read. Source: MiCA,
arXiv 2604.01694.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mica import reference
from mica.products import addmm


def experts_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y (S×N) in the dtype of x, from x (S×K), weight (E×N×K), lora_A (E×r×K), lora_B (E×N×r), bias (E×N).

    Rows after the last offset, which belong to no expert, are 0. A weight or bias of another dtype (under
    autocast) is cast to that of x, expert by expert.
    """
    y = x.new_empty(x.shape[0], weight.shape[1])
    fill, end = _filling(x), 0
    for expert, rows in hit(offsets):
        own_bias = None if bias is None else _cast(bias[expert], x)
        operands = _cast(weight[expert], x), lora_A[expert], lora_B[expert].contiguous()
        y = fill(y, rows, reference.linear(x[rows], *operands, scaling, own_bias, compute_dtype))
        end = rows.stop
    y[end:] = 0
    return y


def experts_base(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`experts_linear` of a stack without an adapter."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    fill, end = _filling(x), 0
    for expert, rows in hit(offsets):
        own_bias = None if bias is None else _cast(bias[expert], x)
        y = fill(y, rows, addmm(own_bias, (x[rows], _cast(weight[expert], x).t())))
        end = rows.stop
    y[end:] = 0
    return y


def experts_linear_backward(
    grad_output: Tensor,
    x: Tensor | None,
    offsets: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx (S×K), dA (E×r×K) in the dtype of lora_A); None where the weight or x that it takes is None."""
    dx = None if weight is None else grad_output.new_empty(grad_output.shape[0], lora_A.shape[2])
    dA = None if x is None else lora_A.new_zeros(lora_A.shape)
    fill, end = _filling(grad_output), 0
    for expert, rows in hit(offsets):
        operands = (
            None if x is None else x[rows],
            None if weight is None else _cast(weight[expert], grad_output),
            lora_A[expert],
            lora_B[expert].contiguous(),  # a stack's is strided: PEFT stores (N×r·E), the expert fastest
        )
        part, own = reference.linear_backward(grad_output[rows], *operands, scaling, compute_dtype)
        if dx is not None:
            dx = fill(dx, rows, part)
        if dA is not None:
            dA = fill(dA, slice(expert, expert + 1), own)
        end = rows.stop
    if dx is not None:
        dx[end:] = 0
    return dx, dA


def _cast(operand: Tensor, like: Tensor) -> Tensor:
    return operand if operand.dtype == like.dtype else operand.to(like.dtype)


def _filling(tensor: Tensor) -> Callable[[Tensor, slice, Tensor], Tensor]:
    """(whole, rows, part) -> whole with these rows: filled in place where no vmap can make part a batch."""
    if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(tensor):
        return _filled_copy
    return _filled


def _filled(whole: Tensor, rows: slice, part: Tensor) -> Tensor:
    whole[rows] = part
    return whole


def _filled_copy(whole: Tensor, rows: slice, part: Tensor) -> Tensor:
    return torch.cat([whole[: rows.start], part.view_as(whole[rows]), whole[rows.stop :]])


def hit(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts with tokens and their rows, in order; waits for the device once."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)
