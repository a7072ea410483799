"""h = scale·drop(x) Pᵀ: the skinny product of the forward (P = A) and of the backward (x = dy, P = Bᵀ).

With ``offsets`` each expert has its own P, and the rows of x are sorted by expert. The kernel is
memory-bound: x is read once, at 2·M·K·r flops for M·K numbers. Formulas: `mica.paths.reference_path`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mica.kernels import configs, workspace
from mica.kernels.common import (
    TRITON_DTYPES,
    cast,
    dot,
    dropout_keep,
    dropout_numbers,
    padded_rank,
    precision,
    target_of,
)
from mica.kernels.expert_tiles import block_e, most_tiles, tile_of
from mica.kernels.launching import Plan, Planned, launcher, strides
from mica.kernels.limits import padded_columns
from mica.kernels.split_k import split_evenly, store_sum


@triton.jit(do_not_specialize=["num_rows", "num_splits", "threshold"])
def _down_projection_kernel(
    x_ptr,  # (M, K)
    p_ptr,  # (r, K); of experts (E, r, K)
    out_ptr,  # h: (M, COLUMNS), contiguous
    partial_ptr,  # (splits, M, COLUMNS) fp32, contiguous; None: not split
    counter_ptr,  # (tiles) int32, zeros
    seed_ptr,  # (1) int64; None: no dropout
    offsets_ptr,  # (E); None: no experts
    num_rows,
    num_experts,
    in_features,
    stride_xm,
    stride_xk,
    stride_pe,
    stride_pr,
    stride_pk,
    per_split,
    num_splits,
    scale,
    threshold,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr,  # 0: without experts
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    expert, first_row, end = tile_of(offsets_ptr, tile, num_rows, num_experts, BLOCK_E, BLOCK_M)
    if BLOCK_E:
        if (expert >= num_experts) | (first_row >= end):  # the same for all splits of a tile
            return
        p_ptr += expert.to(tl.int64) * stride_pe
    rows = first_row + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    first = split * per_split
    last = min(first + per_split, in_features)
    columns = (first + tl.arange(0, BLOCK_K)).to(tl.int64)

    # Rows beyond the last read the last one again and are not stored: the loop needs no mask for them, and
    # fp32 with dropout does not spill.
    near = tl.minimum(rows, end - 1).to(tl.int64)
    x_ptrs = x_ptr + near[:, None] * stride_xm + columns[None, :] * stride_xk
    p_ptrs = p_ptr + ranks.to(tl.int64)[None, :] * stride_pr + columns[:, None] * stride_pk
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(first, last, BLOCK_K):
        p_mask = (ranks < RANK)[None, :]
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            inside = start + tl.arange(0, BLOCK_K) < last
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            p_mask = p_mask & inside[:, None]
        if seed_ptr is not None:
            keep = dropout_keep(seed, rows, start + tl.arange(0, BLOCK_K), threshold)
            x = tl.where(keep, x, 0.0)
        if RANK == BLOCK_R and EVEN_K:
            p = tl.load(p_ptrs)
        else:
            p = tl.load(p_ptrs, mask=p_mask, other=0.0)
        acc = dot(cast(x, COMPUTE), cast(p, COMPUTE), acc, PRECISION)
        x_ptrs += step * stride_xk
        p_ptrs += step * stride_pk

    offsets = rows.to(tl.int64)[:, None] * COLUMNS + ranks[None, :]
    mask = (rows < end)[:, None] & (ranks < COLUMNS)[None, :]
    size = tl.cast(num_rows, tl.int64) * COLUMNS
    store_sum(acc, scale, out_ptr, offsets, mask, partial_ptr, counter_ptr, tile, split, num_splits, size)


def _run(launch, plan, x, factor, seed=None, offsets=None):
    h = x.new_empty(*plan.shape, dtype=plan.dtype)
    partial, counter = workspace.of_split(plan, x)
    launch(x, factor, h, partial, counter, seed, offsets)
    return h


@launcher(_run)
def down_projection(
    x: Tensor,
    factor: Tensor,
    seed: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    target: str | None = None,
) -> Planned:
    """h = scale·drop(x) factorᵀ, accumulated in fp32 and rounded once; the host does not wait.

    Args:
        x: (num_rows, in_features), fp32/bf16/fp16, any strides.
        factor: (rank, in_features), any strides: lora_A, or lora_B transposed; 1 ≤ rank ≤ 256. With
            ``offsets`` (num_experts, rank, in_features).
        seed: int64, shape (1,), where elements of x are dropped with probability ``dropout_p`` in (0, 1).
        offsets: (num_experts,), int32/int64, contiguous: where each expert's rows end, ascending.
        scale: dimensionless, applied to the fp32 sum.
        compute_dtype: dtype of the factors of the product and of h; default that of x.
        target: to plan for; default the device's.

    Returns:
        (num_rows, padded_columns(rank)) in compute_dtype, contiguous; columns from rank on are 0. Rows after
        the last offset hold anything.

    Raises:
        LaunchError: no configuration can be launched here.
    """
    num_rows, in_features = x.shape
    num_experts = 0 if offsets is None else len(offsets)
    rank = factor.shape[-2]
    block_r = padded_rank(rank)
    columns = padded_columns(rank)
    dtype = compute_dtype or x.dtype

    def plan(config: configs.Config) -> Plan:
        tiles = most_tiles(num_rows, num_experts, config.block_m)
        per_split, splits = split_evenly(in_features, config.block_k, tiles, columns, x.element_size())
        numbers = {
            "num_rows": num_rows,
            "num_experts": num_experts,
            "in_features": in_features,
            **strides(xm_xk=x, pe_pr_pk=factor),
            "per_split": per_split,
            "num_splits": splits,
            **dropout_numbers(dropout_p, scale),
        }
        meta = {
            "RANK": rank,
            "COLUMNS": columns,
            "BLOCK_E": block_e(num_experts),
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r,
            "EVEN_K": in_features % config.block_k == 0,
            "COMPUTE": TRITON_DTYPES[dtype],
            "PRECISION": precision(dtype),
        }
        return Plan(
            kernel=_down_projection_kernel,
            grid=(tiles, splits),
            numbers=numbers,
            meta=meta,
            config=config,
            shape=(num_rows, columns),
            dtype=dtype,
            parts=splits * num_rows * columns if splits > 1 else 0,
        )

    target = target or target_of(x.device)
    if num_experts:
        table = configs.experts_down(target, num_rows // num_experts, block_r, dtype.itemsize)
    else:
        table = configs.down_projection(target, num_rows, block_r, dtype.itemsize)
    return table, plan
