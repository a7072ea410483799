"""y += scale·keep⊙(h P) in place: the wide product of the forward (P = Bᵀ) and of dx (h = g, P = A).

With ``offsets`` each expert has its own P and bias. The kernel is memory-bound: y is read and written once,
at 2·M·N·r flops for 2·M·N numbers. Formulas: `mica.paths.reference_path`.
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
    dropout_keep,
    dropout_numbers,
    padded_rank,
    precision,
    target_of,
    wide_product,
)
from mica.kernels.expert_tiles import block_e, most_tiles, tile_of
from mica.kernels.launching import Plan, Planned, launcher, strides


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _up_projection_kernel(
    base_ptr,  # (M, N)
    out_ptr,  # (M, N); may be base
    h_ptr,  # (M, H_RANK columns)
    p_ptr,  # (P_RANK, N); of experts (E, P_RANK, N)
    seed_ptr,  # (1) int64; None: no dropout
    bias_ptr,  # of experts (E, N), or None
    offsets_ptr,  # (E); None: no experts
    num_rows,
    num_experts,
    out_features,
    stride_bm,
    stride_bn,
    stride_om,
    stride_on,
    stride_hm,
    stride_hr,
    stride_pe,
    stride_pr,
    stride_pn,
    stride_ce,
    stride_cn,
    scale,
    threshold,
    H_RANK: tl.constexpr,
    P_RANK: tl.constexpr,
    BLOCK_E: tl.constexpr,  # 0: without experts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs write one row of tiles: they share h's rows, and y's memory pages are opened once.
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert, first_row, end = tile_of(offsets_ptr, tile, num_rows, num_experts, BLOCK_E, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None] & tl.full((1, BLOCK_N), True, tl.int1)
    if not EVEN_N:
        mask = mask & (columns < out_features)[None, :]
    rows_64 = rows.to(tl.int64)[:, None]
    columns_64 = columns.to(tl.int64)[None, :]
    out_ptrs = out_ptr + rows_64 * stride_om + columns_64 * stride_on
    if BLOCK_E:
        if first_row >= end:
            return
        if expert >= num_experts:  # rows of no expert, which nothing has written
            tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty), mask=mask)
            return
        p_ptr += expert.to(tl.int64) * stride_pe
    # requested before the product is computed: y is nearly all of the traffic
    base = tl.load(base_ptr + rows_64 * stride_bm + columns_64 * stride_bn, mask=mask, other=0.0)
    base = base.to(tl.float32)
    if bias_ptr is not None:
        bias = bias_ptr + expert.to(tl.int64) * stride_ce + columns.to(tl.int64) * stride_cn
        base += tl.load(bias, mask=columns < out_features, other=0.0).to(tl.float32)[None, :]
    acc = wide_product(
        h_ptr, p_ptr, rows, columns, end, out_features, stride_hm, stride_hr, stride_pr, stride_pn,
        H_RANK, P_RANK, BLOCK_R, BLOCK_K, EVEN_N, COMPUTE, PRECISION,
    ) * scale  # fmt: skip
    if seed_ptr is not None:
        acc = tl.where(dropout_keep(tl.load(seed_ptr), rows, columns, threshold), acc, 0.0)
    tl.store(out_ptrs, cast(base + acc, out_ptr.dtype.element_ty), mask=mask)


def _run(launch, plan, base, h, factor, seed=None, out=None, bias=None, offsets=None):
    out = base if out is None else out
    launch(base, out, h, factor, seed, bias, offsets)
    return out


@launcher(_run)
def up_projection_(
    base: Tensor,
    h: Tensor,
    factor: Tensor,
    seed: Tensor | None = None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    target: str | None = None,
) -> Planned:
    """base += scale·keep⊙(h factor) in place: summed in fp32, rounded once; the host does not wait.

    Args:
        base: (num_rows, out_features), fp32/bf16/fp16, any strides.
        h: (num_rows, rank) or as wide as `padded_columns(rank)`, as `down_projection` gives it.
        factor: (rank, out_features), any strides: lora_B transposed, or lora_A. Its rows may be padded too.
            With ``offsets`` (num_experts, rank, out_features).
        seed, dropout_p: zero the elements of the *product* that `down_projection` dropped from x.
        out: where to write instead of into base; shape of base.
        bias: of experts, (num_experts, out_features), any strides.
        offsets: (num_experts,), int32/int64, contiguous: where each expert's rows end, ascending. Rows after
            the last become 0, whatever they held.
        scale: dimensionless, applied to the fp32 product.
        compute_dtype: dtype of the factors of the product; default that of h.
        target: to plan for; default the device's.

    Returns:
        base (or out).

    Raises:
        LaunchError: no configuration can be launched here.
    """
    num_rows, out_features = base.shape
    num_experts = 0 if offsets is None else len(offsets)
    p_rank = factor.shape[-2]
    block_r = padded_rank(p_rank)
    dtype = compute_dtype or h.dtype
    written = base if out is None else out

    def plan(config: configs.Config) -> Plan:
        numbers = {
            "num_rows": num_rows,
            "num_experts": num_experts,
            "out_features": out_features,
            **strides(bm_bn=base, om_on=written, hm_hr=h, pe_pr_pn=factor, ce_cn=bias),
            **dropout_numbers(dropout_p, scale),
        }
        meta = {
            "H_RANK": h.shape[1],
            "P_RANK": p_rank,
            "BLOCK_E": block_e(num_experts),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": block_r,
            "BLOCK_K": min(config.block_k, block_r),
            "EVEN_N": out_features % config.block_n == 0,
            "COMPUTE": TRITON_DTYPES[dtype],
            "PRECISION": precision(dtype),
        }
        tiles_m = most_tiles(num_rows, num_experts, config.block_m, tail=True)
        tiles_n = ceil_div(out_features, config.block_n)
        return Plan(_up_projection_kernel, (tiles_m * tiles_n, 1), numbers, meta, config)

    target = target or target_of(base.device)
    if num_experts:
        table = configs.experts_up(target, num_rows // num_experts, block_r, dtype.itemsize)
    else:
        table = configs.up_projection(target, num_rows, block_r, dtype.itemsize)
    return table, plan
