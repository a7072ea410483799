"""Sums of matrix products; 16-bit ones go through fp32 on processors without 16-bit instructions.

There PyTorch 2.13 multiplies bf16 and fp16 matrices in its own loops: on two threads of a CPU with AVX2
dy W (1024 x 2048 x 2048) takes 44 s in bf16 and 0.11 s in fp32, x Wᵀ 1.2 and 0.11 s. Here the operands are
cast to fp32 in chunks, multiplied, summed, and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Elements of one operand whose fp32 copy is alive at a time: 16 MB. 1024 x 2048 x 2048 takes the same time
# with 2**20 to 2**24, within noise. A chunk of the right operand is cast once, one of the left once for each.
CHUNK = 2**22

# Rows up to which PyTorch's own loop over x Wᵀ, whose operands are both contiguous along the sum, is at least
# as fast as casting the weight: 8 x 2048 x 2048 in bf16 take 1.9 ms, through fp32 12 ms.
FEW_ROWS = 8

# Rows up to which factors kept in fp32 are multiplied in fp32. Rounding them to 16 bit costs r·(K + N)
# numbers; the extra time of an fp32 product is proportional to M times that. Time relative to rounding, with
# AVX512-BF16, forward of 576 x 576 and 2048 x 2048, r = 4 to 128: 1 row 0.55 to 0.9, 16 rows 0.8 to 1.0,
# 32 rows 0.9 to 1.1.
FEW_TO_ROUND = 16

SHORTEST = 64  # smallest side of a chunk, however long the sum

QUERIES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}

# cuBLAS writes the fp32 sums of 16-bit numbers; PyTorch offers no such thing on ROCm.
HAS_WIDE_SUMS = torch.version.hip is None


def is_transformed() -> bool:
    """Under torch.func (grad, jvp, vmap), or where forward-mode AD may have made dual tensors."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def addmm(addend: Tensor | None, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """addend + Σ left @ right, a new tensor (M×N) in the dtype of the first left.

    Args:
        addend: (M×N) or (N), in the dtype of the result; None for none.
        pairs: Pairs of left (M×K_i) and right (K_i×N), each pair in one dtype.
    """
    (left, right), *others = pairs
    if _through_fp32(left, right):
        return _in_chunks(addend, pairs)
    y = torch.mm(left, right) if addend is None else torch.addmm(addend, left, right)
    for left, right in others:
        y = added(y, left, right)
    return y


def added(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y + left @ right (M×N), all of one dtype: in place, in y, where that is multiplied without a cast.

    Under a function transform in a new tensor: vmap cannot write batched values into an unbatched y.
    """
    if _through_fp32(left, right):
        return _in_chunks(y, [(left, right)])
    if torch._C._are_functorch_transforms_active():
        return torch.addmm(y, left, right)
    return y.addmm_(left, right)


def unrounded(left: Tensor, right: Tensor) -> Tensor | None:
    """left @ right (M×N) from left (M×K) and right (K×N) of one dtype, in fp32 (fp64 where they are).

    None where no single product gives that: of 16-bit numbers, anywhere but on CUDA, and where something has
    to be differentiated, because PyTorch 2.13 has no derivative of that product.
    """
    if left.dtype not in QUERIES:
        return torch.mm(left, right)
    needs_grad = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if not left.is_cuda or not HAS_WIDE_SUMS or needs_grad or is_transformed():
        return None
    return torch.mm(left, right, out_dtype=torch.float32)


def product_dtype(left: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to multiply x by the factors: ``dtype``, or fp32 instead of a 16-bit one.

    It is fp32 for few rows on a CPU where all factors are fp32: nothing is rounded, and it is faster.

    Args:
        left: The matrix x, (tokens, in_features), whose rows and device decide.
        factors: The factors of the adapter.
        dtype: The dtype that was requested.
    """
    if dtype not in QUERIES or left.shape[0] > FEW_TO_ROUND or not left.is_cpu:
        return dtype
    are_masters = all(factor.dtype == torch.float32 for factor in factors)
    return torch.float32 if are_masters else dtype


def multiplies_itself(left: Tensor) -> bool:
    """Whether `addmm` uses PyTorch's own product for every product of ``left``."""
    return left.dtype not in QUERIES or not left.is_cpu or has_native(left.dtype)


def _through_fp32(left: Tensor, right: Tensor) -> bool:
    if multiplies_itself(left):
        return False
    return left.shape[0] > FEW_ROWS or right.stride(0) != 1


def _in_chunks(addend: Tensor | None, pairs) -> Tensor:
    rows, columns = pairs[0][0].shape[0], pairs[0][1].shape[1]
    longest = max(1, *(right.shape[0] for _, right in pairs))
    column_step = max(1, min(columns, max(SHORTEST, CHUNK // longest)))
    row_step = max(SHORTEST, CHUNK // max(longest, column_step))
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        row_step, column_step = rows, columns  # vmap cannot trace the writes, a graph should not unroll them
    if rows <= row_step and columns <= column_step:
        return _rounded(addend, [(left, right.float()) for left, right in pairs], pairs[0][0].dtype)
    out = pairs[0][0].new_empty(rows, columns)
    for start in range(0, columns, column_step):
        these = slice(start, start + column_step)
        wide = [(left, right[:, these].float()) for left, right in pairs]
        for first in range(0, rows, row_step):
            some = slice(first, first + row_step)
            base = addend
            if base is not None:
                base = base[these] if base.dim() == 1 else base[some, these]
            out[some, these] = _rounded(base, [(left[some], right) for left, right in wide], out.dtype)
    return out


def _rounded(addend: Tensor | None, pairs, dtype: torch.dtype) -> Tensor:
    total = None if addend is None else addend.float()
    for left, right in pairs:
        left = left.float()
        total = left @ right if total is None else torch.addmm(total, left, right)
    return total.to(dtype)


def query(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports this dtype, as PyTorch itself queries it; False in a build without oneDNN."""
    try:
        return bool(getattr(torch.ops.mkldnn, QUERIES[dtype])())
    except (AttributeError, RuntimeError):
        return False


# Queried at import, in microseconds: a graph that is being traced can read an answer but not query.
ANSWERS = {dtype: query(dtype) for dtype in QUERIES}


def has_native(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for this dtype, by which oneDNN multiplies it fast."""
    return ANSWERS.get(dtype, True)
