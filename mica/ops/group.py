"""Several layers that read the same x (q/k/v, gate/up) as one operator: x is read once, not once per layer.

    h₁…h_g = x [s₁A₁; …; s_gA_g]ᵀ                one down-projection
    y_i    = x W_iᵀ + bias_i + h_i B_iᵀ
    dA     = [g₁, …, g_g]ᵀ x                     one product, g_i = s_i·dy_i B_i
    dx     = Σ dy_i W_i + [g₁, …, g_g] A         summed in one tensor: no dx per layer

One node of the autograd graph receives all dy_i at once. Definition: `mica.reference.linear_group`.

`start_group` is the form for layers that are called one by one. Each saves, at its own call, what
`mica.ops.mica_linear` saves there, in its order: under gradient checkpointing a forward and its recomputation
may group or not, independently, and an edit of a layer that was never called breaks no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mica.kernels.limits import padded_columns
from mica.ops.checks import check_group
from mica.ops.dispatch import (
    autocast_to,
    below_autograd,
    compute,
    is_transformed,
    no_autocast,
    operator,
    plain,
    rows,
    run_backward,
    saved,
)


def mica_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`mica.ops.mica_linear` of several layers on one x, without dropout.

    Args:
        x: (..., in_features), fp64/fp32/bf16/fp16.
        weights: each (out_features_i, in_features), frozen, in the dtype of x.
        lora_As: each (rank_i, in_features), trained. lora_Bs: each (out_features_i, rank_i), frozen.
        scalings: each lora_alpha / rank.
        biases: each (out_features_i) or None.
        compute_dtype: as `mica_linear`.

    Returns:
        A list of (..., out_features_i) in the dtype of x (of autocast where it is on).

    Raises:
        ValueError, TypeError: lists of different lengths, or operands that `mica_linear` refuses.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    check_group(x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype)
    operands = (x, *(list(kind) for kind in (weights, lora_As, lora_Bs, scalings, biases)), compute_dtype)
    if not torch.compiler.is_compiling() and is_transformed():
        return plain(_group)(*operands)  # vmap has no rule for operators on lists
    return torch.ops.mica.linear_group(*operands)


def _group(x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype):
    dtypes = (x.dtype, compute_dtype or x.dtype, *(A.dtype for A in lora_As), *(B.dtype for B in lora_Bs))
    operands = (rows(x), weights, lora_As, lora_Bs, scalings, biases, compute_dtype)
    ys = compute("linear_group", x, stacked_rank(lora_As), dtypes, *operands)
    return ys if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def stacked_rank(lora_As: Sequence[Tensor]) -> int:
    """The rank of a group: its A's on top of each other, each padded as the kernels need it."""
    return sum([padded_columns(lora_A.shape[0]) for lora_A in lora_As])


def _group_fake(x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype):
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def _group_backward(grad_outputs, x, weights, lora_As, lora_Bs, scalings, compute_dtype):
    """x is None where no dA is needed, weights is empty where no dx is; the result then lacks them."""
    used = next(dy for dy in grad_outputs if dy is not None)
    dys = [None if dy is None else rows(dy) for dy in grad_outputs]
    flat = None if x is None else rows(x)
    operands = (dys, flat, list(weights) or None, lora_As, lora_Bs, scalings, compute_dtype)
    dtypes = (used.dtype, compute_dtype, *(A.dtype for A in lora_As), *(B.dtype for B in lora_Bs))
    with no_autocast(used):
        grad_x, grad_As = compute("linear_group_backward", used, stacked_rank(lora_As), dtypes, *operands)
    if grad_x is not None:
        grad_x = grad_x.view(*used.shape[:-1], lora_As[0].shape[1])
    return [*([] if grad_x is None else [grad_x]), *(grad_As or ())]


def _group_backward_fake(grad_outputs, x, weights, lora_As, lora_Bs, scalings, compute_dtype):
    used = next(dy for dy in grad_outputs if dy is not None)
    grad_x = [used.new_empty(*used.shape[:-1], lora_As[0].shape[1])] if len(weights) else []
    return grad_x + ([] if x is None else [lora_A.new_empty(lora_A.shape) for lora_A in lora_As])


class _LinearGroup(torch.autograd.Function):
    """``handed``: None, and all operands are saved here; or a dict in which each `_Follower` hands its
    layer's to the backward, by graph task and layer, and only the first layer's are saved here."""

    @staticmethod
    def forward(ctx, run, handed, scalings, compute_dtype, x, count, *tensors):
        """tensors: the weights, the lora_As, the lora_Bs and the biases, ``count`` of each."""
        weights, lora_As, lora_Bs, biases = (list(tensors[i * count : (i + 1) * count]) for i in range(4))
        ctx.set_materialize_grads(False)  # an output that was not used costs nothing
        ctx.scalings, ctx.count, ctx.compute_dtype = scalings, count, compute_dtype or x.dtype
        ctx.needs_x, ctx.handed = ctx.needs_input_grad[4], handed
        if handed is None:
            needs_A = any(ctx.needs_input_grad[6 + count : 6 + 2 * count])
            kept = weights if ctx.needs_x else []
            ctx.save_for_backward(x if needs_A else None, *kept, *lora_As, *lora_Bs)
        else:
            ctx.save_for_backward(*_saved_alone(x, weights[0], lora_As[0], lora_Bs[0]))
        with below_autograd():
            return tuple(run(x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype))

    @staticmethod
    def backward(ctx, *grad_outputs):
        on_backward = getattr(ctx, "on_backward", None)
        if on_backward is not None:  # set by a caller that keeps outputs which may not be used
            on_backward()
        count = ctx.count
        used = [i for i, grad in enumerate(grad_outputs) if grad is not None]
        if not used:
            return (None,) * (6 + 4 * count)
        x, weights, lora_As, lora_Bs = _operands_of(ctx, used)
        dys, scalings = [grad_outputs[i] for i in used], [ctx.scalings[i] for i in used]
        tensors = *dys, x, *weights, *lora_As, *lora_Bs
        args = dys, x, weights, lora_As, lora_Bs, scalings, ctx.compute_dtype
        grads = run_backward(torch.ops.mica.linear_group_backward, _group_backward, tensors, *args)
        grad_x = grads.pop(0) if ctx.needs_x else None
        # no gradient rather than zeros, which would have an optimizer move the weight
        grad_As = [None] * count
        for i, grad in zip(used, grads, strict=x is not None):
            grad_As[i] = grad
        return None, None, None, None, grad_x, None, *[None] * count, *grad_As, *[None] * (2 * count)


def _saved_alone(x, weight, lora_A, lora_B):
    """What `mica.ops.mica_linear` saves for the backward of a layer, in its order."""
    return x if lora_A.requires_grad else None, weight if x.requires_grad else None, lora_A, lora_B


def _operands_of(ctx, used):
    """x, the weights (empty where no dx is needed), lora_As and lora_Bs of the layers in ``used``."""
    if ctx.handed is None:
        x, *kept = saved(ctx)
        weights = [kept.pop(0) for _ in range(ctx.count)] if ctx.needs_x else []
        kinds = weights, kept[: ctx.count], kept[ctx.count :]
        return x, *([kind[i] for i in used] if kind else [] for kind in kinds)
    task = torch._C._current_graph_task_id()
    parts = [ctx.handed.pop((task, i)) if i else saved(ctx) for i in used]
    xs, weights, lora_As, lora_Bs = (list(kind) for kind in zip(*parts, strict=True))
    x = next((x for x in xs if x is not None), None)
    return x, weights if ctx.needs_x else [], lora_As, lora_Bs


class _Follower(torch.autograd.Function):
    """The output of a layer, which `_LinearGroup` has computed, and what the layer saves."""

    @staticmethod
    def forward(ctx, y, i, handed, operands):
        ctx.set_materialize_grads(False)
        ctx.i, ctx.handed = i, handed
        ctx.save_for_backward(*operands)
        return y.detach()  # y itself would be returned as a view, which refuses in-place operations

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is not None:
            ctx.handed[torch._C._current_graph_task_id(), ctx.i] = saved(ctx)
        return grad_output, None, None, None


def start_group(
    x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype
) -> list[Tensor | Callable[[], Tensor]]:
    """``torch.ops.mica.linear_group``, eager, except that each layer's tensors are saved when it is called.

    Returns:
        The first layer's output; then for each other layer a function without arguments, whose call is the
        layer's and returns its output.
    """
    operands, device_type = (x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype), x.device.type
    if torch.is_autocast_enabled(device_type):
        operands = _cast(device_type, *operands)
        x, weights = operands[:2]
    handed = {}
    with no_autocast(x):
        ys = _apply(_group, *operands, handed)
    kept = [_saved_alone(x, *layer) for layer in zip(weights, lora_As, lora_Bs, strict=True)]
    return [ys[0], *(partial(_Follower.apply, ys[i], i, handed, kept[i]) for i in range(1, len(ys)))]


def _apply(run, x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype, handed=None):
    tensors = (*weights, *lora_As, *lora_Bs, *biases)
    return list(_LinearGroup.apply(run, handed, scalings, compute_dtype, x, len(weights), *tensors))


def _cast(device_type, x, weights, lora_As, lora_Bs, scalings, biases, compute_dtype):
    weights, biases = ([autocast_to(tensor, device_type) for tensor in kind] for kind in (weights, biases))
    return autocast_to(x, device_type), weights, lora_As, lora_Bs, scalings, biases, None


operator(
    "linear_group",
    "(Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings, Tensor?[] biases,"
    " ScalarType? compute_dtype) -> Tensor[]",
    _group,
    _group_fake,
    _apply,
    _cast,
)
operator(
    "linear_group_backward",
    "(Tensor?[] grad_outputs, Tensor? x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs,"
    " float[] scalings, ScalarType compute_dtype) -> Tensor[]",
    _group_backward,
    _group_backward_fake,
)
