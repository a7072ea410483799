"""The linear layer: `mica_linear`, and what `mica.fast` calls without its checks.

The maths is in `mica.paths`; the operators state none of it.
"""

from __future__ import annotations

import os
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mica import native
from mica.ops import kept
from mica.ops.checks import check_linear
from mica.ops.operator import (
    as_matrix,
    autocast_to,
    below_autograd,
    call_counts,
    is_eager,
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
from mica.paths import choose, products, reference_path
from mica.paths.choose import backward_rows, forward_rows


def mica_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer with its MiCA adapter: x Wᵀ + bias + scaling·(drop(x) Aᵀ) Bᵀ.

    Args:
        x: (..., in_features), fp64/fp32/bf16/fp16.
        weight: (out_features, in_features), frozen, in the dtype of x. A transposed view is fine.
        lora_A: (rank, in_features), trained; the dtype of x, or an fp32 master over 16-bit x.
        lora_B: (out_features, rank), frozen; dtypes as for lora_A.
        scaling: lora_alpha / rank, dimensionless.
        bias: (out_features), frozen, in the dtype of x.
        compute_dtype: dtype of the low-rank products; default the dtype of x. Under autocast everything
            runs in autocast's dtype, as PEFT's layer does.
        dropout_p: probability in [0, 1) with which an element of x is dropped before lora_A.
        seed: int64 (1), where dropout_p > 0. It determines the mask, which is never stored: drawn with
            torch's generator, gradient checkpointing recomputes the same mask.

    Returns:
        (..., out_features) in the dtype of x (of autocast where it is on).

    Gradients: lora_A's in its own dtype, accumulated in fp32 (under autocast perhaps rounded to its dtype, as
    PyTorch does); x's where x needs it. Saved for the backward: x as it came and references to the operands.
    Definition: `mica.paths.definition` (arXiv 2604.01694).

    Raises:
        TypeError: a dtype that is not allowed, a tensor that is not dense, an argument of another type.
        ValueError: shapes or devices that do not fit, or a frozen operand that requires a gradient.
        RuntimeError: MICA_BACKEND=triton where there are no kernels for the call.
    """
    check_linear(x, weight, lora_A, lora_B, bias, scaling, compute_dtype, dropout_p, seed)
    return linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)


def _linear(
    x,
    weight,
    lora_A,
    lora_B,
    scaling,
    bias,
    compute_dtype,
    dropout_p=0.0,
    seed=None,
    grad_dtype=None,
):
    matrix = as_matrix(x)
    rank = lora_A.shape[0]
    dtypes = (x.dtype, compute_dtype or x.dtype, lora_A.dtype, lora_B.dtype)
    operands = (matrix, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)
    rows = partial(forward_rows, matrix, weight.shape[0], dropout_p)
    return like(x.shape, run_formula("linear", x, rank, dtypes, *operands, rows=rows))


def _linear_backward(grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask, *options):
    needs_x, needs_A = output_mask
    operands = (x if needs_A else None, weight if needs_x else None, lora_A, lora_B, scaling, compute_dtype)
    return without_none(grad_output, *_gradients(grad_output, *operands, *options))


def _gradients(
    grad_output,
    x,
    weight,
    lora_A,
    lora_B,
    scaling,
    compute_dtype,
    dropout_p=0.0,
    seed=None,
    grad_dtype=None,
):
    """(dx, dA); None where no gradient is needed, and so x or the weight is None."""
    dy = as_matrix(grad_output)
    matrix = None if x is None else as_matrix(x)
    rank, in_features = lora_A.shape
    dtypes = (grad_output.dtype, compute_dtype, lora_A.dtype, lora_B.dtype)
    operands = (dy, matrix, weight, lora_A, lora_B, scaling, compute_dtype, dropout_p, seed, grad_dtype)
    rows = partial(backward_rows, dy, matrix, in_features, dropout_p)
    with no_autocast():
        grad_x, grad_A = run_formula("linear_backward", dy, rank, dtypes, *operands, rows=rows)
    if grad_x is not None:
        grad_x = like(grad_output.shape, grad_x)
    return grad_x, grad_A


def _linear_fake(
    x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None, grad_dtype=None
):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_backward_fake(
    grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask, *options
):
    needs_x, needs_A = output_mask
    grad_x = grad_output.new_empty(*grad_output.shape[:-1], lora_A.shape[1]) if needs_x else None
    grad_A = lora_A.new_empty(lora_A.shape) if needs_A else None
    return without_none(grad_output, grad_x, grad_A)


class _MicaLinear(torch.autograd.Function):
    """``run`` computes y: `_linear` or the operator (`mica.ops.operator.operator`)."""

    @staticmethod
    def forward(
        ctx, run, x, weight, lora_A, lora_B, scaling, bias, dtype, dropout_p=0.0, seed=None, grad_dtype=None
    ):
        _, needs_x, _, needs_A = ctx.needs_input_grad[:4]
        ctx.numbers = scaling, dtype or x.dtype, dropout_p, grad_dtype
        # no fp32 copy, no h, no mask, and nothing that no gradient needs
        kept_weight = weight if needs_x else None
        kept_A = lora_A if needs_x else without_values(lora_A)
        kept_x = x if needs_A else None
        save(ctx, kept_weight, kept_A, lora_B, seed, kept_x)
        with below_autograd():
            return run(x, weight, lora_A, lora_B, scaling, bias, dtype, dropout_p, seed, grad_dtype)

    @staticmethod
    def backward(ctx, grad_output):
        weight, lora_A, lora_B, seed, x = saved(ctx)
        scaling, compute_dtype, dropout_p, grad_dtype = ctx.numbers
        operands = grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype
        if torch.is_grad_enabled() or not is_eager(grad_output, x):
            mask = [weight is not None, x is not None]
            args = *operands, mask, dropout_p, seed, grad_dtype
            grads = run_backward(torch.ops.mica.linear_backward, _linear_backward, operands[:5], *args)
            grad_x, grad_A = (grad if needed else None for grad, needed in zip(grads, mask, strict=True))
        else:
            with below_autograd():
                grad_x, grad_A = _gradients(*operands, dropout_p, seed, grad_dtype)
        return None, grad_x, None, grad_A, None, None, None, None, None, None, None


def _cast(
    kind, x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None, grad_dtype=None
):
    dtype = torch.get_autocast_dtype(kind)
    x, weight, bias = (autocast_to(tensor, dtype) for tensor in (x, weight, bias))
    return x, weight, lora_A, lora_B, scaling, bias, None, dropout_p, seed, x.dtype


def linear_eager(
    x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None, autocast_dtype=None
) -> Tensor:
    """`linear` for callers that know that `is_eager` holds.

    autocast_dtype: autocast's where it is on. What it casts is cast here, or in C++, where autograd follows.

    Raises:
        ValueError: an x without dimensions.
    """
    if x.dim() == 0:
        as_matrix(x)  # raises
    operands = weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed, autocast_dtype
    if torch.is_grad_enabled() and lora_A.requires_grad:
        return kept.call(_run, x, *operands, dtype=autocast_dtype)
    return _run(x, *operands)


def _run(x, *operands) -> Tensor:
    module = native.module()
    y = None if module is None else module.linear(x, *operands)
    return _from_python(x, *operands) if y is None else y


def _from_python(x, weight, lora_A, lora_B, scaling, bias, *options) -> Tensor:
    autocast_dtype = options[-1]
    if autocast_dtype is not None:
        x, weight, bias = (autocast_to(tensor, autocast_dtype) for tensor in (x, weight, bias))
    operands = x, weight, lora_A, lora_B, scaling, bias, *options
    if torch.is_grad_enabled() and (lora_A.requires_grad or x.requires_grad):
        with no_autocast():
            return _MicaLinear.apply(_linear, *operands)
    with below_autograd(), no_autocast():
        return _linear(*operands)


def configure(module: ModuleType) -> None:
    numbers = products.FEW_TO_ROUND, reference_path.TOKENS_PER_CHUNK, products.HAS_WIDE_SUMS
    tables = call_counts, vars(os), native.modules, products.ANSWERS, choose.host_bounds
    module.configure_linear(*numbers, kept.EDITED, kept.outputs(), (*tables, linear_eager))


native.when_loaded(configure)

linear = operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias,"
    " ScalarType? compute_dtype, float dropout_p=0.0, Tensor? seed=None, ScalarType? grad_dtype=None)"
    " -> Tensor",
    _linear,
    _linear_fake,
    _MicaLinear.apply,
    _cast,
    eager=linear_eager,
)
operator(
    "linear_backward",
    "(Tensor grad_output, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling,"
    " ScalarType compute_dtype, bool[2] output_mask, float dropout_p=0.0, Tensor? seed=None,"
    " ScalarType? grad_dtype=None) -> (Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)


def traced(x, weight, lora_A, lora_B, scaling, bias, compute_dtype) -> Tensor:
    """`linear` as PyTorch's own operations, for a compiler: autocast reaches each, and autograd follows."""
    dtype = compute_dtype or x.dtype
    y = F.linear(x, weight, bias)
    h = F.linear(x.to(dtype), (lora_A * scaling).to(dtype))
    return (y + F.linear(h, lora_B.to(h.dtype))).to(y.dtype)
