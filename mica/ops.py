"""The operators ``torch.ops.mica.*`` and their Python front: shapes, dtypes, autograd, choice of path.

``define`` / ``impl`` with an autograd.Function on the Autograd key, not ``custom_op``: half the overhead
a call (51 against 87 µs forward + backward, tiny bodies, CPU), and ``opcheck``, ``torch.compile`` with
``fullgraph=True`` and autocast all hold. The maths is `mica.reference`'s; this file states none of it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from mica import reference

# How often each operator's body ran, eager or compiled: the proof that a path was taken. Counted in the
# bodies, which torch.compile never looks into.
call_counts: Counter[str] = Counter()

_LIBRARY = torch.library.Library("mica", "DEF")
for _schema in (
    "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias,"
    " ScalarType? compute_dtype) -> Tensor",
    "linear_backward(Tensor grad_output, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B,"
    " float scaling, ScalarType compute_dtype, bool[2] output_mask) -> (Tensor, Tensor)",
    "embedding(Tensor indices, Tensor lora_A, Tensor lora_B, float scaling, int? padding_idx,"
    " ScalarType? compute_dtype) -> Tensor",
    "embedding_backward(Tensor grad_output, Tensor indices, Tensor lora_A, Tensor lora_B, float scaling,"
    " int? padding_idx) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def mica_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """A frozen linear layer with its MiCA adapter: x Wᵀ + bias + scaling·(x Aᵀ) Bᵀ.

    Args:
        x: (..., in_features), fp64/fp32/bf16/fp16.
        weight: (out_features, in_features), frozen, in the dtype of x. A transposed view is fine.
        lora_A: (rank, in_features), trained; the dtype of x, or an fp32 master over 16-bit x.
        lora_B: (out_features, rank), frozen; dtypes as for lora_A.
        scaling: lora_alpha / rank, dimensionless.
        bias: (out_features), frozen, in the dtype of x.
        compute_dtype: dtype of the low-rank products; default the dtype of x. Under autocast everything
            runs in autocast's dtype, as PEFT's layer does.

    Returns:
        (..., out_features) in the dtype of x (of autocast where it is on).

    Gradients: lora_A's in its own dtype, accumulated in fp32; x's where x needs it. Saved for the
    backward: x as it came and references to the operands. Definition: `mica.reference` (arXiv 2604.01694).

    Raises:
        ValueError: shapes that do not fit, or a frozen operand that requires a gradient.
    """
    rank = lora_A.shape[0]
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and weight (out_features, in_features), but x is "
            f"{tuple(x.shape)} and weight {tuple(weight.shape)}."
        )
    if lora_A.shape != (rank, weight.shape[1]) or lora_B.shape != (weight.shape[0], rank):
        raise ValueError(
            f"for a weight of shape {tuple(weight.shape)} lora_A must be (rank, in_features) and lora_B "
            f"(out_features, rank), but they are {tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), but it is {tuple(bias.shape)}.")
    _require_frozen(weight=weight, lora_B=lora_B, bias=bias)
    return torch.ops.mica.linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype)


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
        ValueError: shapes that do not fit, or lora_B requires a gradient.
    """
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            "lora_A must be (rank, num_embeddings) and lora_B (embedding_dim, rank), but they are "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}."
        )
    _require_frozen(lora_B=lora_B)
    return torch.ops.mica.embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype)


def _require_frozen(**operands: Tensor | None) -> None:
    for name, tensor in operands.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must be frozen in MiCA (requires_grad=False), but it requires a gradient."
            )


# ---------------------------------------------------------------------------------------------------
# linear
# ---------------------------------------------------------------------------------------------------


def _linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype):
    call_counts["linear"] += 1
    y = reference.forward(x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, scaling, bias, compute_dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def _linear_backward(grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask):
    call_counts["linear_backward"] += 1
    needs_x, needs_A = output_mask
    grad_x = grad_A = None
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    with _no_autocast(dy):
        g = reference.grad_h(dy, lora_B, scaling, compute_dtype)
        if needs_x:
            grad_x = reference.grad_x(dy, weight, g, lora_A)
            grad_x = grad_x.view(*grad_output.shape[:-1], grad_x.shape[-1])
        if needs_A:
            grad_A = reference.grad_a(g, x.reshape(-1, x.shape[-1])).to(lora_A.dtype)
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in (grad_x, grad_A))


def _linear_fake(x, weight, lora_A, lora_B, scaling, bias, compute_dtype):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_backward_fake(grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask):
    needs_x, needs_A = output_mask
    grad_x = grad_output.new_empty(*grad_output.shape[:-1], lora_A.shape[1]) if needs_x else None
    grad_A = lora_A.new_empty(lora_A.shape) if needs_A else None
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in (grad_x, grad_A))


class _MicaLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias, compute_dtype):
        needs_x, _, needs_A = ctx.needs_input_grad[:3]
        ctx.scaling, ctx.compute_dtype = scaling, compute_dtype or x.dtype
        # x as it came: no fp32 copy, no h. What no gradient needs is not kept.
        ctx.save_for_backward(x if needs_A else None, weight if needs_x else None, lora_A, lora_B)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mica.linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        # Under `create_graph=True` the plain formulas run with autograd on, so higher derivatives hold.
        backward = _linear_backward if torch.is_grad_enabled() else torch.ops.mica.linear_backward
        grad_x, grad_A = backward(
            grad_output, x, weight, lora_A, lora_B, ctx.scaling, ctx.compute_dtype, mask
        )
        return grad_x if mask[0] else None, None, grad_A if mask[1] else None, None, None, None, None


# ---------------------------------------------------------------------------------------------------
# embedding
# ---------------------------------------------------------------------------------------------------


def _embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    call_counts["embedding"] += 1
    out = reference.embedding(indices.reshape(-1), lora_A, lora_B, scaling, compute_dtype)
    return out.view(*indices.shape, out.shape[-1])


def _embedding_backward(grad_output, indices, lora_A, lora_B, scaling, padding_idx):
    call_counts["embedding_backward"] += 1
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    with _no_autocast(dy):
        grad_A = reference.grad_a_embedding(dy, indices.reshape(-1), lora_B, scaling, lora_A.shape[1])
    if padding_idx is not None:
        trained = torch.arange(grad_A.shape[1], device=grad_A.device) != padding_idx
        grad_A = grad_A.where(trained, 0)
    return grad_A.to(lora_A.dtype)


def _embedding_fake(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    return lora_A.new_empty(*indices.shape, lora_B.shape[0], dtype=compute_dtype or lora_A.dtype)


def _embedding_backward_fake(grad_output, indices, lora_A, lora_B, scaling, padding_idx):
    return lora_A.new_empty(lora_A.shape)


class _MicaEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
        ctx.scaling, ctx.padding_idx = scaling, padding_idx
        ctx.save_for_backward(indices, lora_A, lora_B)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mica.embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype)

    @staticmethod
    def backward(ctx, grad_output):
        backward = _embedding_backward if torch.is_grad_enabled() else torch.ops.mica.embedding_backward
        grad_A = backward(grad_output, *ctx.saved_tensors, ctx.scaling, ctx.padding_idx)
        return None, grad_A, None, None, None, None


# ---------------------------------------------------------------------------------------------------
# autocast: as PEFT's layers do under it, all products in autocast's dtype; A stays its fp32 master
# ---------------------------------------------------------------------------------------------------


def _no_autocast(tensor):
    """Off for the products of a body: a user who calls backward inside autocast gets the same dA."""
    return torch.autocast(tensor.device.type, enabled=False)


def _autocast(device_type):
    def cast(tensor):
        if tensor is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype):
        with _no_autocast(x):
            return torch.ops.mica.linear(cast(x), cast(weight), lora_A, lora_B, scaling, cast(bias), None)

    def embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
        dtype = torch.get_autocast_dtype(device_type)
        with _no_autocast(indices):
            return torch.ops.mica.embedding(indices, lora_A, lora_B, scaling, padding_idx, dtype)

    return linear, embedding


def _differentiable(function, body):
    """Under torch.func (grad, jvp, vmap) the plain formulas run, which every transform can follow."""

    def autograd(*args):
        transformed = torch._C._are_functorch_transforms_active()
        return body(*args) if transformed else function.apply(*args)

    return autograd


for _name, _body, _fake in (
    ("linear", _linear, _linear_fake),
    ("linear_backward", _linear_backward, _linear_backward_fake),
    ("embedding", _embedding, _embedding_fake),
    ("embedding_backward", _embedding_backward, _embedding_backward_fake),
):
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mica::{_name}", _fake, lib=_LIBRARY)
for _name, _function, _body in (
    ("linear", _MicaLinear, _linear),
    ("embedding", _MicaEmbedding, _embedding),
):
    _LIBRARY.impl(_name, _differentiable(_function, _body), "Autograd")
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name, _body in zip(("linear", "embedding"), _autocast(_device), strict=True):
        _LIBRARY.impl(_name, _body, _key)
