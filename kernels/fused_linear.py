"""x w + bias + keep⊙(h P) / (1 − p) in one kernel: the base product with the low-rank term as its first step.

Forward: w = Wᵀ, P = Bᵀ. Backward: x = dy, w = W, h = g, P = A, with dropout's mask on the low-rank term.
This form moves fewer bytes than any other (y is written once and never read), but the base product is
Triton's instead of cuBLAS's. It pays only if that is at most 2 to 5 % slower, so it runs only where
`mica.paths.tuning` has found it to be faster. It rounds once where the others round twice. Formulas:
`mica.paths.reference_path`'s `linear` and `grad_x`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mica.kernels import configs
from mica.kernels.common import (
    TRITON_DTYPES,
    cast,
    ceil_div,
    dot,
    dropout_keep,
    dropout_numbers,
    padded_rank,
    precision,
    target_of,
    wide_product,
)
from mica.kernels.launching import Plan, Planned, launcher, strides

GROUP_M = 8  # rows of tiles that are processed together: their part of w stays in the L2 cache


@triton.jit
def _tile(tile, num_tokens, out_features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a tile in an order that keeps GROUP rows of tiles together."""
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["num_tokens", "threshold"])
def _fused_linear_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (K, N)
    h_ptr,  # (M, H_RANK columns)
    p_ptr,  # (P_RANK, N)
    out_ptr,  # (M, N), contiguous
    bias_ptr,  # (N), or None
    seed_ptr,  # (1) int64; None: no dropout
    num_tokens,
    in_features,
    out_features,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_hm,
    stride_hr,
    stride_pr,
    stride_pn,
    scale,
    threshold,
    H_RANK: tl.constexpr,
    P_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m, tile_n = _tile(tl.program_id(0), num_tokens, out_features, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # the main loop starts from bias + scale·keep⊙(h P)
    acc = wide_product(
        h_ptr, p_ptr, rows, columns, num_tokens, out_features, stride_hm, stride_hr, stride_pr, stride_pn,
        H_RANK, P_RANK, BLOCK_R, BLOCK_L, EVEN_N, LOW, PRECISION,
    ) * scale  # fmt: skip
    if seed_ptr is not None:
        acc = tl.where(dropout_keep(tl.load(seed_ptr), rows, columns, threshold), acc, 0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < out_features, other=0.0)
        acc += bias.to(tl.float32)[None, :]

    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + inner.to(tl.int64)[None, :] * stride_xk
    w_ptrs = w_ptr + inner.to(tl.int64)[:, None] * stride_wk + columns.to(tl.int64)[None, :] * stride_wn
    step = tl.full((), BLOCK_K, tl.int64)
    for start in range(0, in_features, BLOCK_K):
        x_mask = (rows < num_tokens)[:, None] & tl.full((1, BLOCK_K), True, tl.int1)
        w_mask = tl.full((BLOCK_K, BLOCK_N), True, tl.int1)
        if not EVEN_N:
            w_mask = w_mask & (columns < out_features)[None, :]
        if not EVEN_K:
            x_mask = x_mask & (start + inner < in_features)[None, :]
            w_mask = w_mask & (start + inner < in_features)[:, None]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if EVEN_N and EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        acc = dot(x, w, acc, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    mask = (rows < num_tokens)[:, None] & (columns < out_features)[None, :]
    tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def _is_aligned(matrix: Tensor) -> bool:
    """Whether every line in memory starts at a multiple of 16 bytes, so that loads can be 128 bits wide."""
    is_dense = 1 in matrix.stride()
    return is_dense and max(matrix.stride()) * matrix.element_size() % 16 == 0


def _run(launch, plan, x, w, h, factor, bias=None, seed=None):
    out = x.new_empty(*plan.shape)
    if bias is not None:
        bias = bias.contiguous()
    launch(x, w, h, factor, out, bias, seed)
    return out


@launcher(_run)
def fused_linear(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    target: str | None = None,
) -> Planned:
    """x w + bias + keep⊙(h factor) / (1 − p), all of it summed in fp32 and rounded once.

    Args:
        x: (num_tokens, in_features), fp32/bf16/fp16, any strides.
        w: (in_features, out_features) in the dtype of x, any strides: the weight transposed (forward), or
            the weight itself (backward, where in_features and out_features change places).
        h: (num_tokens, rank) or as wide as `padded_columns(rank)`; its dtype is that of the low-rank product.
        factor: (rank, out_features), any strides; its rows may be padded.
        bias: (out_features).
        seed, dropout_p: zero the elements of the low-rank term that dropout dropped.
        target: to plan for; default the device's.

    Returns:
        (num_tokens, out_features) in the dtype of x, contiguous.

    Raises:
        LaunchError: no configuration can be launched here.
    """
    num_tokens, in_features = x.shape
    out_features = w.shape[1]
    rank = factor.shape[0]
    block_r = padded_rank(rank)

    def plan(config: configs.Config) -> Plan:
        numbers = {
            "num_tokens": num_tokens,
            "in_features": in_features,
            "out_features": out_features,
            **strides(xm_xk=x, wk_wn=w, hm_hr=h, pr_pn=factor),
            **dropout_numbers(dropout_p),
        }
        meta = {
            "H_RANK": h.shape[1],
            "P_RANK": rank,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r,
            "BLOCK_L": min(configs.rank_at_a_time(h.element_size()), block_r),
            "GROUP": GROUP_M,
            "EVEN_K": in_features % config.block_k == 0,
            "EVEN_N": out_features % config.block_n == 0,
            "LOW": TRITON_DTYPES[h.dtype],
            "PRECISION": precision(torch.promote_types(x.dtype, h.dtype)),
        }
        tiles = ceil_div(num_tokens, config.block_m) * ceil_div(out_features, config.block_n)
        return Plan(
            kernel=_fused_linear_kernel,
            grid=(tiles, 1),
            numbers=numbers,
            meta=meta,
            config=config,
            shape=(num_tokens, out_features),
            dtype=x.dtype,
        )

    table = configs.fused_linear(
        target=target or target_of(x.device),
        num_tokens=num_tokens,
        out_features=out_features,
        block_r=block_r,
        is_aligned=_is_aligned(x) and _is_aligned(w),
        itemsize=x.element_size(),
        dropout=dropout_p > 0,
    )
    return table, plan
