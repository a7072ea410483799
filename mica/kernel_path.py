"""The operators' bodies on Triton kernels: which kernels make up a formula of `mica.reference`.

Four forms of the same call, the first by default; `mica.kernels.tuning` selects another only where that has
been measured to be faster on the device.

    split       h = down(x, A); y = x Wᵀ + bias by the vendor's library; y += h Bᵀ in place
    fused       the second and third in one kernel, by pointers
    descriptor  the same, persistent and with tensor descriptors
    aten        no kernel at all: the reference (`addmm_`), the baseline that the others must beat
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mica import backend, reference
from mica.kernels import down_projection as down_kernel
from mica.kernels import grad_a as grad_a_kernel
from mica.kernels import tuning
from mica.kernels import up_projection as up_kernel
from mica.kernels.common import LaunchError, NotLoadedError, fp32_setting, target_of
from mica.kernels.embedding import embedding as embedding_kernel
from mica.kernels.embedding import grad_a_embedding
from mica.kernels.fused_linear import fused_linear, why_not_descriptor
from mica.kernels.launching import Plans, layout
from mica.kernels.limits import padded_columns
from mica.kernels.prepared import prepare

__all__ = [
    "LaunchError",
    "NotLoadedError",
    "down_projection",
    "down_projection_backward",
    "embedding",
    "embedding_backward",
    "linear",
    "linear_backward",
    "linear_group",
    "linear_group_backward",
    "up_projection",
    "up_projection_backward",
]


def choose_form(name: str, x: Tensor, w: Tensor, rank: int, dtype: torch.dtype, dropout_p: float, run) -> str:
    """The form to run where something is tuned. x (M×K), w (K×N); ``run(form)`` runs one of them."""
    forms = ["split", "fused"]
    if why_not_descriptor(x, w, target_of(x.device)) is None:
        forms.append("descriptor")
    if backend.requested() == "auto":
        forms.append("aten")
    key = (tuning.bucket(x.shape[0]), *w.shape, rank, x.dtype, dtype, dropout_p > 0, w.stride(0) == 1)
    return tuning.pick(name, x.device, key, {form: functools.partial(run, form) for form in forms})


# From these sizes on an A that is wider than the products' dtype is rounded before the launches. Each row of
# tiles reads all of it through the L2 cache: 8192 tokens read 134 MB of an fp32 A (64 x 4096), 67 MB of x.
# Rounding is one more launch, and with fewer tokens the host, not the device, determines a layer's time.
WIDE_RANK, MANY_TOKENS = 64, 2048


def as_operand(lora_A: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """lora_A as kernels read it fastest, for products in ``dtype``: they round to that, so no bit differs.

    The rounded copy is not kept for the next call: a write through ``lora_A.data`` changes no version.
    """
    if lora_A.shape[0] < WIDE_RANK or num_tokens < MANY_TOKENS or lora_A.dtype.itemsize <= dtype.itemsize:
        return lora_A
    return lora_A.to(dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """As `mica.reference.linear`."""
    arguments = (x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)
    if tuning.is_idle():
        return _linear_by("split", *arguments) if dropout_p else planned_linear(*arguments[:7])

    def run(form: str) -> Tensor:
        return _linear_by(form, *arguments)

    dtype = compute_dtype or x.dtype
    return run(choose_form("linear", x, weight.t(), lora_A.shape[0], dtype, dropout_p, run))


# The plans of all launches of a layer's forward, or backward, without dropout. Their own keys also hold h, g,
# y and dx, which follow from these keys: looking plans up one by one costs a layer 9 µs more. The last entry
# is whether A is rounded first.
forward_plans, backward_plans = Plans(), Plans()


def planned_linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype) -> Tensor:
    """`_linear_by` "split", with plans that are looked up together."""
    key = (tuning.state(), layout(x), layout(lora_A), layout(lora_B), scaling, compute_dtype, fp32_setting())
    plans, dtype = forward_plans.get(key), compute_dtype or x.dtype
    if plans is not None:
        down, up, rounded = plans
        h = down_kernel.run(down, x, lora_A.to(dtype) if rounded else lora_A)
        y = F.linear(x, weight, bias)
        if y.is_contiguous():
            return up_kernel.run(up, y, h, prepare(lora_B, dtype))
        return up_kernel.up_projection_(y, h, prepare(lora_B, dtype))
    options, operand = {"scale": scaling, "compute_dtype": dtype}, as_operand(lora_A, len(x), dtype)
    h, factor = down_kernel.down_projection(x, operand, **options), prepare(lora_B, dtype)
    y = up_kernel.up_projection_(F.linear(x, weight, bias), h, factor)
    plans = (
        down_kernel.plans.get(down_kernel.key_of(x, operand, **options)),
        up_kernel.plans.get(up_kernel.key_of(y, h, factor)),
        operand is not lora_A,
    )
    if None not in plans and y.is_contiguous():
        forward_plans.keep(key, plans)
    return y


def _linear_by(form: str, x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed) -> Tensor:
    if form == "aten":
        return reference.linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)
    dtype = compute_dtype or x.dtype
    options = {"compute_dtype": dtype, "dropout_p": dropout_p, "seed": seed}
    h = down_kernel.down_projection(x, as_operand(lora_A, len(x), dtype), scale=scaling, **options)
    factor = prepare(lora_B, dtype)
    if form == "split":
        return up_kernel.up_projection_(F.linear(x, weight, bias), h, factor)
    return fused_linear(x, weight.t(), h, factor, bias=bias, descriptor=form == "descriptor")


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
    if tuning.is_idle() and not dropout_p and x is not None and weight is not None:
        return _planned_backward(grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype)
    grad_x = grad_A = None
    g = _grad_h(grad_output, lora_B, scaling, compute_dtype)
    if x is not None:
        options = {"dropout_p": dropout_p, "seed": seed}
        grad_A = grad_a_kernel.grad_a(g, x, lora_A.shape[0], out_dtype=lora_A.dtype, **options)
    if weight is not None:
        grad_x = _grad_x(grad_output, weight, g, lora_A, dropout_p, seed)
    return grad_x, grad_A


def _planned_backward(dy, x, weight, lora_A, lora_B, scaling, dtype) -> tuple[Tensor, Tensor]:
    """`linear_backward` "split", both gradients, with plans that are looked up together."""
    tensors = layout(dy), layout(x), layout(lora_A)
    key = (tuning.state(), *tensors, scaling, dtype, fp32_setting())
    plans, factor = backward_plans.get(key), prepare(lora_B, dtype)
    if plans is not None:
        down, grad, up, rounded = plans
        g = down_kernel.run(down, dy, factor)
        grad_A, grad_x = grad_a_kernel.run(grad, g, x), torch.mm(dy, weight)
        operand = lora_A.to(dtype) if rounded else lora_A
        if grad_x.is_contiguous():
            return up_kernel.run(up, grad_x, g, operand), grad_A
        return up_kernel.up_projection_(grad_x, g, operand), grad_A
    scaled, rounded = {"scale": scaling, "compute_dtype": dtype}, {"out_dtype": lora_A.dtype}
    g, rank = down_kernel.down_projection(dy, factor, **scaled), lora_A.shape[0]
    grad_A = grad_a_kernel.grad_a(g, x, rank, **rounded)
    operand = as_operand(lora_A, len(dy), dtype)
    grad_x = up_kernel.up_projection_(torch.mm(dy, weight), g, operand)
    plans = (
        down_kernel.plans.get(down_kernel.key_of(dy, factor, **scaled)),
        grad_a_kernel.plans.get(grad_a_kernel.key_of(g, x, rank, **rounded)),
        up_kernel.plans.get(up_kernel.key_of(grad_x, g, operand)),
        operand is not lora_A,
    )
    if None not in plans and grad_x.is_contiguous():
        backward_plans.keep(key, plans)
    return grad_x, grad_A


def _grad_h(dy: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """`mica.reference.grad_h`, as wide as prepared B."""
    return down_kernel.down_projection(dy, prepare(lora_B, dtype), scale=scaling, compute_dtype=dtype)


def _grad_x(dy: Tensor, weight: Tensor, g: Tensor, lora_A: Tensor, dropout_p: float, seed) -> Tensor:
    if tuning.is_idle():
        return _grad_x_by("split", dy, weight, g, lora_A, dropout_p, seed)

    def run(form: str) -> Tensor:
        return _grad_x_by(form, dy, weight, g, lora_A, dropout_p, seed)

    return run(choose_form("linear_backward", dy, weight, lora_A.shape[0], g.dtype, dropout_p, run))


def _grad_x_by(form: str, dy, weight, g, lora_A, dropout_p, seed) -> Tensor:
    if form == "aten":
        return reference.grad_x(dy, weight, g[:, : lora_A.shape[0]], lora_A, dropout_p, seed)
    options, operand = {"dropout_p": dropout_p, "seed": seed}, as_operand(lora_A, len(dy), g.dtype)
    if form == "split":
        return up_kernel.up_projection_(dy @ weight, g, operand, **options)
    return fused_linear(dy, weight, g, operand, descriptor=form == "descriptor", **options)


def embedding(
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `mica.reference.embedding`."""
    dtype = compute_dtype or lora_A.dtype
    factor = prepare(lora_B, dtype)
    return embedding_kernel(indices, lora_A, factor, scale=scaling, compute_dtype=dtype)


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
    g = _grad_h(grad_output, lora_B, scaling, dtype)
    return grad_a_embedding(g, indices, *lora_A.shape, padding_idx=padding_idx, out_dtype=lora_A.dtype)


# ---------------------------------------------------------------------------------------------------
# the two factors alone, next to a base layer that is called
# ---------------------------------------------------------------------------------------------------


def down_projection(
    x: Tensor,
    lora_A: Tensor,
    scaling: float,
    compute_dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """As `mica.reference.down_projection`."""
    options = {"compute_dtype": compute_dtype, "dropout_p": dropout_p, "seed": seed}
    h = down_kernel.down_projection(x, as_operand(lora_A, len(x), compute_dtype), scale=scaling, **options)
    return h[:, : lora_A.shape[0]].contiguous()


def up_projection(y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
    """As `mica.reference.up_projection`."""
    dtype = torch.promote_types(y.dtype, h.dtype)
    out = y.new_empty(y.shape)  # contiguous, as torch.compile is told; empty_like would keep y's strides
    return up_kernel.up_projection_(y, h, prepare(lora_B, dtype), out=out, compute_dtype=dtype)


def up_projection_backward(grad_output: Tensor, lora_B: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """As `mica.reference.up_projection_backward`."""
    return _grad_h(grad_output, lora_B, 1.0, compute_dtype)[:, : lora_B.shape[1]].contiguous()


def down_projection_backward(
    grad_h: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    scaling: float,
    needs_x: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `mica.reference.down_projection_backward`."""
    grad_x = grad_A = None
    options = {"dropout_p": dropout_p, "seed": seed}
    if x is not None:
        # scaled before it is rounded to the dtype of A
        grad_A = (grad_a_kernel.grad_a(grad_h, x, lora_A.shape[0], **options) * scaling).to(lora_A.dtype)
    if needs_x and dropout_p:
        grad_x = grad_h.new_zeros(len(grad_h), lora_A.shape[1])
        operand = as_operand(lora_A, len(grad_h), grad_h.dtype)
        up_kernel.up_projection_(grad_x, grad_h, operand, scale=scaling, **options)
    elif needs_x:  # nothing to add to: the vendor's product writes what the kernel would
        grad_x = reference.grad_x_update(grad_h, lora_A * scaling)
    return grad_x, grad_A


# ---------------------------------------------------------------------------------------------------
# several layers on one x
# ---------------------------------------------------------------------------------------------------


def _stacked(lora_As: list[Tensor], scalings: list[float] | None = None) -> Tensor:
    """`mica.reference.stacked`, each A with rows of 0 up to a multiple of 16: slices of h stay aligned."""
    scalings = scalings or [1.0] * len(lora_As)
    padding = [padded_columns(lora_A.shape[0]) - lora_A.shape[0] for lora_A in lora_As]
    return reference.stacked(
        [F.pad(A, (0, 0, 0, rows)) if rows else A for A, rows in zip(lora_As, padding, strict=True)], scalings
    )


def linear_group(
    x: Tensor,
    weights: list[Tensor],
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scalings: list[float],
    biases: list[Tensor | None],
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """As `mica.reference.linear_group`."""
    dtype = compute_dtype or x.dtype
    factors = [prepare(lora_B, dtype) for lora_B in lora_Bs]
    operand = as_operand(_stacked(lora_As, scalings), len(x), dtype)
    h = down_kernel.down_projection(x, operand, compute_dtype=dtype)
    parts = h.split([factor.shape[0] for factor in factors], dim=1)
    operands = zip(weights, biases, parts, factors, strict=True)
    return [
        up_kernel.up_projection_(F.linear(x, weight, bias), part, factor)
        for weight, bias, part, factor in operands
    ]


def linear_group_backward(
    grad_outputs: list[Tensor | None],
    x: Tensor | None,
    weights: list[Tensor] | None,
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    scalings: list[float],
    compute_dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """As `mica.reference.linear_group_backward`."""
    columns = [padded_columns(lora_A.shape[0]) for lora_A in lora_As]
    g = reference.group_grad_h(_grad_h, grad_outputs, lora_Bs, scalings, compute_dtype, columns)
    grad_x = grad_As = None
    if x is not None:
        grad_As = reference.group_gradients(grad_a_kernel.grad_a(g, x, g.shape[1]), lora_As, columns)
    if weights is not None:
        (dy, weight), *others = reference.used_pairs(grad_outputs, weights)
        grad_x = dy @ weight
        for dy, weight in others:
            grad_x.addmm_(dy, weight)
        up_kernel.up_projection_(grad_x, g, as_operand(_stacked(lora_As), len(g), compute_dtype))
    return grad_x, grad_As
