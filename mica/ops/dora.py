"""DoRA's part of a linear layer: every row of W + s·B·A gets a trained norm (arXiv 2402.09353).

    z  = x Wᵀ + s·x Aᵀ Bᵀ     what the layer computes without its bias
    y  = g⊙z + bias           g = m / n: m (N) is trained; n (N), the norms of the rows of W + s·B·A, is a
                              constant for autograd
    dz = g⊙dy
    dm = (Σ dy⊙z) / n         summed over the tokens

z may hold the bias already, and then y = g⊙(z + bias) + (1 − g)⊙bias: where g is 1, as in a fresh adapter,
this is to the last bit what the base layer returns. In 16 bits a large bias would hide what z is.

With dropout it is PEFT's formula: y = y₀ + (g − 1)⊙z', with y₀ = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ and z' the
z of drop(x). A row without a norm, of zeros, is not scaled.

z is kept for dm. y could give it back, as (y − bias) / g, but in 16 bits not where the bias is large or g
small. Where autograd would keep y as well (those of a gated MLP's first layers, v), y is computed again from
z instead (`mica.ops.recompute`), so that one of the two is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mica.memory import has_no_values
from mica.ops import recompute
from mica.ops.computed import Computed, Part
from mica.ops.operator import as_matrix, below_autograd, like, no_autocast, run_formula, save, saved
from mica.paths import columns, dropout
from mica.paths.products import is_transformed, multiplies_itself, unrounded

# Where n² is a smaller share of ‖w‖² the update cancels much of the row, and n is computed from W + s·B·A
# itself. No row of SmolLM2's weights is one under random updates 0.1 to 10 times as large as they are.
_CANCELLED = 0.375
# Where that is not done n² is taken to be no less a share, as rounding alone can make it that: where W is
# multiplied in 32 bits, and in 16.
_LEAST, _LEAST_IN_16_BITS = 6e-6, 6e-3

# Rows of a weight whose wider copy is alive at a time: on a device, or where they are computed plainly
_ROWS = 1024
_CACHED = 2**17  # numbers of such a copy that stay in the cache of a CPU


# ---------------------------------------------------------------------------------------------------
# the norms
# ---------------------------------------------------------------------------------------------------


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """n of each row of W + s·B·A (N), in fp32 at least, without gradients; ∞ of a row without a norm.

    n² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (AAᵀ) bᵀ of the rows w and b of W and B. A 16-bit W is multiplied by A in
    its own dtype where the processor can: on a CPU n of an update as large as W is then off by 4e-5 with 576
    columns and 2e-5 with 2048 (root mean square in bf16; of 2048 rows at most 2e-4 and 1e-4). Rows that the
    update cancels are computed plainly on a CPU. Elsewhere, and in compiled code, to find them would have to
    wait for the device: n is then off by up to 1.5 % where it is a third of ‖w‖ (3 % at 0.23) in bf16, and by
    0.5 % at 0.01 in fp32. It is never taken for less than 0.077·‖w‖ and 0.0024·‖w‖, so that y of a row that
    is cancelled further is too small, and never wild.
    Where the update is 0, as that of a fresh adapter, n is ‖w‖ itself. √(‖w‖²) need not be: MKL does not
    round roots correctly, and of a million in fp64 90 differed on an Intel Xeon.

    Args:
        weight: (N×K).
        lora_A: (r×K).
        lora_B: (N×r).
        scaling: s.
    """
    without = no_autocast
    if torch.compiler.is_compiling():  # which knows PyTorch's own only
        without = partial(torch.autocast, weight.device.type, enabled=False)
    with torch.no_grad(), without():
        norms = _row_norms(weight.detach(), lora_A.detach(), lora_B.detach(), scaling)
        return as_divisors(norms)


def _row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    A, B = lora_A.to(dtype), scaling * lora_B.to(dtype)
    is_rounded = weight.dtype != dtype and multiplies_itself(weight)
    own, products = _norms_and_products(weight, A, is_rounded)
    squares = own.square()
    squared = squares + torch.mul(2 * products + B @ (A @ A.t()), B).sum(1)
    least = squares * (_LEAST_IN_16_BITS if is_rounded else _LEAST)
    norms = torch.where(squared == squares, own, squared.maximum(least).sqrt())
    if not weight.is_cpu or has_no_values(weight) or torch.compiler.is_compiling() or is_transformed():
        return norms  # to look at a number would have to wait for the device
    rows = (squared < _CANCELLED * squares).nonzero().flatten()
    if len(rows):
        norms[rows] = plain_row_norms(weight[rows], A, B[rows])
    return norms


def _norms_and_products(weight: Tensor, A: Tensor, is_rounded: bool) -> tuple[Tensor, Tensor]:
    """‖w‖ of each row of the weight (N), and W Aᵀ (N×r), in the dtype of A.

    ``is_rounded``: A is rounded to the 16 bits of the weight for their product.
    """
    step = max(1, _CACHED // max(1, weight.shape[1])) if weight.is_cpu else _ROWS
    if is_rounded:
        # CUDA widens a number where it is read, PyTorch on a CPU all that it is given
        parts = weight.split(step) if weight.is_cpu else (weight,)
        norms = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=A.dtype) for rows in parts])
        factor = A.to(weight.dtype).t()
        product = unrounded(weight, factor)
        return norms, (weight @ factor).to(A.dtype) if product is None else product

    norms, products = [], []
    for rows in (weight,) if weight.dtype == A.dtype else weight.split(step):
        wide = rows.to(A.dtype)
        norms.append(torch.linalg.vector_norm(wide, dim=1))
        products.append(wide @ A.t())
    return torch.cat(norms), torch.cat(products)


def plain_row_norms(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """‖w + b A‖ of each row, from W (N×K), A (r×K) and B (N×r), in the dtype of A and B."""
    parts = zip(weight.split(_ROWS), B.split(_ROWS), strict=True)
    return torch.cat([torch.addmm(w.to(A.dtype), b, A).norm(dim=1) for w, b in parts])


def as_divisors(norms: Tensor) -> Tensor:
    """n, and ∞ in place of 0."""
    return norms.masked_fill(norms == 0, torch.inf)


def factor_of(magnitude: Tensor, norms: Tensor, dropout_p: float = 0.0) -> Tensor:
    """What z is multiplied by (N), in the dtype of the norms: g, or with dropout (g − 1) / (1 − p).

    g is exactly 1 where m is n, as in a fresh adapter.
    """
    g = torch.where(norms.isinf(), 1, magnitude.to(norms.dtype) / norms)
    return (g - 1) / (1 - dropout_p) if dropout_p else g


# ---------------------------------------------------------------------------------------------------
# the layer
# ---------------------------------------------------------------------------------------------------


def scaled(
    z: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None = None, has_bias: bool = False
) -> Tensor:
    """y = g⊙z + bias.

    Args:
        z: What the layer computes as plain LoRA: a new, contiguous tensor, (..., N), which is kept or
            overwritten.
        magnitude: m, (N).
        norms: n as `row_norms` returns them, (N).
        bias: (N), frozen; None for none.
        has_bias: Whether the bias has been added to z.

    Returns:
        (..., N) in the dtype of z. The gradient of m is summed in fp32 at least.
    """
    if _is_followed() or not torch.is_grad_enabled():
        factor = factor_of(magnitude, norms)
        return _multiplied(z, factor, _addend(bias, factor, has_bias))
    return _Scaled.apply(z, bias, magnitude, norms, has_bias, 0.0)


def _addend(bias: Tensor | None, factor: Tensor, has_bias: bool) -> Tensor | None:
    """What is added to g⊙z (N), in the dtype of g."""
    if bias is None:
        return None
    return (1 - factor) * bias if has_bias else bias.to(factor.dtype)


def corrected(
    z_of: Callable[[Tensor], Tensor],
    x: Tensor,
    operands: Sequence[Tensor],
    magnitude: Tensor,
    norms: Tensor,
    y: Tensor,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """y + (g − 1)⊙z', with the z' of drop(x).

    Args:
        z_of: The layer as plain LoRA without bias and dropout, which returns what `scaled` takes.
        x: The input, (..., K).
        operands: The tensors that ``z_of`` saves beside x.
        magnitude, norms: As in `scaled`.
        y: The layer with its bias and the dropout, a new tensor (..., N), which is overwritten.
        dropout_p: The probability, above 0, with which an element of x is dropped.
        seed: An int64 tensor of shape (1,), which determines the mask.

    Returns:
        (..., N) in the dtype of y. Kept for the gradient of m is z'; drop(x) is computed again.
    """
    drop = partial(_dropped, dropout_p=dropout_p, seed=seed)
    if _is_followed() or not torch.is_grad_enabled():
        return _multiplied(z_of(drop(x)), factor_of(magnitude, norms, dropout_p), y)
    computed = None
    if x.numel() >= recompute.MIN_NUMBERS:
        computed = Computed(drop, recompute.arrange(x) or Part(x.detach()))
    dropped = _Dropped.apply(x, dropout_p, seed)
    z = recompute.call(lambda x, *_: z_of(x), dropped, *operands, computed=computed)
    return _Scaled.apply(z, y, magnitude, norms, False, dropout_p)


def _is_followed() -> bool:
    """Whether PyTorch has to see plain formulas: it compiles them, or transforms functions."""
    return torch.compiler.is_compiling() or is_transformed()


def _multiplied(z: Tensor, factor: Tensor, addend: Tensor | None) -> Tensor:
    """factor⊙z + addend, without gradients, or where PyTorch finds them."""
    if not _is_followed():
        with no_autocast():
            return _multiply_add(z, factor, addend, z)
    y = z * factor
    return (y if addend is None else y + addend).to(z.dtype)


def _multiply_add(z: Tensor, factor: Tensor, addend: Tensor | None, out: Tensor) -> Tensor:
    """``out``, with factor⊙z + addend in it: `columns.multiply_add` of (..., N), and of an addend (N)."""
    if addend is not None and addend.dim() > 1:
        addend = as_matrix(addend)
    columns.multiply_add(as_matrix(z), factor, addend, as_matrix(out))
    return out


def _grads(
    grad_output: Tensor, z: Tensor | None, factor: Tensor, needs_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz = factor⊙dy (..., N) if it is needed, and Σ dy⊙z over the tokens (N) if there is a z."""
    dy = as_matrix(grad_output)
    dz = sums = None
    if torch.is_grad_enabled() and needs_z:  # a second derivative follows it
        dz = (grad_output * factor).to(grad_output.dtype)
    elif needs_z and z is not None:
        dtypes = dy.dtype, z.dtype, factor.dtype
        dz, sums = run_formula(columns.grad_magnitude, dy, 1, dtypes, dy, as_matrix(z), factor)
        return like(grad_output.shape, dz), sums
    elif needs_z:
        dz = like(grad_output.shape, columns.scaled(dy, factor))
    if z is not None:
        sums = columns.sums_of_products(dy, as_matrix(z), factor.dtype)
    return dz, sums


def _dropped(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """keep⊙x: 1 / (1 − p) of it is in `factor_of`."""
    return like(x.shape, dropout.dropped(as_matrix(x), dropout_p, seed))


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout_p, seed):
        ctx.dropout_p = dropout_p
        save(ctx, seed)
        with below_autograd():
            return _dropped(x, dropout_p, seed)

    @staticmethod
    def backward(ctx, grad):
        (seed,) = saved(ctx)
        return _dropped(grad, ctx.dropout_p, seed), None, None


class _Scaled(torch.autograd.Function):
    """`scaled`; with dropout y₀ + (g − 1)⊙z', in the memory of y₀, which is passed as the bias."""

    @staticmethod
    def forward(ctx, z, bias, magnitude, norms, has_bias, dropout_p):
        ctx.dropout_p = dropout_p
        factor = factor_of(magnitude, norms, dropout_p)
        addend = bias
        if dropout_p:
            ctx.mark_dirty(bias)
            out = bias
        else:
            addend = _addend(bias, factor, has_bias)
            out = torch.empty_like(z, memory_format=torch.contiguous_format)
        kept_z = z if ctx.needs_input_grad[2] else None
        save(ctx, kept_z, factor, norms, magnitude, bias if has_bias else None, None if dropout_p else addend)
        with below_autograd(), no_autocast():
            return _multiply_add(z, factor, addend, out)

    @staticmethod
    def backward(ctx, dy):
        z, factor, norms, magnitude, bias, _ = saved(ctx, "The magnitude or the base bias")
        needs_z, needs_addend, *_ = ctx.needs_input_grad
        with no_autocast():
            if torch.is_grad_enabled():  # a second derivative follows m
                factor = factor_of(magnitude, norms, ctx.dropout_p)
            if z is not None and bias is not None:
                z = z - bias
            dz, sums = _grads(dy, z, factor, needs_z)
            dm = None if sums is None else (sums / (norms * (1 - ctx.dropout_p))).to(magnitude.dtype)
        return dz, dy if needs_addend else None, dm, None, None, None

    @staticmethod
    def output_again(node) -> Computed | None:
        """y, from what its node keeps; None: it keeps too little."""
        z, factor, _, _, _, addend = node.saved_tensors
        if z is None or node.dropout_p:
            return None
        kept = [z, factor] if addend is None else [z, factor, addend]
        return Computed(_scaled_again, *[Part(tensor.detach()) for tensor in kept])


def _scaled_again(z: Tensor, factor: Tensor, addend: Tensor | None = None) -> Tensor:
    return _multiply_add(z, factor, addend, torch.empty_like(z, memory_format=torch.contiguous_format))
