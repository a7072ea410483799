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
from mica.paths.operands import Operands


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
    operands = Operands(weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)
    check_linear(x, operands)
    return linear(x, *operands)


def _linear(x, *args):
    operands = Operands(*args)
    matrix = as_matrix(x)
    rows = partial(forward_rows, matrix, operands.out_features, operands.dropout_p)
    y = run_formula("linear", x, operands.rank, operands.dtypes(x), matrix, operands, rows=rows)
    return like(x.shape, y)


def _linear_backward(grad_output, x, output_mask, *args):
    needs_x, needs_A = output_mask
    operands = Operands(*args)
    if not needs_x:
        operands = operands._replace(weight=None)
    return without_none(grad_output, *_gradients(grad_output, x if needs_A else None, operands))


def _gradients(grad_output, x: Tensor | None, operands: Operands) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dA); None where no gradient is needed, and so x or the weight is None."""
    dy = as_matrix(grad_output)
    matrix = None if x is None else as_matrix(x)
    rows = partial(backward_rows, dy, matrix, operands.lora_A.shape[1], operands.dropout_p)
    dtypes = operands.dtypes(dy)
    with no_autocast():
        dx, dA = run_formula("linear_backward", dy, operands.rank, dtypes, dy, matrix, operands, rows=rows)
    return None if dx is None else like(grad_output.shape, dx), dA


def _linear_fake(x, weight, *args):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_backward_fake(grad_output, x, output_mask, weight, lora_A, *args):
    needs_x, needs_A = output_mask
    grad_x = grad_output.new_empty(*grad_output.shape[:-1], lora_A.shape[1]) if needs_x else None
    grad_A = lora_A.new_empty(lora_A.shape) if needs_A else None
    return without_none(grad_output, grad_x, grad_A)


class _MicaLinear(torch.autograd.Function):
    """``run`` computes y: `_linear` or the operator (`mica.ops.operator.operator`)."""

    @staticmethod
    def forward(ctx, run, x, *args):
        operands = Operands(*args)
        _, needs_x, _, needs_A = ctx.needs_input_grad[:4]
        # no fp32 copy, no h, no mask, and nothing that no gradient needs
        kept_weight = operands.weight if needs_x else None
        kept_A = operands.lora_A if needs_x else without_values(operands.lora_A)
        save(ctx, x if needs_A else None, kept_weight, kept_A, operands.lora_B, operands.seed)
        nothing = {"weight": None, "lora_A": None, "lora_B": None, "bias": None, "seed": None}
        ctx.operands = operands._replace(compute_dtype=operands.dtype(x), **nothing)
        with below_autograd():
            return run(x, *operands)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, lora_A, lora_B, seed = saved(ctx)
        operands = ctx.operands._replace(weight=weight, lora_A=lora_A, lora_B=lora_B, seed=seed)
        if torch.is_grad_enabled() or not is_eager(grad_output, x):
            mask = [weight is not None, x is not None]
            tensors = grad_output, x, weight, lora_A, lora_B
            args = grad_output, x, mask, *operands
            grads = run_backward(torch.ops.mica.linear_backward, _linear_backward, tensors, *args)
            grad_x, grad_A = (grad if needed else None for grad, needed in zip(grads, mask, strict=True))
        else:
            with below_autograd():
                grad_x, grad_A = _gradients(grad_output, x, operands)
        return None, grad_x, None, grad_A, *[None] * 7


def _cast(kind, x, *args):
    operands = Operands(*args)
    dtype = torch.get_autocast_dtype(kind)
    x = autocast_to(x, dtype)
    return x, *_cast_operands(operands, dtype)._replace(compute_dtype=None, autocast_dtype=x.dtype)


def _cast_operands(operands: Operands, dtype: torch.dtype) -> Operands:
    weight = autocast_to(operands.weight, dtype)
    return operands._replace(weight=weight, bias=autocast_to(operands.bias, dtype))


def linear_eager(x, *args) -> Tensor:
    """`linear` for callers that know that `is_eager` holds; ``args``: the fields of `Operands`.

    What autocast casts is cast here, or in C++, where autograd follows.

    Raises:
        ValueError: an x without dimensions.
    """
    if x.dim() == 0:
        as_matrix(x)  # raises
    operands = Operands(*args)
    if torch.is_grad_enabled() and operands.lora_A.requires_grad:
        return kept.call(_run, x, *operands, dtype=operands.autocast_dtype)
    return _run(x, *operands)


def _run(x, *args) -> Tensor:
    """From C++, or else from Python."""
    module = native.module()
    if module is not None:
        y = module.linear(x, *args)
        if y is not None:
            return y
    return _from_python(x, Operands(*args))


def _from_python(x, operands: Operands) -> Tensor:
    if operands.autocast_dtype is not None:
        x = autocast_to(x, operands.autocast_dtype)
        operands = _cast_operands(operands, operands.autocast_dtype)
    if torch.is_grad_enabled() and (operands.lora_A.requires_grad or x.requires_grad):
        with no_autocast():
            return _MicaLinear.apply(_linear, x, *operands)
    with below_autograd(), no_autocast():
        return _linear(x, *operands)


def configure(module: ModuleType) -> None:
    """Tell the C++ what it shares with Python."""
    numbers = products.FEW_TO_ROUND, reference_path.TOKENS_PER_CHUNK, products.HAS_WIDE_SUMS
    tables = call_counts, vars(os), native.modules, products.ANSWERS, choose.host_bounds, vars(kept)
    module.configure_linear(*numbers, kept.EDITED, kept.OUTPUTS, (*tables, linear_eager))


native.when_loaded(configure)

# The names stay from release to release: graphs in Inductor's cache, which outlives one, call by them.
_FACTORS = (
    "Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, ScalarType? compute_dtype,"
    " float dropout_p=0.0, Tensor? seed=None, ScalarType? grad_dtype=None"
)
linear = operator(
    "linear",
    f"(Tensor x, Tensor weight, {_FACTORS}) -> Tensor",
    _linear,
    _linear_fake,
    _MicaLinear.apply,
    _cast,
    eager=linear_eager,
)
operator(
    "linear_backward",
    f"(Tensor grad_output, Tensor? x, bool[2] output_mask, Tensor? weight, {_FACTORS}) -> (Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)


def traced(x: Tensor, operands: Operands) -> Tensor:
    """`linear` as PyTorch's own operations, for a compiler: autocast reaches each, and autograd follows."""
    dtype = operands.dtype(x)
    y = F.linear(x, operands.weight, operands.bias)
    h = F.linear(x.to(dtype), (operands.lora_A * operands.scaling).to(dtype))
    return (y + F.linear(h, operands.lora_B.to(h.dtype))).to(y.dtype)
