"""The two factors as separate operators, for base layers that have to be called (quantised, hooked).

    h  = scaling·drop(x) Aᵀ     down_projection: h (..., rank) in compute_dtype; None: in that of x
    y' = y + h Bᵀ               up_projection, with y = base_layer(x): summed in the wider dtype of y and h,
                                a new tensor in the dtype of y

Definition: arXiv 2604.01694; tests/support/definition.py. Saved for the backward: x as it came where lora_A
is trained, h where lora_B is, and no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mica.ops.operator import (
    as_matrix,
    autocast_to,
    below_autograd,
    like,
    no_autocast,
    operator,
    run_backward,
    run_formula,
    save,
    saved,
    without_none,
    without_values,
)
from mica.paths import reference_path
from mica.paths.tuning import Kind, rounded_up

# ---------------------------------------------------------------------------------------------------
# down-projection
# ---------------------------------------------------------------------------------------------------


def _down(x, lora_A, scaling, compute_dtype, dropout_p=0.0, seed=None):
    dtype = compute_dtype or x.dtype
    operands = (as_matrix(x), lora_A, scaling, dtype, dropout_p, seed)
    rank = lora_A.shape[0]
    h = run_formula(reference_path.down_projection, x, rank, (x.dtype, dtype, lora_A.dtype), *operands)
    return like(x.shape, h)


def _down_fake(x, lora_A, scaling, compute_dtype, dropout_p=0.0, seed=None):
    return x.new_empty(*x.shape[:-1], lora_A.shape[0], dtype=compute_dtype or x.dtype)


def _down_backward(grad_h, x, lora_A, scaling, x_dtype, output_mask, dropout_p=0.0, seed=None):
    needs_x, needs_A = output_mask
    g = as_matrix(grad_h)
    operands = (g, as_matrix(x) if needs_A else None, lora_A, scaling, needs_x, dropout_p, seed)
    dtypes = (g.dtype, x_dtype, lora_A.dtype)
    with no_autocast():
        grad_x, grad_A = run_formula(
            reference_path.down_projection_backward, g, lora_A.shape[0], dtypes, *operands
        )
    if needs_x:
        grad_x = like(grad_h.shape, grad_x.to(x_dtype))
    return without_none(grad_h, grad_x, grad_A)


def _down_backward_fake(grad_h, x, lora_A, scaling, x_dtype, output_mask, dropout_p=0.0, seed=None):
    needs_x, needs_A = output_mask
    grad_x = grad_h.new_empty(*grad_h.shape[:-1], lora_A.shape[1], dtype=x_dtype) if needs_x else None
    return without_none(grad_h, grad_x, lora_A.new_empty(lora_A.shape) if needs_A else None)


class _DownProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, lora_A, scaling, compute_dtype, dropout_p=0.0, seed=None):
        ctx.scaling, ctx.dropout_p, ctx.x_dtype = scaling, dropout_p, x.dtype
        _, needs_x, needs_A = ctx.needs_input_grad[:3]
        kept_x = x if needs_A else None
        kept_A = lora_A if needs_x else without_values(lora_A)
        save(ctx, kept_x, kept_A, seed)
        with below_autograd():
            return run(x, lora_A, scaling, compute_dtype, dropout_p, seed)

    @staticmethod
    def backward(ctx, grad_h):
        x, lora_A, seed = saved(ctx)
        mask = list(ctx.needs_input_grad[1:3])
        tensors = grad_h, x, lora_A
        args = *tensors, ctx.scaling, ctx.x_dtype, mask, ctx.dropout_p, seed
        backward = torch.ops.mica.down_projection_backward
        grad_x, grad_A = run_backward(backward, _down_backward, tensors, *args, mask=mask)
        return None, grad_x, grad_A, *[None] * 4


def _down_cast(device_type, x, lora_A, scaling, compute_dtype, *dropout):
    return autocast_to(x, torch.get_autocast_dtype(device_type)), lora_A, scaling, None, *dropout


down_projection = operator(
    "down_projection",
    "(Tensor x, Tensor lora_A, float scaling, ScalarType? compute_dtype, float dropout_p=0.0,"
    " Tensor? seed=None) -> Tensor",
    _down,
    _down_fake,
    _DownProjection.apply,
    _down_cast,
)
operator(
    "down_projection_backward",
    "(Tensor grad_h, Tensor? x, Tensor lora_A, float scaling, ScalarType x_dtype, bool[2] output_mask,"
    " float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor)",
    _down_backward,
    _down_backward_fake,
)


# ---------------------------------------------------------------------------------------------------
# up-projection
# ---------------------------------------------------------------------------------------------------


def _up(y, h, lora_B, trains_B=False):
    out = run_formula(
        reference_path.up_projection,
        y,
        h.shape[-1],
        (y.dtype, h.dtype, lora_B.dtype),
        as_matrix(y),
        as_matrix(h),
        lora_B,
        trains_B=trains_B,
    )
    return like(y.shape, out)


def _up_fake(y, h, lora_B, trains_B=False):
    return y.new_empty(y.shape)


def _up_backward(grad_output, lora_B, h_dtype, trains_B=False):
    dy = as_matrix(grad_output)
    dtypes = (dy.dtype, h_dtype, lora_B.dtype)
    with no_autocast():
        grad_h = run_formula(
            reference_path.up_projection_backward,
            dy,
            lora_B.shape[1],
            dtypes,
            dy,
            lora_B,
            h_dtype,
            trains_B=trains_B,
        )
    return like(grad_output.shape, grad_h)


def _up_backward_fake(grad_output, lora_B, h_dtype, trains_B=False):
    return grad_output.new_empty(*grad_output.shape[:-1], lora_B.shape[1], dtype=h_dtype)


class _UpProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, y, h, lora_B, trains_B=False):
        ctx.h_dtype, ctx.trains_B = h.dtype, trains_B
        save(ctx, lora_B, h if ctx.needs_input_grad[3] else None)
        with below_autograd():
            return run(y, h, lora_B, trains_B)

    @staticmethod
    def backward(ctx, grad_output):
        lora_B, h = saved(ctx)
        grad_h = grad_B = None
        if ctx.needs_input_grad[2]:
            tensors = grad_output, lora_B
            args = *tensors, ctx.h_dtype, ctx.trains_B
            grad_h = run_backward(torch.ops.mica.up_projection_backward, _up_backward, tensors, *args)
        if h is not None:
            grad_B = grad_b(grad_output, h, lora_B.dtype)
        return None, grad_output, grad_h, grad_B, None


up_projection = operator(
    "up_projection",
    "(Tensor y, Tensor h, Tensor lora_B, bool trains_B=False) -> Tensor",
    _up,
    _up_fake,
    _UpProjection.apply,
    lambda device_type, *args: args,
)
operator(
    "up_projection_backward",
    "(Tensor grad_output, Tensor lora_B, ScalarType h_dtype, bool trains_B=False) -> Tensor",
    _up_backward,
    _up_backward_fake,
)


# ---------------------------------------------------------------------------------------------------
# the gradient of a trained lora_B
# ---------------------------------------------------------------------------------------------------


def grad_b(
    grad_output: Tensor,
    h: Tensor,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None = None,
    in_features: int = 0,
) -> Tensor:
    """The gradient of lora_B, computed in a backward.

    Args:
        grad_output: The gradient dy of the output, (..., out_features).
        h: What the forward has multiplied by lora_B, (..., rank).
        dtype: The dtype of the result, which is that of lora_B.
        grad_dtype: A dtype to which the sum may be rounded first, as PyTorch does under autocast; None for
            none.
        in_features: The width of the layer whose backward this is, which decides on its form; 0 where it is
            the backward of a factor alone.

    Returns:
        dB, (out_features, rank).
    """
    tensors = grad_output, h
    return run_backward(torch.ops.mica.grad_b, _grad_b, tensors, *tensors, dtype, grad_dtype, in_features)


def _grad_b(grad_output, h, dtype, grad_dtype, in_features):
    dy = as_matrix(grad_output)
    dtypes = (dy.dtype, h.dtype, dtype, dtype)

    def kind_of_layer() -> Kind:
        sizes = h.shape[-1], in_features, dy.shape[1], rounded_up(len(dy))
        return Kind(True, dtypes, *sizes, has_dropout=False, is_aligned=dy.data_ptr() % 16 == 0)

    kind = kind_of_layer if in_features else None
    with no_autocast():
        return run_formula(
            reference_path.grad_b, dy, h.shape[-1], dtypes, dy, as_matrix(h), dtype, grad_dtype, kind=kind
        )


def _grad_b_fake(grad_output, h, dtype, grad_dtype, in_features):
    return h.new_empty(grad_output.shape[-1], h.shape[-1], dtype=dtype)


operator(
    "grad_b",
    "(Tensor grad_output, Tensor h, ScalarType dtype, ScalarType? grad_dtype, SymInt in_features) -> Tensor",
    _grad_b,
    _grad_b_fake,
)
