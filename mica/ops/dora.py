"""DoRA's part of a linear layer: every row of W + s·B·A gets a trained norm (arXiv 2402.09353).

    z  = x Wᵀ + s·x Aᵀ Bᵀ             what the layer computes without its bias
    y  = g⊙z + bias, g = m / n        m (N) is trained; n (N), the norms of the rows of W + s·B·A, is a
       = g⊙(z + bias) + (1 − g)⊙bias  constant for autograd; where g is 1 this is z + bias to the last bit
    dz = g⊙dy
    dm = (Σ dy⊙z) / n                 summed over the tokens

With dropout it is PEFT's formula: y = y₀ + (g − 1)⊙z', with y₀ = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ and z' the
z of drop(x). A row without a norm, of zeros, is not scaled.

Without dropout z = (y − bias) / g, and autograd keeps many a y anyway: those of a gated MLP's first layers,
v. Kept for dm are therefore y, and x, which the layer needs for A: z is computed from it again where y has
been edited in place. Where m is 0 and there is a bias, y says nothing of z, and dm is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mica.ops import recompute
from mica.ops.operator import as_matrix, below_autograd, like, no_autocast, run_formula, save, saved
from mica.paths import columns, dropout
from mica.paths.products import is_transformed, multiplies_itself, unrounded

# Where n² is a smaller share of ‖w‖² + ‖s·bA‖² the update cancels most of the row, and n is computed from
# W + s·B·A itself. Of random updates, 0.1 to 10 times as large as SmolLM2's weights, it is at least 0.82.
CANCELLED = 0.1

# Stands for an m of 0, so that y still says what z was: dm is not 0 there.
_SMALLEST = 2.0**-60

_ROWS = 1024  # of a 16-bit weight whose wider copy is alive at a time


# ---------------------------------------------------------------------------------------------------
# the norms
# ---------------------------------------------------------------------------------------------------


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """n of each row of W + s·B·A (N), in fp32 at least, without gradients; ∞ of a row without a norm.

    n² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (AAᵀ) bᵀ of the rows w and b of W and B. A 16-bit W is multiplied by A in
    its own dtype where the processor can: on a CPU n of an update as large as W is then off by 4e-5 with 576
    columns and 2e-5 with 2048 (root mean square in bf16; of 2048 rows at most 2e-4 and 1e-4). On a CPU rows
    that the update nearly cancels are computed plainly; elsewhere n of such a row may be off by 1 %.
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
    own, products = _norms_and_products(weight, A)
    squares = own.square()
    of_update = torch.mul(B @ (A @ A.t()), B).sum(1)
    of_rows = squares + of_update
    squared = of_rows + 2 * torch.mul(products, B).sum(1)
    norms = torch.where(squared == squares, own, squared.clamp(min=0).sqrt())
    if not weight.is_cpu or torch.compiler.is_compiling() or is_transformed():
        return norms  # to look at a number would have to wait for the device
    rows = (squared < CANCELLED * of_rows).nonzero().flatten()
    if len(rows):
        norms[rows] = plain_row_norms(weight[rows], A, B[rows])
    return norms


def _norms_and_products(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """‖w‖ of each row of the weight (N), and W Aᵀ (N×r), in the dtype of A."""
    is_wide = weight.dtype == A.dtype
    norms, products = [], []
    if not is_wide and multiplies_itself(weight):
        # CUDA widens a number where it is read, PyTorch on a CPU all that it is given
        for rows in weight.split(_ROWS) if weight.is_cpu else (weight,):
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=A.dtype))
        factor = A.to(weight.dtype).t()
        product = unrounded(weight, factor)
        return torch.cat(norms), (weight @ factor).to(A.dtype) if product is None else product

    for rows in (weight,) if is_wide else weight.split(_ROWS):
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

    g is exactly 1 where m is n, so that a fresh adapter changes no bit of y.
    """
    m = magnitude.to(norms.dtype)
    g = torch.where(norms.isinf(), 1, (m + _SMALLEST * (m == 0)) / norms)
    return (g - 1) / (1 - dropout_p) if dropout_p else g


def _factor_and_addend(
    addend: Tensor | None, magnitude: Tensor, norms: Tensor, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """What z + bias is multiplied by (N), and the share of the bias (N) that makes up for its being scaled.

    With dropout: what z is multiplied by, and y, the addend as it is.
    """
    factor = factor_of(magnitude, norms, dropout_p)
    if addend is None or dropout_p:
        return factor, addend
    return factor, (1 - factor) * addend


# ---------------------------------------------------------------------------------------------------
# the layer
# ---------------------------------------------------------------------------------------------------


def scaled(
    unscaled: Callable[[Tensor], Tensor],
    x: Tensor,
    operands: Sequence[Tensor],
    magnitude: Tensor,
    norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y = g⊙z + bias with z + bias = ``unscaled(x)``.

    Args:
        unscaled: The layer as with plain LoRA, with its bias: it returns a new, contiguous tensor, (..., N),
            which may be overwritten. The backward may call it again.
        x: The input, (..., K).
        operands: The tensors that ``unscaled`` saves beside x.
        magnitude: m, (N).
        norms: n as `row_norms` returns them, (N).
        bias: (N), frozen; None for none.

    Returns:
        (..., N) in the dtype of z. The gradient of m is summed in fp32 at least.
    """
    if _is_followed() or not (torch.is_grad_enabled() and magnitude.requires_grad):
        return _multiplied(unscaled(x), bias, magnitude, norms)
    if x.numel() < recompute.MIN_NUMBERS:
        return _KeepsZ.apply(unscaled(x), bias, magnitude, norms, 0.0)

    def layer(x: Tensor, *_) -> Tensor:
        y = _KeepsY.apply(unscaled, x, unscaled(x), magnitude, norms, bias)
        y.grad_fn.version = y._version
        return y

    return recompute.call(layer, x, *operands, magnitude, looks_after_y=True)


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
        z_of: The layer as with plain LoRA, without bias and dropout, as ``unscaled`` otherwise.
        x, operands, magnitude, norms: As in `scaled`.
        y: The layer with its bias and the dropout, a new tensor (..., N), which is overwritten.
        dropout_p: The probability, above 0, with which an element of x is dropped.
        seed: An int64 tensor of shape (1,), which determines the mask.

    Returns:
        (..., N) in the dtype of y. Kept for the gradient of m is z'; drop(x) is computed again.
    """
    drop = partial(_dropped, dropout_p=dropout_p, seed=seed)
    if _is_followed() or not torch.is_grad_enabled():
        return _multiplied(z_of(drop(x)), y, magnitude, norms, dropout_p)
    computed = None
    if x.numel() >= recompute.MIN_NUMBERS:
        computed = recompute.Computed(drop, recompute.arrange(x) or recompute.Part(x.detach()))
    dropped = _Dropped.apply(x, dropout_p, seed)
    z = recompute.call(lambda x, *_: z_of(x), dropped, *operands, computed=computed)
    return _KeepsZ.apply(z, y, magnitude, norms, dropout_p)


def _is_followed() -> bool:
    """Whether PyTorch has to see plain formulas: it compiles them, or transforms functions."""
    return torch.compiler.is_compiling() or is_transformed()


def _multiplied(
    z: Tensor, addend: Tensor | None, magnitude: Tensor, norms: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Where m needs no gradient, or PyTorch finds it."""
    if torch.is_grad_enabled() and z.requires_grad and not _is_followed():
        return _KeepsZ.apply(z, addend, magnitude, norms, dropout_p)
    factor, addend = _factor_and_addend(addend, magnitude, norms, dropout_p)
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
    grad_output: Tensor, z: Tensor | None, bias: Tensor | None, factor: Tensor, needs_z: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz = factor⊙dy (..., N) if it is needed, and Σ dy⊙(z − bias) over the tokens (N) if there is a z."""
    dy = as_matrix(grad_output)
    dz = sums = None
    if torch.is_grad_enabled() and needs_z:  # a second derivative follows it
        dz = (grad_output * factor).to(grad_output.dtype)
    elif needs_z and z is not None:
        tensors = (dy, z, factor) if bias is None else (dy, z, factor, bias)
        dtypes = tuple(tensor.dtype for tensor in tensors)
        dz, sums = run_formula(columns.grad_magnitude, dy, 1, dtypes, dy, as_matrix(z), factor, bias)
        return like(grad_output.shape, dz), sums
    elif needs_z:
        dz = like(grad_output.shape, columns.scaled(dy, factor))
    if z is not None:
        sums = columns.sums_of_products(dy, as_matrix(z), bias, factor.dtype)
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


class _KeepsZ(torch.autograd.Function):
    """y, where ``z`` holds z + bias and the addend is the bias (N) or None.

    With dropout ``z`` is z', and the addend y, which becomes y + (g − 1)⊙z'.
    """

    @staticmethod
    def forward(ctx, z, addend, magnitude, norms, dropout_p):
        ctx.dropout_p = dropout_p
        out = addend if dropout_p else torch.empty_like(z, memory_format=torch.contiguous_format)
        if dropout_p:
            ctx.mark_dirty(addend)
        save(ctx, z if ctx.needs_input_grad[2] else None, magnitude, norms, None if dropout_p else addend)
        with below_autograd(), no_autocast():
            return _multiply_add(z, *_factor_and_addend(addend, magnitude, norms, dropout_p), out)

    @staticmethod
    def backward(ctx, dy):
        z, magnitude, norms, bias = saved(ctx)
        needs_z, needs_addend, *_ = ctx.needs_input_grad
        with no_autocast():
            factor = factor_of(magnitude, norms, ctx.dropout_p)
            dz, sums = _grads(dy, z, bias, factor, needs_z)
            dm = None if sums is None else (sums / (norms * (1 - ctx.dropout_p))).to(magnitude.dtype)
        return dz, dy if needs_addend else None, dm, None, None


class _KeepsY(torch.autograd.Function):
    """y in place of ``z``, which holds z + bias."""

    @staticmethod
    def forward(ctx, unscaled, x, z, magnitude, norms, bias):
        ctx.unscaled = unscaled
        ctx.mark_dirty(z)
        save(ctx, x, magnitude, norms, bias, outputs=[z])
        with below_autograd(), no_autocast():
            return _multiply_add(z, *_factor_and_addend(bias, magnitude, norms), z)

    @staticmethod
    def backward(ctx, dy):
        x, magnitude, norms, bias, y = saved(ctx)
        with no_autocast():
            g = factor_of(magnitude, norms)
            is_edited = y._version != ctx.version
            z = ctx.unscaled(x) if is_edited else y
            dz, sums = _grads(dy, z, bias, g, ctx.needs_input_grad[2])
            dm = (sums / norms if is_edited else sums / g / norms).to(magnitude.dtype)
        return None, None, dz, dm, None, None
