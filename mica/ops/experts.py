"""A linear layer of a stack of experts: `mica_experts_linear`, on rows that are sorted by expert.

The maths is in `mica.paths`; the operators state none of it. They can also take the tokens with
the order of their rows (`mica.ops.routing`): then the rows, top_k times as large, are gathered in the forward
and again in the backward, and not kept in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mica.ops.checks import EXPERTS, check_operands
from mica.ops.operator import (
    below_autograd,
    no_autocast,
    operator,
    run_backward,
    run_formula,
    save,
    saved,
    without_gradient,
    without_none,
    without_values,
)
from mica.ops.routing import summed, to_experts
from mica.paths import reference_path
from mica.paths.operands import Operands


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
    """The frozen linear layers of several experts with MiCA or LoRA adapters, each on its own rows of x.

    Args:
        x: The rows, (rows, in_features), in fp64, fp32, bf16 or fp16, sorted by expert. A token of k experts
            has k rows.
        offsets: The end of each expert's rows, (num_experts), int32 or int64, not decreasing. Rows after the
            last one belong to no expert: their y and dx are 0.
        weight: The frozen weights, (num_experts, out_features, in_features), in the dtype of x and of any
            strides.
        lora_A: The trained factors, (num_experts, rank, in_features), in the dtype of x or as fp32 masters
            over 16-bit x.
        lora_B: The other factors, (num_experts, out_features, rank), of any strides, frozen in MiCA and
            trained in LoRA; dtypes as for lora_A.
        scaling: lora_alpha / rank, a number without a unit.
        bias: The frozen biases, (num_experts, out_features), in the dtype of x; None for none.
        compute_dtype: The dtype of the low-rank products; None means that of x. Under autocast x is cast to
            the dtype of the weight and the products run in it, as transformers' grouped experts do.

    Returns:
        (rows, out_features) in the dtype of x (of the weight under autocast).

    Gradients: lora_A and lora_B get theirs in their own dtype, accumulated in fp32, 0 for experts without
    rows; x gets one where it needs it. Saved for the backward are references to the operands, x as it came
    where lora_A is trained, and h (rows, rank) where lora_B is. Nothing of the weight's size is formed.
    Definition: arXiv 2604.01694, 2106.09685; tests/support/definition.py.

    Raises:
        TypeError: An operand or the compute_dtype is not of a floating dtype, the offsets are no integers, or
            the weight or bias is not of the dtype of x outside autocast.
        ValueError: Shapes or devices do not fit, or a frozen operand requires a gradient.
        RuntimeError: MICA_BACKEND=triton is set, and there are no kernels for the call.
    """
    operands = Operands(weight, lora_A, lora_B, scaling, bias, compute_dtype)
    check_operands(EXPERTS, x=x, offsets=offsets, **operands._asdict())
    return experts_linear(x, offsets, *operands[:_OPERANDS], None, None, lora_B.requires_grad)


def experts_linear(x: Tensor, offsets: Tensor, *args) -> Tensor:
    """`mica_experts_linear` without its checks.

    Args:
        x: The rows (rows, in_features); with a routing among ``args`` the tokens (num_tokens, in_features).
        offsets: The end of each expert's rows, (num_experts).
        args: The other arguments of the operator ``torch.ops.mica.experts_linear``, in their order.
    """
    y, _ = _experts_and_h(x, offsets, *args)
    return y


_OPERANDS = 6  # the first fields of `Operands`, which a stack has
# What follows them: the `Routing`'s tokens and inverse, None where the rows of x are sorted already, of a
# backward the number of tokens, and whether lora_B may be trained.
_FORWARD = (None, None, False)
_BACKWARD = (None, None, 0, False)


def _split(args: tuple, defaults: tuple) -> tuple:
    """The operands, and what follows them but for the last."""
    given = args[_OPERANDS:]
    *others, trains_B = *given, *defaults[len(given) :]
    return Operands(*args[:_OPERANDS], trains_B=trains_B), *others


def _experts(x, offsets, *args):
    """(y, h or an empty tensor); x: (num_tokens, in_features) with a routing, else (rows, in_features)."""
    operands, tokens, _ = _split(args, _FORWARD)
    rows = x if tokens is None else to_experts(x, tokens)
    y, h = run_formula(
        reference_path.experts_linear,
        x,
        operands.rank,
        operands.dtypes(x),
        rows,
        offsets,
        operands,
        trains_B=operands.trains_B,
    )
    return without_none(x, y, h if operands.trains_B else None)


def _experts_fake(x, offsets, *args):
    operands, tokens, _ = _split(args, _FORWARD)
    rows = (x if tokens is None else tokens).shape[0]
    h = x.new_empty(rows, operands.rank, dtype=operands.low_rank_dtype(x)) if operands.trains_B else None
    return without_none(x, x.new_empty(rows, operands.out_features), h)


def _backward(grad_output, x, offsets, output_mask, *args, grad_h=None):
    operands, tokens, inverse, num_tokens = _split(args, _BACKWARD)
    needs_x, needs_A = output_mask
    if not needs_A:
        x = None
    elif tokens is not None:
        x = to_experts(x, tokens)
    with no_autocast():
        grad_x, grad_A = run_formula(
            reference_path.experts_linear_backward,
            grad_output,
            operands.rank,
            operands.dtypes(grad_output),
            grad_output,
            x,
            offsets,
            operands,
            needs_x,
            *([] if grad_h is None else [grad_h]),  # only in second derivatives, on the reference path
            trains_B=operands.trains_B,
        )
    if needs_x and inverse is not None:
        grad_x = summed(grad_x, inverse, num_tokens)
    return without_none(grad_output, grad_x, grad_A)


def _backward_fake(grad_output, x, offsets, output_mask, *args):
    operands, _, inverse, num_tokens = _split(args, _BACKWARD)
    needs_x, needs_A = output_mask
    lora_A = operands.lora_A
    rows = grad_output.shape[0] if inverse is None else num_tokens
    grad_x = grad_output.new_empty(rows, lora_A.shape[2]) if needs_x else None
    return without_none(grad_output, grad_x, lora_A.new_empty(lora_A.shape) if needs_A else None)


def _grad_b(grad_output, h, offsets, dtype):
    dtypes = (grad_output.dtype, h.dtype, dtype, dtype)
    with no_autocast():
        return run_formula(
            reference_path.experts_grad_b, grad_output, h.shape[1], dtypes, grad_output, h, offsets, dtype
        )


def _grad_b_fake(grad_output, h, offsets, dtype):
    stored = h.new_empty(grad_output.shape[1], h.shape[1], offsets.shape[0], dtype=dtype)
    return stored.permute(2, 0, 1)


class _ExpertsLinear(torch.autograd.Function):
    """``run`` computes y and h: `_experts` or the operator (`mica.ops.operator.operator`)."""

    @staticmethod
    def forward(ctx, run, x, offsets, *args):
        operands, tokens, inverse = _split(args, _FORWARD)
        _, needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:6]
        ctx.set_materialize_grads(False)
        ctx.scaling = operands.scaling
        ctx.compute_dtype = operands.low_rank_dtype(x)
        ctx.num_tokens = x.shape[0]
        ctx.trains_B = operands.trains_B or needs_B
        with below_autograd():
            y, h = run(x, offsets, *operands[:_OPERANDS], tokens, inverse, ctx.trains_B)
        if not needs_B:
            ctx.mark_non_differentiable(h)
        # x as it came, and nothing that no gradient needs
        kept_x = x if needs_A else None
        kept_weight = operands.weight if needs_x else None
        kept_A = operands.lora_A if needs_x else without_values(operands.lora_A)
        kept_tokens = tokens if needs_A else None
        kept_inverse = inverse if needs_x else None
        kept = kept_x, offsets, kept_weight, kept_A, operands.lora_B, kept_tokens, kept_inverse
        save(ctx, *kept, outputs=[h if needs_B else None])
        return y, h

    @staticmethod
    def backward(ctx, grad_output, grad_h):
        x, offsets, weight, lora_A, lora_B, tokens, inverse, h = saved(ctx)
        if grad_output is None and grad_h is None:
            return (None,) * 12
        if grad_output is None:
            grad_output = without_gradient(grad_h, weight, lora_B)
        mask = [weight is not None, x is not None]
        tensors = grad_output, x, offsets, weight, lora_A, lora_B
        operands = weight, lora_A, lora_B, ctx.scaling, None, ctx.compute_dtype
        args = grad_output, x, offsets, mask, *operands, tokens, inverse, ctx.num_tokens, ctx.trains_B
        backward = torch.ops.mica.experts_linear_backward
        grad_x, grad_A = run_backward(backward, _backward, tensors, *args, mask=mask, grad_h=grad_h)
        grad_B = None
        if h is not None:
            tensors = grad_output, h, offsets
            args = *tensors, lora_B.dtype
            grad_B = run_backward(torch.ops.mica.experts_grad_b, _grad_b, tensors, *args)
        return None, grad_x, None, None, grad_A, grad_B, *[None] * 6


def _cast(device_type, x, offsets, *args):
    operands, *routing = _split(args, _FORWARD)
    operands = operands._replace(compute_dtype=None)
    return x.to(operands.weight.dtype), offsets, *operands[:_OPERANDS], *routing, operands.trains_B


_FACTORS = "Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, ScalarType? compute_dtype"
_ROUTING = "Tensor? tokens=None, Tensor? inverse=None"
_experts_and_h = operator(
    "experts_linear",
    f"(Tensor x, Tensor offsets, Tensor weight, {_FACTORS}, {_ROUTING}, bool trains_B=False)"
    " -> (Tensor, Tensor)",
    _experts,
    _experts_fake,
    _ExpertsLinear.apply,
    _cast,
)
operator(
    "experts_linear_backward",
    f"(Tensor grad_output, Tensor? x, Tensor offsets, bool[2] output_mask, Tensor? weight, {_FACTORS},"
    f" {_ROUTING}, SymInt num_tokens=0, bool trains_B=False) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
operator(
    "experts_grad_b",
    "(Tensor grad_output, Tensor h, Tensor offsets, ScalarType dtype) -> Tensor",
    _grad_b,
    _grad_b_fake,
)


# ---------------------------------------------------------------------------------------------------
# a stack without an adapter
# ---------------------------------------------------------------------------------------------------


def _base(x, offsets, weight, bias, tokens=None, inverse=None):
    rows = x if tokens is None else to_experts(x, tokens)
    return run_formula(
        reference_path.experts_base, x, 0, (x.dtype, weight.dtype), rows, offsets, weight, bias
    )


def _base_fake(x, offsets, weight, bias, tokens=None, inverse=None):
    return x.new_empty((x if tokens is None else tokens).shape[0], weight.shape[1])


class _ExpertsBase(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, offsets, weight, bias, tokens=None, inverse=None):
        ctx.num_tokens = x.shape[0]
        save(ctx, offsets, weight, inverse)
        with below_autograd():
            return run(x, offsets, weight, bias, tokens, inverse)

    @staticmethod
    def backward(ctx, grad_output):
        offsets, weight, inverse = saved(ctx)
        with no_autocast():
            grad_x = experts_base(grad_output, offsets, weight.mT, None)
            grad_x = grad_x if inverse is None else summed(grad_x, inverse, ctx.num_tokens)
        return None, grad_x, *[None] * 5


def _base_cast(device_type, x, offsets, weight, *bias_and_routing):
    return x.to(weight.dtype), offsets, weight, *bias_and_routing


# Frozen: only x gets a gradient, dx_e = dy_e W_e. Rows that belong to no expert are 0.
experts_base = operator(
    "experts_base",
    f"(Tensor x, Tensor offsets, Tensor weight, Tensor? bias, {_ROUTING}) -> Tensor",
    _base,
    _base_fake,
    _ExpertsBase.apply,
    _base_cast,
)
