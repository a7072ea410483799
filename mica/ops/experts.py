"""A linear layer of a stack of experts: `mica_experts_linear`, on rows that are sorted by expert.

The maths is `mica.reference_experts`'; the operators state none of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mica.ops.checks import check_experts_linear
from mica.ops.dispatch import (
    below_autograd,
    compute,
    no_autocast,
    operator,
    run_backward,
    saved,
    without_none,
)


def mica_experts_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The frozen linear layers of several experts with their MiCA adapters, each on its own rows of x.

    Args:
        x: (rows, in_features), fp64/fp32/bf16/fp16, sorted by expert; a token of k experts has k rows.
        offsets: (num_experts) int32 or int64, the end of each expert's rows, not decreasing. Rows after the
            last one belong to no expert: their y and dx are 0.
        weight: (num_experts, out_features, in_features), frozen, in the dtype of x, of any strides.
        lora_A: (num_experts, rank, in_features), trained; the dtype of x, or an fp32 master over 16-bit x.
        lora_B: (num_experts, out_features, rank), frozen, any strides; dtypes as for lora_A.
        scaling: lora_alpha / rank, dimensionless.
        bias: (num_experts, out_features), frozen, in the dtype of x.
        compute_dtype: dtype of the low-rank products; default the dtype of x. Under autocast x is cast to
            the dtype of the weight and the products run in it, as transformers' grouped experts do.

    Returns:
        (rows, out_features) in the dtype of x (of the weight under autocast).

    Gradients: lora_A's in its own dtype, accumulated in fp32, 0 for experts without rows; x's where x needs
    it. Saved for the backward: x as it came and references to the operands. Nothing of the weight's size is
    formed. Definition: `mica.reference_experts` (arXiv 2604.01694).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or a frozen operand that requires a
            gradient.
        RuntimeError: MICA_BACKEND=triton where there are no kernels for the call.
    """
    check_experts_linear(x, offsets, weight, lora_A, lora_B, bias, compute_dtype)
    return experts_linear(x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype)


def _experts(x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype):
    dtypes = (x.dtype, compute_dtype or x.dtype, lora_A.dtype, lora_B.dtype)
    operands = (x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype)
    return compute("experts_linear", x, lora_A.shape[1], dtypes, *operands)


def _experts_fake(x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype):
    return x.new_empty(x.shape[0], weight.shape[1])


def _backward(grad_output, x, offsets, weight, lora_A, lora_B, scaling, compute_dtype, output_mask):
    needs_x, needs_A = output_mask
    dtypes = (grad_output.dtype, compute_dtype, lora_A.dtype, lora_B.dtype)
    operands = (x if needs_A else None, offsets, weight if needs_x else None, lora_A, lora_B)
    with no_autocast(grad_output):
        grads = compute(
            "experts_linear_backward",
            grad_output,
            lora_A.shape[1],
            dtypes,
            grad_output,
            *operands,
            scaling,
            compute_dtype,
        )
    return without_none(grad_output, *grads)


def _backward_fake(grad_output, x, offsets, weight, lora_A, lora_B, scaling, compute_dtype, output_mask):
    needs_x, needs_A = output_mask
    grad_x = grad_output.new_empty(grad_output.shape[0], lora_A.shape[2]) if needs_x else None
    return without_none(grad_output, grad_x, lora_A.new_empty(lora_A.shape) if needs_A else None)


class _ExpertsLinear(torch.autograd.Function):
    """``run`` computes y: `_experts` or the operator (`mica.ops.dispatch.operator`)."""

    @staticmethod
    def forward(ctx, run, x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype):
        _, needs_x, _, _, needs_A = ctx.needs_input_grad[:5]
        ctx.scaling, ctx.compute_dtype = scaling, compute_dtype or x.dtype
        ctx.save_for_backward(
            x if needs_A else None, offsets, weight if needs_x else None, lora_A, lora_B
        )  # x as it came, and nothing that no gradient needs
        with below_autograd():
            return run(x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, offsets, weight, lora_A, lora_B = saved(ctx)
        mask = [weight is not None, x is not None]
        tensors = grad_output, x, offsets, weight, lora_A, lora_B
        args = *tensors, ctx.scaling, ctx.compute_dtype, mask
        grads = run_backward(torch.ops.mica.experts_linear_backward, _backward, tensors, *args)
        grad_x, grad_A = (grad if needed else None for grad, needed in zip(grads, mask, strict=True))
        return None, grad_x, None, None, grad_A, *[None] * 4


def _cast(device_type, x, offsets, weight, lora_A, lora_B, scaling, bias, compute_dtype):
    return x.to(weight.dtype), offsets, weight, lora_A, lora_B, scaling, bias, None


experts_linear = operator(
    "experts_linear",
    "(Tensor x, Tensor offsets, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias,"
    " ScalarType? compute_dtype) -> Tensor",
    _experts,
    _experts_fake,
    _ExpertsLinear.apply,
    _cast,
)
operator(
    "experts_linear_backward",
    "(Tensor grad_output, Tensor? x, Tensor offsets, Tensor? weight, Tensor lora_A, Tensor lora_B,"
    " float scaling, ScalarType compute_dtype, bool[2] output_mask) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
