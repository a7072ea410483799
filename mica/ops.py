"""The operators ``torch.ops.mica.*`` and their Python front: shapes, dtypes, autograd, choice of path.

``define`` / ``impl`` with an autograd.Function on the Autograd key, not ``custom_op``: half the overhead
a call (51 against 87 µs forward + backward, tiny bodies, CPU), and ``opcheck``, ``torch.compile`` with
``fullgraph=True`` and autocast all hold. The maths is `mica.reference`'s; this file states none of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mica.dispatch import (
    autocast,
    autocast_to,
    below_autograd,
    call_counts,
    compute,
    define,
    differentiate,
    front,
    is_direct,
    no_autocast,
    rows,
    run_backward,
    saved,
)
from mica.factor_ops import down_projection, mica_down_projection, mica_up_projection, up_projection
from mica.group_ops import mica_linear_group
from mica.operands import check_embedding, check_linear, check_merge

__all__ = [
    "call_counts",
    "down_projection",
    "embedding",
    "linear",
    "mica_down_projection",
    "mica_embedding",
    "mica_linear",
    "mica_linear_group",
    "mica_merge",
    "mica_up_projection",
    "up_projection",
]


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
        seed: int64 (1), where dropout_p > 0. It decides the mask, which is never stored: draw it with
            torch's generator, and gradient checkpointing recomputes the same mask.

    Returns:
        (..., out_features) in the dtype of x (of autocast where it is on).

    Gradients: lora_A's in its own dtype, accumulated in fp32; x's where x needs it. Saved for the
    backward: x as it came and references to the operands. Definition: `mica.reference` (arXiv 2604.01694).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or a frozen operand that requires a
            gradient.
        RuntimeError: MICA_BACKEND=triton where there are no kernels for the call.
    """
    check_linear(x, weight, lora_A, lora_B, bias, compute_dtype, dropout_p, seed)
    return linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)


def mica_embedding(
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    padding_idx: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The MiCA term of an embedding, to be added to the base embedding: scaling·A[:, indices]ᵀ Bᵀ.

    Args:
        indices: (...), int32 or int64, below num_embeddings.
        lora_A: (rank, num_embeddings), trained.
        lora_B: (embedding_dim, rank), frozen.
        padding_idx: the column of lora_A that gets no gradient, as in `torch.nn.functional.embedding`.
        compute_dtype: dtype of the product; default lora_A's, under autocast autocast's.

    Returns:
        (..., embedding_dim) in compute_dtype.

    Raises:
        ValueError, TypeError: as `mica_linear`. RuntimeError: as there.
    """
    check_embedding(indices, lora_A, lora_B)
    return embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype)


def mica_merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """W + scaling·B A in a new tensor: summed in fp32 (fp64), also under autocast, rounded once; no gradient.

    Args:
        weight: (out_features, in_features), fp64/fp32/bf16/fp16.
        lora_A: (rank, in_features). lora_B: (out_features, rank). Any of these dtypes.
        scaling: lora_alpha / rank, dimensionless.

    Returns:
        (out_features, in_features) in the dtype of the weight.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_merge(weight, lora_A, lora_B)
    return torch.ops.mica.merge(weight.detach(), lora_A.detach(), lora_B.detach(), scaling)


# ---------------------------------------------------------------------------------------------------
# linear
# ---------------------------------------------------------------------------------------------------


def _linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None):
    dtypes = (x.dtype, compute_dtype or x.dtype, lora_A.dtype, lora_B.dtype)
    operands = (rows(x), weight, lora_A, lora_B, scaling, bias, compute_dtype)
    y = compute("linear", "forward", x, lora_A.shape[0], dtypes, *operands, dropout_p, seed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _linear_backward(
    grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask, dropout_p=0.0, seed=None
):
    needs_x, needs_A = output_mask
    dtypes = (grad_output.dtype, compute_dtype, lora_A.dtype, lora_B.dtype)
    dy, x = rows(grad_output), rows(x) if needs_A else None
    operands = (dy, x, weight if needs_x else None, lora_A, lora_B, scaling, compute_dtype)
    name = "linear_backward"
    with no_autocast(dy):
        grad_x, grad_A = compute(name, name, dy, lora_A.shape[0], dtypes, *operands, dropout_p, seed)
    if grad_x is None:
        grad_x = dy.new_empty(0)
    elif grad_output.dim() != 2:
        grad_x = grad_x.view(*grad_output.shape[:-1], lora_A.shape[1])
    return grad_x, dy.new_empty(0) if grad_A is None else grad_A


def _linear_fake(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_backward_fake(
    grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask, dropout_p=0.0, seed=None
):
    needs_x, needs_A = output_mask
    grad_x = grad_output.new_empty(*grad_output.shape[:-1], lora_A.shape[1]) if needs_x else None
    grad_A = lora_A.new_empty(lora_A.shape) if needs_A else None
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in (grad_x, grad_A))


class _MicaLinear(torch.autograd.Function):
    """``run``: what computes y, `_linear` or the operator (`mica.dispatch.differentiate`)."""

    @staticmethod
    def forward(ctx, run, x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None):
        _, needs_x, _, needs_A = ctx.needs_input_grad[:4]
        ctx.scaling, ctx.compute_dtype, ctx.dropout_p = scaling, compute_dtype or x.dtype, dropout_p
        # x as it came: no fp32 copy, no h, no mask. What no gradient needs is not kept. `group_ops` saves the
        # same in the same order, or a recomputation under checkpointing that groups would be refused.
        ctx.save_for_backward(x if needs_A else None, weight if needs_x else None, lora_A, lora_B, seed)
        with below_autograd():
            return run(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_A = _gradients(ctx, grad_output, *saved(ctx), ctx.dropout_p)
        return None, grad_x, None, grad_A, *[None] * 6


def _gradients(ctx, grad_output, x, weight, lora_A, lora_B, seed, dropout_p):
    """(dx, dA); None where no gradient is wanted, and so x or the weight has not been saved."""
    mask = [weight is not None, x is not None]
    tensors = grad_output, x, weight, lora_A, lora_B
    args = *tensors, ctx.scaling, ctx.compute_dtype, mask, dropout_p, seed
    grads = run_backward(torch.ops.mica.linear_backward, _linear_backward, tensors, *args)
    return (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))


class _DirectLinear(torch.autograd.Function):
    """`_MicaLinear` without dropout, for `linear_directly`: the same tensors saved, the same bits.

    In ten calls less: in a decoder block, whose code does not stay in the processor's caches, each takes the
    host 1 to 2 µs.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias, compute_dtype):
        needs_x, _, needs_A = ctx.needs_input_grad[:3]
        ctx.scaling, ctx.compute_dtype = scaling, compute_dtype or x.dtype
        ctx.save_for_backward(x if needs_A else None, weight if needs_x else None, lora_A, lora_B)
        with below_autograd():
            return _linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, lora_A, lora_B = saved(ctx)
        if (
            torch.is_grad_enabled()
            or not is_direct(grad_output, x)
            or torch.is_autocast_enabled(grad_output.device.type)
        ):
            grad_x, grad_A = _gradients(ctx, grad_output, x, weight, lora_A, lora_B, None, 0.0)
            return grad_x, None, grad_A, None, None, None, None
        dtypes = (grad_output.dtype, ctx.compute_dtype, lora_A.dtype, lora_B.dtype)
        name, is_matrix = "linear_backward", grad_output.dim() == 2
        with below_autograd():
            dy = grad_output if is_matrix else grad_output.reshape(-1, grad_output.shape[-1])
            if x is not None and not is_matrix:
                x = x.reshape(-1, x.shape[-1])
            operands = (dy, x, weight, lora_A, lora_B, ctx.scaling, ctx.compute_dtype)
            grad_x, grad_A = compute(name, name, dy, lora_A.shape[0], dtypes, *operands)
            if grad_x is not None and not is_matrix:
                grad_x = grad_x.view(*grad_output.shape[:-1], lora_A.shape[1])
        return grad_x, None, grad_A, None, None, None, None


# ---------------------------------------------------------------------------------------------------
# embedding
# ---------------------------------------------------------------------------------------------------


def _embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    dtypes = (lora_A.dtype, compute_dtype or lora_A.dtype, lora_B.dtype)
    operands = (indices.reshape(-1), lora_A, lora_B, scaling, compute_dtype)
    out = compute("embedding", "embedding", lora_A, lora_A.shape[0], dtypes, *operands)
    return out.view(*indices.shape, out.shape[-1])


def _embedding_plain(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    """`_embedding` for transforms to differentiate: column ``padding_idx`` has a tangent but no gradient."""
    if padding_idx is not None:
        every = torch.arange(lora_A.shape[1], device=lora_A.device)
        lora_A = F.embedding(every, lora_A.t(), padding_idx=padding_idx).t()
    return _embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype)


def _embedding_backward(grad_output, indices, lora_A, lora_B, scaling, padding_idx):
    dy, flat = grad_output.reshape(-1, grad_output.shape[-1]), indices.reshape(-1)
    dtypes = (dy.dtype, lora_A.dtype, lora_B.dtype)
    operands = (dy, flat, lora_A, lora_B, scaling, padding_idx)
    name = "embedding_backward"
    with no_autocast(dy):
        return compute(name, name, dy, lora_A.shape[0], dtypes, *operands)


def _embedding_fake(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    return lora_A.new_empty(*indices.shape, lora_B.shape[0], dtype=compute_dtype or lora_A.dtype)


def _embedding_backward_fake(grad_output, indices, lora_A, lora_B, scaling, padding_idx):
    return lora_A.new_empty(lora_A.shape)


class _MicaEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
        ctx.scaling, ctx.padding_idx = scaling, padding_idx
        ctx.save_for_backward(indices, lora_A, lora_B)
        with below_autograd():
            return run(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype)

    @staticmethod
    def backward(ctx, grad_output):
        tensors = grad_output, *ctx.saved_tensors
        args = *tensors, ctx.scaling, ctx.padding_idx
        grad_A = run_backward(torch.ops.mica.embedding_backward, _embedding_backward, tensors, *args)
        return None, None, grad_A, None, None, None, None


# ---------------------------------------------------------------------------------------------------
# merge
# ---------------------------------------------------------------------------------------------------


def _merge(weight, lora_A, lora_B, scaling):
    dtypes = (weight.dtype, lora_A.dtype, lora_B.dtype)
    return compute("merge", "merge", weight, lora_A.shape[0], dtypes, weight, lora_A, lora_B, scaling)


def _merge_fake(weight, lora_A, lora_B, scaling):
    return torch.empty_like(weight)


# ---------------------------------------------------------------------------------------------------
# registration
# ---------------------------------------------------------------------------------------------------


def _linear_under_autocast(device_type):
    def under_autocast(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None):
        x, weight, bias = (autocast_to(tensor, device_type) for tensor in (x, weight, bias))
        with no_autocast(x):
            return linear(x, weight, lora_A, lora_B, scaling, bias, None, dropout_p, seed)

    return under_autocast


def _embedding_under_autocast(device_type):
    def under_autocast(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
        is_wide = torch.float64 in (lora_A.dtype, lora_B.dtype)  # left as it is, as by `autocast_to`
        dtype = compute_dtype if is_wide else torch.get_autocast_dtype(device_type)
        with no_autocast(indices):
            return embedding(indices, lora_A, lora_B, scaling, padding_idx, dtype)

    return under_autocast


def _merge_under_autocast(device_type):
    def merge(weight, lora_A, lora_B, scaling):
        with no_autocast(weight):
            return torch.ops.mica.merge(weight, lora_A, lora_B, scaling)

    return merge


define(
    "linear",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias,"
    " ScalarType? compute_dtype, float dropout_p=0.0, Tensor? seed=None) -> Tensor",
    _linear,
    _linear_fake,
)
define(
    "linear_backward",
    "(Tensor grad_output, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling,"
    " ScalarType compute_dtype, bool[2] output_mask, float dropout_p=0.0, Tensor? seed=None)"
    " -> (Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
define(
    "embedding",
    "(Tensor indices, Tensor lora_A, Tensor lora_B, float scaling, int? padding_idx,"
    " ScalarType? compute_dtype) -> Tensor",
    _embedding,
    _embedding_fake,
)
define(
    "embedding_backward",
    "(Tensor grad_output, Tensor indices, Tensor lora_A, Tensor lora_B, float scaling, int? padding_idx)"
    " -> Tensor",
    _embedding_backward,
    _embedding_backward_fake,
)
define("merge", "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor", _merge, _merge_fake)
differentiate("linear", _MicaLinear.apply, _linear)
differentiate("embedding", _MicaEmbedding.apply, _embedding_plain)
autocast("linear", _linear_under_autocast)
autocast("embedding", _embedding_under_autocast)
autocast("merge", _merge_under_autocast)

# What `mica.fast` calls, and the public functions once they have checked their arguments.
linear = front("linear", _MicaLinear.apply, _linear, _linear_under_autocast)
embedding = front("embedding", _MicaEmbedding.apply, _embedding, _embedding_under_autocast)


def linear_directly(x, weight, lora_A, lora_B, scaling, bias, compute_dtype) -> Tensor:
    """`linear` without dropout where it is known that `is_direct` holds and that there is no autocast."""
    if torch.is_grad_enabled() and (lora_A.requires_grad or x.requires_grad):
        return _DirectLinear.apply(x, weight, lora_A, lora_B, scaling, bias, compute_dtype)
    with below_autograd():
        return _linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype)
