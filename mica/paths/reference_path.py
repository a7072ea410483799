"""The reference path: a MiCA layer on PyTorch's operators, for CPUs and for what the kernels do not cover.

The formulas, and what M, K, N, r, s, E and S are: `tests.support.definition`. Whether an element of x is
dropped follows from (seed, row, column) alone (`mica.paths.dropout`), so no mask is kept.

The low-rank products run in ``compute_dtype`` (default: the dtype of x), so A and B may be fp32 masters
over a bf16/fp16 base. With such masters and few tokens on a CPU they run in fp32, whatever the compute_dtype
(`product_dtype`): only the update, y and dx are rounded. Products and their sums are those of
`mica.paths.products` (one rounding where the processor has no 16-bit instructions). dA is accumulated in
fp32. The scaling is folded into A (forward) or B (backward) *before* that cast: one rounding instead of two,
on r·K or N·r numbers instead of M·r; a scaling that rounds nothing (1, a power of two) is applied where there
is least to multiply.
Everything here is differentiable by autograd and runs on any device.

On a stack of experts neither W + s·B·A nor its gradient (both E×N×K) is formed, which is what PEFT's path
costs (`lora.ParamWrapper`), and no expert without rows is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import frexp

import torch
from torch import Tensor

from mica import native
from mica.paths import dropout
from mica.paths.operands import Operands
from mica.paths.products import FEW_TO_ROUND, added, addmm, multiplies_itself, product_dtype, unrounded

# Tokens whose fp32 copy is alive at a time in `grad_a`: 1024 x 14336 fp32 are 59 MB. Measured on two CPU
# cores at K = 576 and 1536, r = 16: the same speed within noise from 256 to 2048.
TOKENS_PER_CHUNK = 1024


def linear(x: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """The layer: y = h Bᵀ + (x Wᵀ + bias) with h = s·drop(x) Aᵀ, in this order.

    Written first, the update is rounded at its own size, and y once: of an update of 0.03 % of W all arrives
    in a bfloat16 y, with an error of 1.7e-3. Added to a y that is rounded already, 18 % do, with 2.3e-3. This
    is the case where the base layer had to be called: y is then its output and h Bᵀ.

    Args:
        x: The input, (M×K).
        operands: The layer's weight (N×K), lora_A (r×K), lora_B (N×r), bias (N) and numbers. Without a
            weight the base_output (M×N) stands for x Wᵀ + bias.

    Returns:
        y (M×N), new, in the dtype of x, or of the base_output; and h (M×r).
    """
    lora_A, lora_B = operands.lora_A, operands.lora_B
    dtype = product_dtype(x, (lora_A, lora_B), operands.low_rank_dtype(x))
    h = down_projection(x, lora_A, operands.scaling, dtype, operands.dropout_p, operands.seed)
    y = operands.base_output
    if y is not None:
        return up_projection(y, h, lora_B), h
    base, bias = (x, operands.weight.t()), operands.bias
    if h.dtype == x.dtype:
        return addmm(bias, (h, _cast(lora_B, h.dtype).t()), base), h
    wide = torch.promote_types(x.dtype, h.dtype)
    bias = None if bias is None else _cast(bias, wide)
    update = addmm(bias, (_cast(h, wide), _cast(lora_B, wide).t()))
    return added(_cast(update, x.dtype), *base), h


def down_projection(
    x: Tensor,
    lora_A: Tensor,
    scaling: float,
    compute_dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """h = s·drop(x) Aᵀ (M×r) in ``compute_dtype``, from x (M×K) and lora_A (r×K)."""
    kept = dropout.applied(_keep(x, lora_A, dropout_p, seed), x)
    return _scaled_product(kept, lora_A.t(), scaling / (1.0 - dropout_p), compute_dtype)


def _scaled_product(left: Tensor, factor: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling·left @ factor in ``dtype``: the factor is scaled before it is rounded to that dtype."""
    if scaling == 1.0:
        return addmm(None, (_cast(left, dtype), _cast(factor, dtype)))
    if left.shape[0] < factor.shape[0] and _is_exact(scaling, dtype):
        return _scaled_product(left, factor, 1.0, dtype).mul_(scaling)
    return _scaled_product(left, factor * scaling, 1.0, dtype)


def _is_exact(scaling: float, dtype: torch.dtype) -> bool:
    """Whether the scaling is a power of two, which rounds nothing wherever it is applied.

    Not in float16, whose smallest normal number is 6e-5. In the other dtypes a number would have to be below
    2^-94 or above 2^96.
    """
    return dtype != torch.float16 and frexp(scaling)[0] in (0.5, -0.5) and 2.0**-32 <= abs(scaling) <= 2.0**32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes a microsecond where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def up_projection(y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
    """y + h Bᵀ (M×N), a new tensor in the dtype of y, from y (M×N), h (M×r) and lora_B (N×r)."""
    dtype = torch.promote_types(y.dtype, h.dtype)
    h, factor = _cast(h, dtype), _cast(lora_B, dtype).t()
    if y.dtype == dtype:
        return addmm(y, (h, factor))
    return added(y.to(dtype), h, factor).to(y.dtype)  # wider than y, so no 16-bit product


def grad_h(grad_output: Tensor, lora_B: Tensor, scaling: float, compute_dtype: torch.dtype) -> Tensor:
    """g (M×r) in ``compute_dtype`` from grad_output dy (M×N) and lora_B (N×r)."""
    return _scaled_product(grad_output, lora_B, scaling, compute_dtype)


def grad_a(g: Tensor, x: Tensor, grad_dtype: torch.dtype = torch.float32) -> Tensor:
    """dA (r×K) from g (M×r) and x (M×K), summed in fp32 (fp64 where g or x is).

    Where ``grad_dtype`` is the 16-bit dtype of both, a CPU's own product is dA: it sums in fp32 and rounds
    once. Otherwise that would lose 16 bits of fp32's 24, and the rounding of g remains the largest. PyTorch
    offers no product of 16-bit numbers in fp32 on a CPU. `mica.native` has one of bfloat16, where it is
    built; without it x is copied to fp32, which takes up to three times as long.
    """
    if g.dtype is x.dtype:
        if g.dtype is grad_dtype and g.is_cpu and multiplies_itself(g):
            return torch.mm(g.t(), x)
        whole = unrounded(g.t(), x)
        if whole is None:
            whole = _by_native(g, x)
        if whole is not None:
            return whole
    dtype = torch.promote_types(torch.promote_types(g.dtype, x.dtype), torch.float32)
    tokens = g.shape[0]
    if tokens <= TOKENS_PER_CHUNK:
        return _cast(g, dtype).t() @ _cast(x, dtype)
    grad = None
    for start in range(0, tokens, TOKENS_PER_CHUNK):
        chunk = slice(start, start + TOKENS_PER_CHUNK)
        g_part, x_part = _cast(g[chunk], dtype).t(), _cast(x[chunk], dtype)
        grad = g_part @ x_part if grad is None else torch.addmm(grad, g_part, x_part)
    return grad


def grad_b(
    grad_output: Tensor, h: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype | None = None
) -> Tensor:
    """dB (N×r), summed as `grad_a` sums.

    Time of dyᵀ h in fp32 relative to that of (hᵀ dy)ᵀ: 0.4 to 0.5 up to 16 tokens, 1.8 at 512.

    Args:
        grad_output: The gradient dy, (M×N).
        h: (M×r).
        dtype: The dtype of the result.
        grad_dtype: A dtype to which the sum may be rounded first, as PyTorch does under autocast; None for
            none.
    """
    if grad_output.shape[0] > FEW_TO_ROUND:
        return _cast(grad_a(h, grad_output, grad_dtype or dtype).t(), dtype).contiguous()
    wide = torch.promote_types(torch.promote_types(grad_output.dtype, h.dtype), torch.float32)
    return _cast(_cast(grad_output, wide).t() @ _cast(h, wide), dtype)


def _by_native(g: Tensor, x: Tensor) -> Tensor | None:
    """gᵀ x in fp32 from bfloat16 numbers, if `mica.native` multiplies them here."""
    if g.dtype is not torch.bfloat16 or not g.is_cpu or not multiplies_itself(g):
        return None
    module = native.module()
    return None if module is None else module.wide_product(g, x)


def grad_x(
    grad_output: Tensor, weight: Tensor, g: Tensor, lora_A: Tensor, keep: Tensor | None = None
) -> Tensor:
    """dx (M×K) in the dtype of grad_output.

    Args:
        grad_output: The gradient dy, (M×N).
        weight: (N×K).
        g: The gradient of h, (M×r), in which the 1 / (1 − p) of dropout is.
        lora_A: (r×K).
        keep: What dropout has kept of x, bool (M×K); None without dropout.
    """
    if grad_output.dtype == g.dtype and keep is None:
        return addmm(None, (grad_output, weight), (g, _cast(lora_A, g.dtype)))
    # rounded before it is added, as autograd does in stock PEFT
    dx = addmm(None, (grad_output, weight))
    return dx.add_(grad_x_update(g, lora_A, keep).to(dx.dtype))


def grad_x_update(g: Tensor, lora_A: Tensor, keep: Tensor | None = None) -> Tensor:
    """The adapter's part of dx, keep⊙(g A), (M×K) in the dtype of g."""
    return dropout.applied(keep, addmm(None, (g, _cast(lora_A, g.dtype))))


def embedding(
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The low-rank term of an embedding: s·A[:, indices]ᵀ Bᵀ, (M×N) with N = embedding_dim.

    Args:
        indices: (M) integers below num_embeddings.
        lora_A: (r×num_embeddings).
        lora_B: (N×r).
        scaling: The number s.
        compute_dtype: The dtype of the product; None means that of lora_A.
    """
    columns = lora_A.index_select(1, indices).t()
    return _scaled_product(columns, lora_B.t(), scaling, compute_dtype or lora_A.dtype)


def linear_backward(
    grad_output: Tensor, x: Tensor | None, operands: Operands, needs_x: bool, of_h: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `linear`; that of a base_output is grad_output.

    Args:
        grad_output: The gradient dy, (M×N).
        x: The input, (M×K); None where lora_A needs no gradient.
        operands: Those of the forward, without the base_output.
        needs_x: Whether x needs a gradient.
        of_h: The gradient (M×r) of the h that `linear` returned, where a second derivative has one.

    Returns:
        dx (M×K) in the dtype of grad_output, or without a weight the adapter's part of it in that of the
        products, or None; and dA (r×K) in the dtype of lora_A, or None without x.
    """
    lora_A, lora_B = operands.lora_A, operands.lora_B
    dtype = product_dtype(grad_output, (lora_A, lora_B), operands.low_rank_dtype(grad_output))
    scaling = operands.scaling / (1.0 - operands.dropout_p)
    g = grad_h(grad_output, lora_B, scaling, dtype)
    if of_h is not None:
        g = g + _cast(of_h * scaling, dtype)
    keep = _keep(grad_output, lora_A, operands.dropout_p, operands.seed)
    dx = dA = None
    if needs_x and operands.weight is None:
        dx = grad_x_update(g, lora_A, keep)
    elif needs_x:
        dx = grad_x(grad_output, operands.weight, g, lora_A, keep)
    if x is not None:
        kept = dropout.applied(keep, x)
        dA = _cast(grad_a(g, kept, operands.autocast_dtype or lora_A.dtype), lora_A.dtype)
    return dx, dA


def _keep(rows: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """What dropout has kept of x (M×K), of which only rows (M×...) may be there; None: everything."""
    if dropout_p == 0.0:
        return None
    return dropout.dropout_keep(seed, rows.shape[0], lora_A.shape[1], dropout_p)


def embedding_backward(
    grad_output: Tensor,
    indices: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None,
) -> Tensor:
    """dA (r×num_embeddings) of `embedding`: column j sums g's rows of index j; ``padding_idx``: its is 0."""
    g = grad_h(grad_output, lora_B, scaling, torch.promote_types(grad_output.dtype, torch.float32))
    grad = g.new_zeros(g.shape[1], lora_A.shape[1]).index_add(1, indices, g.t())
    if padding_idx is not None:
        grad = grad.where(torch.arange(grad.shape[1], device=grad.device) != padding_idx, 0)
    return grad.to(lora_A.dtype)


def delta_factors(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """B (N×r) and s·A (r×K), whose product is the update, in fp32 (fp64 where A or B is)."""
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    return lora_B.to(dtype), lora_A.to(dtype) * scaling


# ---------------------------------------------------------------------------------------------------
# a stack of experts
# ---------------------------------------------------------------------------------------------------


def experts_linear(x: Tensor, offsets: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """The layers of a stack of experts, each on its own rows of x.

    A weight or bias of another dtype than x (under autocast) is cast to that, expert by expert.

    Args:
        x: The rows, (S×K), sorted by expert.
        offsets: The end of each expert's rows, (E). Rows after the last one belong to no expert: theirs is 0.
        operands: The stack's weight (E×N×K), lora_A (E×r×K), lora_B (E×N×r), bias (E×N) and numbers.

    Returns:
        y (S×N) in the dtype of x, and h (S×r) in that of the products.
    """
    hidden = []

    def product(expert: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y, h = linear(x, _of_expert(operands, expert, weight, bias))
        hidden.append(h.to(operands.low_rank_dtype(x)))
        return y

    y = _by_expert(product, x, offsets, operands.weight, operands.bias)
    h = x.new_zeros(x.shape[0], operands.rank, dtype=operands.low_rank_dtype(x))
    return y, torch.cat([*hidden, h[sum(map(len, hidden)) :]])


def _of_expert(
    operands: Operands, expert: int, weight: Tensor | None, bias: Tensor | None = None
) -> Operands:
    # a stack's is strided: PEFT stores (N×r·E), the expert fastest
    lora_B = operands.lora_B[expert].contiguous()
    return operands._replace(weight=weight, bias=bias, lora_A=operands.lora_A[expert], lora_B=lora_B)


def experts_base(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`experts_linear` of a stack without an adapter."""
    return _by_expert(lambda _, x, weight, bias: addmm(bias, (x, weight.t())), x, offsets, weight, bias)


def _by_expert(product: Callable[..., Tensor], x, offsets, weight, bias) -> Tensor:
    parts, end = [], 0
    for expert, rows in hit(offsets):
        own_bias = None if bias is None else _cast(bias[expert], x.dtype)
        parts.append(product(expert, x[rows], _cast(weight[expert], x.dtype), own_bias))
        end = rows.stop
    return torch.cat([*parts, x.new_zeros(x.shape[0] - end, weight.shape[1])])


def experts_linear_backward(
    grad_output: Tensor,
    x: Tensor | None,
    offsets: Tensor,
    operands: Operands,
    needs_x: bool,
    of_h: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `experts_linear`.

    Args:
        grad_output: The gradient dy, (S×N).
        x: The rows, (S×K); None where lora_A needs no gradient.
        offsets: The end of each expert's rows, (E).
        operands: Those of the forward; without a weight where x needs no gradient.
        needs_x: Whether x needs a gradient.
        of_h: As in `linear_backward`, (S×r).

    Returns:
        dx (S×K), or None; and dA (E×r×K) in the dtype of lora_A, or None without x.
    """
    lora_A = operands.lora_A
    dx, end = [], 0
    dA = [lora_A.new_zeros(lora_A.shape[1:])] * lora_A.shape[0]
    for expert, rows in hit(offsets):
        own_x = None if x is None else x[rows]
        weight = _cast(operands.weight[expert], grad_output.dtype) if needs_x else None
        own_of_h = None if of_h is None else of_h[rows]
        own = _of_expert(operands, expert, weight)
        part, dA[expert] = linear_backward(grad_output[rows], own_x, own, needs_x, own_of_h)
        dx.append(part)
        end = rows.stop
    dx.append(grad_output.new_zeros(grad_output.shape[0] - end, lora_A.shape[2]))
    return (
        torch.cat(dx) if needs_x else None,
        None if x is None else torch.stack(dA),
    )


def experts_grad_b(grad_output: Tensor, h: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """dB (E×N×r) in ``dtype``, in memory as PEFT stores lora_B (N×r·E), from dy (S×N) and h (S×r)."""
    idle = h.new_zeros(grad_output.shape[1], h.shape[1], dtype=dtype)
    dB = [idle] * offsets.shape[0]
    for expert, rows in hit(offsets):
        dB[expert] = grad_b(grad_output[rows], h[rows], dtype)
    return torch.stack(dB, dim=2).permute(2, 0, 1)


def hit(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts with tokens and their rows, in order; waits for the device once."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)
