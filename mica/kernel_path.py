"""The operators' bodies on Triton kernels: which kernels make up a formula of `mica.reference`.

Four forms of the same call, the first by default; `mica.kernels.tuning` takes another one only where it has
been measured to be faster on the device.

    split       h = down(x, A); y = x Wᵀ + bias by the vendor's library; y += h Bᵀ in place
    fused       the second and third in one kernel, by pointers
    descriptor  the same, persistent and with tensor descriptors
    aten        no kernel at all: the reference (`addmm_`), the control that the others must beat
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mica import backend, reference
from mica.kernels import tuning
from mica.kernels.common import LaunchError, target_of
from mica.kernels.down_projection import down_projection
from mica.kernels.embedding import embedding as embedding_kernel
from mica.kernels.embedding import grad_a_embedding
from mica.kernels.fused_linear import fused_linear, why_not_descriptor
from mica.kernels.grad_a import grad_a
from mica.kernels.merge import merge as merge_kernel
from mica.kernels.prepared import prepare
from mica.kernels.up_projection import up_projection_

__all__ = ["LaunchError", "embedding", "embedding_backward", "forward", "linear_backward", "merge"]


def _choose(name: str, x: Tensor, w: Tensor, rank: int, dtype: torch.dtype, dropout_p: float, run) -> str:
    """The form to run. x (M×K), w (K×N); ``run(form)`` runs one of them."""
    if tuning.is_idle():
        return "split"
    forms = ["split", "fused"]
    if why_not_descriptor(x, w, target_of(x.device)) is None:
        forms.append("descriptor")
    if backend.requested() == "auto":
        forms.append("aten")
    key = (tuning.bucket(x.shape[0]), *w.shape, rank, x.dtype, dtype, dropout_p > 0, w.stride(0) == 1)
    return tuning.pick(name, x.device, key, {form: functools.partial(run, form) for form in forms})


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """As `mica.reference.forward`."""
    dtype = compute_dtype or x.dtype

    def run(form: str) -> Tensor:
        if form == "aten":
            return reference.forward(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)
        h = down_projection(x, lora_A, scale=scaling, compute_dtype=dtype, dropout_p=dropout_p, seed=seed)
        factor = prepare(lora_B, dtype).t()
        if form == "split":
            return up_projection_(F.linear(x, weight, bias), h, factor)
        return fused_linear(x, weight.t(), h, factor, bias=bias, descriptor=form == "descriptor")

    return run(_choose("linear", x, weight.t(), lora_A.shape[0], dtype, dropout_p, run))


def linear_backward(
    grad_output: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    compute_dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dA) as `mica.reference.grad_x` and `grad_a` give them; None where weight or x is None."""
    grad_x = grad_A = None
    g = down_projection(
        grad_output, prepare(lora_B, compute_dtype).t(), scale=scaling, compute_dtype=compute_dtype
    )
    if x is not None:
        options = {"dropout_p": dropout_p, "seed": seed}
        grad_A = grad_a(g, x, lora_A.shape[0], out_dtype=lora_A.dtype, **options)
    if weight is not None:
        grad_x = _grad_x(grad_output, weight, g, lora_A, dropout_p, seed)
    return grad_x, grad_A


def _grad_x(dy: Tensor, weight: Tensor, g: Tensor, lora_A: Tensor, dropout_p: float, seed) -> Tensor:
    rank = lora_A.shape[0]

    def run(form: str) -> Tensor:
        if form == "aten":
            return reference.grad_x(dy, weight, g[:, :rank], lora_A, dropout_p, seed)
        options = {"dropout_p": dropout_p, "seed": seed}
        if form == "split":
            return up_projection_(dy @ weight, g, lora_A, **options)
        return fused_linear(dy, weight, g, lora_A, descriptor=form == "descriptor", **options)

    return run(_choose("linear_backward", dy, weight, rank, g.dtype, dropout_p, run))


def embedding(
    indices: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, compute_dtype: torch.dtype | None
) -> Tensor:
    """As `mica.reference.embedding`."""
    dtype = compute_dtype or lora_A.dtype
    factor = prepare(lora_B, dtype).t()
    return embedding_kernel(indices, lora_A, factor, scale=scaling, compute_dtype=dtype)


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """As `mica.reference.merge`."""
    return merge_kernel(weight, lora_A, lora_B, scale=scaling)


def embedding_backward(
    grad_output: Tensor,
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None,
) -> Tensor:
    """As `mica.reference.grad_a_embedding`, in the dtype of lora_A; the column padding_idx is 0."""
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    g = down_projection(grad_output, prepare(lora_B, dtype).t(), scale=scaling, compute_dtype=dtype)
    return grad_a_embedding(g, indices, *lora_A.shape, padding_idx=padding_idx, out_dtype=lora_A.dtype)
