"""The low-rank term of an embedding, to be added to the base embedding: scaling·A[:, indices]ᵀ Bᵀ.

It takes the reference path on every device: it gathers a few columns of A, and there is no base product to
fuse it with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mica.ops.operator import (
    below_autograd,
    call_counts,
    like,
    no_autocast,
    operator,
    run_backward,
    save,
    saved,
    without_values,
)
from mica.paths import reference_path


def _embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    call_counts["embedding"] += 1
    out = reference_path.embedding(indices.reshape(-1), lora_A, lora_B, scaling, compute_dtype)
    return like((*indices.shape, out.shape[-1]), out)


def _embedding_on_reference(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    """`_embedding` for transforms to differentiate: column ``padding_idx`` has a tangent but no gradient."""
    if padding_idx is not None:
        every = torch.arange(lora_A.shape[1], device=lora_A.device)
        lora_A = F.embedding(every, lora_A.t(), padding_idx=padding_idx).t()
    return _embedding(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype)


def _embedding_backward(grad_output, indices, lora_A, lora_B, scaling, padding_idx):
    dy, flat = grad_output.reshape(-1, grad_output.shape[-1]), indices.reshape(-1)
    call_counts["embedding_backward"] += 1
    with no_autocast():
        return reference_path.embedding_backward(dy, flat, lora_A, lora_B, scaling, padding_idx)


def _embedding_fake(indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    return lora_A.new_empty(*indices.shape, lora_B.shape[0], dtype=compute_dtype or lora_A.dtype)


def _embedding_backward_fake(grad_output, indices, lora_A, *_):
    return lora_A.new_empty(lora_A.shape)


class _MicaEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, indices, lora_A, lora_B, *numbers):
        ctx.scaling, ctx.padding_idx, _ = numbers
        save(ctx, indices, without_values(lora_A), lora_B)
        with below_autograd():
            return run(indices, lora_A, lora_B, *numbers)

    @staticmethod
    def backward(ctx, grad_output):
        tensors = grad_output, *saved(ctx)
        args = *tensors, ctx.scaling, ctx.padding_idx
        grad_A = run_backward(torch.ops.mica.embedding_backward, _embedding_backward, tensors, *args)
        return None, None, grad_A, *[None] * 4


def _cast(device_type, indices, lora_A, lora_B, scaling, padding_idx, compute_dtype):
    if torch.float64 not in (lora_A.dtype, lora_B.dtype):  # left as it is, as by `autocast_to`
        compute_dtype = torch.get_autocast_dtype(device_type)
    return indices, lora_A, lora_B, scaling, padding_idx, compute_dtype


# indices: of any shape, int32 or int64, below num_embeddings. lora_A (rank, num_embeddings) is trained, and
# lora_B (embedding_dim, rank) frozen. padding_idx: the column of lora_A that gets no gradient, not below 0.
# compute_dtype: that of the product and of the result (*indices.shape, embedding_dim); None: that of lora_A,
# under autocast autocast's.
embedding = operator(
    "embedding",
    "(Tensor indices, Tensor lora_A, Tensor lora_B, float scaling, int? padding_idx,"
    " ScalarType? compute_dtype) -> Tensor",
    _embedding,
    _embedding_fake,
    _MicaEmbedding.apply,
    _cast,
    _embedding_on_reference,
)
operator(
    "embedding_backward",
    "(Tensor grad_output, Tensor indices, Tensor lora_A, Tensor lora_B, float scaling, int? padding_idx)"
    " -> Tensor",
    _embedding_backward,
    _embedding_backward_fake,
)
