"""DoRA's part of a linear layer: every row of W + s·B·A gets a trained norm (arXiv 2402.09353).

    z  = x Wᵀ + s·x Aᵀ Bᵀ             what the layer computes without its bias
    y  = g⊙z + bias, g = m / n        m (N) is trained; n (N), the norms of the rows of W + s·B·A, is a
                                      constant for autograd
    dz = g⊙dy
    dm = (Σ dy⊙z) / n                 summed over the tokens

With dropout it is PEFT's formula: y = y₀ + (g − 1)⊙z', with y₀ = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ and z' the z of
drop(x). A row without a norm, of zeros, is not scaled.

Without dropout z = (y − bias) / g, and autograd keeps many a y anyway: those of a gated MLP's first layers, v.
Kept for dm are therefore y, and x, which the layer needs for A: z is computed from it again where y has been
edited in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mica.ops import kept
from mica.ops.operator import as_matrix, below_autograd, like, no_autocast, save, saved
from mica.paths import dropout
from mica.paths.products import is_transformed, multiplies_itself, unrounded

# Where n² is a smaller share of ‖w‖² + ‖s·bA‖² the update cancels most of the row, and n is computed from
# W + s·B·A itself. Of random updates, 0.1 to 10 times as large as SmolLM2's weights, it is at least 0.82.
CANCELLED = 0.1

# Stands for an m of 0, so that y still says what z was: dm is not 0 there.
_SMALLEST = 2.0**-60

_ROWS = 1024  # of a 16-bit weight whose wider copy is alive at a time
_PART = 2**17  # numbers of a matrix on a CPU that are widened at a time: they fit into its cache


# ---------------------------------------------------------------------------------------------------
# the norms
# ---------------------------------------------------------------------------------------------------


def inverse_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """1 / n of each row of W + s·B·A (N), in fp32 at least, without gradients; 0 of a row without a norm.

    n² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (AAᵀ) bᵀ of the rows w and b of W and B. A 16-bit W is multiplied by A in its
    own dtype where the processor can: n is then off by 3e-5 where the update is as large as W.

    Args:
        weight: (N×K).
        lora_A: (r×K).
        lora_B: (N×r).
        scaling: s.
    """
    with torch.no_grad(), no_autocast():
        norms = _row_norms(weight.detach(), lora_A.detach(), lora_B.detach(), scaling)
        return torch.where(norms == 0, 0, 1 / norms)


def _row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    A, B = lora_A.to(dtype), scaling * lora_B.to(dtype)
    squares, products = _squares_and_products(weight, A)
    of_update = torch.mul(B @ (A @ A.t()), B).sum(1)
    of_rows = squares + of_update
    squared = of_rows + 2 * torch.mul(products, B).sum(1)
    norms = squared.clamp(min=0).sqrt()
    if not weight.is_cpu or torch.compiler.is_compiling() or is_transformed():
        return norms  # to look at a number would have to wait for the device
    rows = (squared < CANCELLED * of_rows).nonzero().flatten()
    if len(rows):
        norms[rows] = plain_row_norms(weight[rows], A, B[rows])
    return norms


def _squares_and_products(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """‖w‖² of each row of the weight (N), and W Aᵀ (N×r), in the dtype of A."""
    is_wide = weight.dtype == A.dtype
    multiplies_narrow = not is_wide and multiplies_itself(weight)
    squares, products = [], []
    for rows in (weight,) if is_wide else weight.split(_ROWS):
        wide = rows.to(A.dtype)
        squares.append(torch.linalg.vector_norm(wide, dim=1).square())
        if not multiplies_narrow:
            products.append(wide @ A.t())
    if multiplies_narrow:
        factor = A.to(weight.dtype).t()
        products = [unrounded(weight, factor)]
        if products[0] is None:
            products = [(weight @ factor).to(A.dtype)]
    return torch.cat(squares), torch.cat(products)


def plain_row_norms(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """‖w + b A‖ of each row, from W (N×K), A (r×K) and B (N×r), in the dtype of A and B."""
    norms = [torch.addmm(w.to(A.dtype), b, A).norm(dim=1) for w, b in zip(weight.split(_ROWS), B.split(_ROWS))]
    return torch.cat(norms)


def _factor(magnitude: Tensor, inverse: Tensor) -> Tensor:
    """g = m / n (N), in the dtype of the norms."""
    m = magnitude.to(inverse.dtype)
    m = m + _SMALLEST * (m == 0)
    return torch.where(inverse == 0, 1, m * inverse)


# ---------------------------------------------------------------------------------------------------
# matrices (M×N) of 16 bits and rows (N) of 32
# ---------------------------------------------------------------------------------------------------


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor (..., N).

    PyTorch widens whole operands of a mixed operation on a CPU: of 1024 x 1536 at once that takes ten times
    as long.
    """
    matrices = [as_matrix(tensor) for tensor in tensors]
    rows, columns = matrices[0].shape
    step = max(1, _PART // max(1, columns)) if matrices[0].is_cpu else max(1, rows)
    return zip(*[matrix.split(step) for matrix in matrices], strict=True)


def _multiply_add(z: Tensor, factor: Tensor, addend: Tensor | None, out: Tensor) -> Tensor:
    """factor⊙z + addend, rounded once, into ``out``, which may be z or the addend."""
    if addend is None:
        for part, to in _parts(z, out):
            torch.mul(part, factor, out=to)
        return out
    for part, more, to in _parts(z, addend.expand_as(z), out):
        torch.addcmul(more, part, factor, out=to)
    return out


def _sums(grad_output: Tensor, z: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ dy⊙(z − bias) over the tokens (N)."""
    total = torch.zeros(z.shape[-1], dtype=dtype, device=z.device)
    for dy, part in _parts(grad_output, z):
        wide = part.to(dtype)
        if bias is not None:
            wide = wide - bias
        total = total + (wide * dy).sum(0)
    return total


def _product(dy: Tensor, factor: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # a second derivative follows it
        return (dy * factor).to(dy.dtype)
    return _multiply_add(dy, factor, None, torch.empty_like(dy, memory_format=torch.contiguous_format))


# ---------------------------------------------------------------------------------------------------
# without dropout
# ---------------------------------------------------------------------------------------------------


def scaled(
    z_of: Callable[[Tensor], Tensor],
    x: Tensor,
    operands: tuple[Tensor, ...],
    magnitude: Tensor,
    inverse: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y = g⊙z + bias with z = ``z_of(x)``.

    Args:
        z_of: The layer without its bias: it returns a new tensor, (..., N), which is overwritten. It may be
            called again in the backward.
        x: The input, (..., K).
        operands: The tensors that ``z_of`` saves beside x.
        magnitude: m, (N).
        inverse: 1 / n as `inverse_norms` returns it, (N).
        bias: (N), frozen; None for none.

    Returns:
        (..., N) in the dtype of z. The gradient of m is summed in fp32 at least.
    """

    def layer(x: Tensor, *_) -> Tensor:
        z = z_of(x)
        if _is_followed():
            y = z * _factor(magnitude, inverse)
            return (y if bias is None else y + bias).to(z.dtype)
        if not (torch.is_grad_enabled() and (z.requires_grad or magnitude.requires_grad)):
            return _multiply_add(z, _factor(magnitude, inverse), bias, z)
        y = _Scaled.apply(z_of, x, z, magnitude, inverse, bias)
        y.grad_fn.version = y._version
        return y

    if _is_followed() or not (torch.is_grad_enabled() and magnitude.requires_grad):
        return layer(x)
    return kept.call(layer, x, *operands, magnitude, looks_after_y=True)


def _is_followed() -> bool:
    """Whether PyTorch has to see plain formulas: it compiles them, or transforms functions."""
    return torch.compiler.is_compiling() or is_transformed()


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_of, x, z, magnitude, inverse, bias):
        ctx.z_of = z_of
        ctx.mark_dirty(z)
        with below_autograd(), no_autocast():
            _multiply_add(z, _factor(magnitude, inverse), bias, z)
        if ctx.needs_input_grad[3]:
            save(ctx, x, magnitude, inverse, bias, outputs=[z])
        else:
            save(ctx, None, magnitude, inverse, None, outputs=[None])
        return z

    @staticmethod
    def backward(ctx, dy):
        x, magnitude, inverse, bias, y = saved(ctx)
        with no_autocast():
            g = _factor(magnitude, inverse)
            dz = dm = None
            if y is not None and y._version == ctx.version:
                dm = _sums(dy, y, bias, inverse.dtype) / g
            elif y is not None:
                dm = _sums(dy, ctx.z_of(x), None, inverse.dtype)
            if dm is not None:
                dm = (dm * inverse).to(magnitude.dtype)
            if ctx.needs_input_grad[2]:
                dz = _product(dy, g)
        return None, None, dz, dm, None, None


# ---------------------------------------------------------------------------------------------------
# with dropout
# ---------------------------------------------------------------------------------------------------


def corrected(
    z_of: Callable[[Tensor], Tensor],
    x: Tensor,
    operands: tuple[Tensor, ...],
    magnitude: Tensor,
    inverse: Tensor,
    y: Tensor,
    dropout_p: float,
    seed: Tensor,
) -> Tensor:
    """y + (g − 1)⊙z', with the z' of drop(x).

    Args:
        z_of, x, operands, magnitude, inverse: As in `scaled`.
        y: The layer with its bias and the dropout, (..., N), which is overwritten.
        dropout_p: The probability, above 0, with which an element of x is dropped.
        seed: An int64 tensor of shape (1,), which determines the mask.

    Returns:
        (..., N) in the dtype of y. Kept for the gradient of m is z'; drop(x) is computed again.
    """
    drop = partial(_dropped, dropout_p=dropout_p, seed=seed)
    if _is_followed():
        z = z_of(drop(x))
        return (y + z * _excess(magnitude, inverse, dropout_p)).to(y.dtype)
    needs_grad = torch.is_grad_enabled()
    if not needs_grad:
        z = z_of(drop(x))
    else:
        computed = kept.derived(drop, x)
        kept_x = _Dropped.apply(x, dropout_p, seed)
        z = kept.call(lambda x, *_: z_of(x), kept_x, *operands, computed=computed)
    if needs_grad and (y.requires_grad or z.requires_grad or magnitude.requires_grad):
        return _Corrected.apply(y, z, magnitude, inverse, dropout_p)
    return _multiply_add(z, _excess(magnitude, inverse, dropout_p), y, y)


def _dropped(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """keep⊙x: 1 / (1 − p) of it is in `_excess`."""
    return like(x.shape, dropout.dropped(as_matrix(x), dropout_p, seed))


def _excess(magnitude: Tensor, inverse: Tensor, dropout_p: float) -> Tensor:
    """(g − 1) / (1 − p) (N)."""
    return (_factor(magnitude, inverse) - 1) / (1 - dropout_p)


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


class _Corrected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, magnitude, inverse, dropout_p):
        ctx.dropout_p = dropout_p
        ctx.mark_dirty(y)
        save(ctx, z if ctx.needs_input_grad[2] else None, magnitude, inverse)
        with below_autograd(), no_autocast():
            return _multiply_add(z, _excess(magnitude, inverse, dropout_p), y, y)

    @staticmethod
    def backward(ctx, dy):
        z, magnitude, inverse = saved(ctx)
        dz = dm = None
        with no_autocast():
            if ctx.needs_input_grad[1]:
                dz = _product(dy, _excess(magnitude, inverse, ctx.dropout_p))
            if z is not None:
                sums = _sums(dy, z, None, inverse.dtype)
                dm = (sums * inverse / (1 - ctx.dropout_p)).to(magnitude.dtype)
        return dy, dz, dm, None, None
