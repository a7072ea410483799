"""dA = scale·gᵀ drop(x), accumulated in fp32: the tokens, which are summed over, are split.

With ``offsets`` there is one sum per expert, over its own rows, which is not split: the experts are the
programs, and one that has most of the rows takes longer. The kernel is memory-bound: x is read once.
Formulas: `mica.paths.reference_path`.
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
    ceil_div,
    dot,
    dropout_keep,
    dropout_numbers,
    padded_rank,
    precision,
    target_of,
)
from mica.kernels.expert_tiles import rows_of
from mica.kernels.launching import Plan, Planned, launcher, strides
from mica.kernels.limits import are_narrow
from mica.kernels.split_k import split_evenly, store_sum


@triton.jit(do_not_specialize=["num_rows", "num_splits", "threshold"])
def _grad_a_kernel(
    g_ptr,  # (M, COLUMNS)
    x_ptr,  # (M, K)
    out_ptr,  # dA: (RANK, K), contiguous; of experts (E, RANK, K)
    partial_ptr,  # (splits, RANK, K) fp32, contiguous; None: not split
    counter_ptr,  # (K / BLOCK_K) int32, zeros
    seed_ptr,  # (1) int64; None: no dropout
    offsets_ptr,  # (E); None: no experts
    num_rows,
    num_experts,
    in_features,
    stride_gm,
    stride_gr,
    stride_xm,
    stride_xk,
    per_split,
    num_splits,
    scale,
    threshold,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    X_FIRST: tl.constexpr,  # the sum is that of xᵀ g, transposed once before it is stored
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    if offsets_ptr is not None:
        first, last = rows_of(offsets_ptr, split, num_rows, num_experts)
        out_ptr += split.to(tl.int64) * RANK * in_features
    else:
        first = split * per_split
        last = min(first + per_split, num_rows)
    rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)

    g_ptrs = g_ptr + rows[:, None] * stride_gm + ranks.to(tl.int64)[None, :] * stride_gr
    x_ptrs = x_ptr + rows[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    step = tl.full((), BLOCK_M, tl.int64)
    if X_FIRST:
        acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    else:
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(first, last, BLOCK_M):
        inside = (start + tl.arange(0, BLOCK_M) < last)[:, None]
        x_mask = inside & tl.full((1, BLOCK_K), True, tl.int1)
        if not EVEN_K:
            x_mask = inside & (columns < in_features)[None, :]
        g = tl.load(g_ptrs, mask=inside & (ranks < COLUMNS)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if seed_ptr is not None:
            keep = dropout_keep(seed, start + tl.arange(0, BLOCK_M), columns, threshold)
            x = tl.where(keep, x, 0.0)
        if X_FIRST:
            acc = dot(tl.trans(cast(x, COMPUTE)), cast(g, COMPUTE), acc, PRECISION)
        else:
            acc = dot(tl.trans(cast(g, COMPUTE)), cast(x, COMPUTE), acc, PRECISION)
        g_ptrs += step * stride_gm
        x_ptrs += step * stride_xm

    if X_FIRST:
        acc = tl.trans(acc)
    offsets = ranks.to(tl.int64)[:, None] * in_features + columns[None, :]
    mask = (ranks < RANK)[:, None] & (columns < in_features)[None, :]
    size = tl.cast(in_features, tl.int64) * RANK
    store_sum(acc, scale, out_ptr, offsets, mask, partial_ptr, counter_ptr, tile, split, num_splits, size)


def _is_aligned(x: Tensor) -> bool:
    """Whether Triton knows that its rows, and where they end, are multiples of 16 numbers: loads are wide."""
    return x.stride(1) == 1 and not are_narrow(x.stride(0), x.shape[1])


def _run(launch, plan, g, x, seed=None, offsets=None):
    grad = x.new_empty(*plan.shape, dtype=plan.dtype)
    partial, counter = workspace.of_split(plan, x)
    launch(g, x, grad, partial, counter, seed, offsets)
    return grad


@launcher(_run)
def grad_a(
    g: Tensor,
    x: Tensor,
    seed: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    rank: int,
    out_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    target: str | None = None,
) -> Planned:
    """dA = gᵀ drop(x), accumulated in fp32 and rounded once; the host does not wait.

    Args:
        g: (num_rows, rank) or as wide as `padded_columns(rank)`, as `down_projection` gives it.
        x: (num_rows, in_features), fp32/bf16/fp16, any strides. Without rows the result is zeros.
        seed, dropout_p: as in the forward.
        offsets: (num_experts,), int32/int64, contiguous: where each expert's rows end, ascending.
        rank: rows of the result, from 1 to 256.
        out_dtype: default fp32.
        target: to plan for; default the device's.

    Returns:
        (rank, in_features) in out_dtype, contiguous; with ``offsets`` (num_experts, rank, in_features).

    Raises:
        LaunchError: no configuration can be launched here.
    """
    num_rows, in_features = x.shape
    num_experts = 0 if offsets is None else len(offsets)
    block_r = padded_rank(rank)
    dtype = torch.promote_types(g.dtype, x.dtype)
    target = target or target_of(x.device)

    def plan(config: configs.Config) -> Plan:
        tiles = ceil_div(in_features, config.block_k)
        if num_experts:
            per_split, splits = 0, 1
        else:
            length = max(1, num_rows)
            per_split, splits = split_evenly(length, config.block_m, tiles, g.shape[1], x.element_size())
        numbers = {
            "num_rows": num_rows,
            "num_experts": num_experts,
            "in_features": in_features,
            **strides(gm_gr=g, xm_xk=x),
            "per_split": per_split,
            "num_splits": splits,
            **dropout_numbers(dropout_p),
        }
        meta = {
            "RANK": rank,
            "COLUMNS": g.shape[1],
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r,
            "X_FIRST": configs.is_x_first(
                target, config, block_r, dtype.itemsize, _is_aligned(x), dropout_p > 0
            ),
            "EVEN_K": in_features % config.block_k == 0,
            "COMPUTE": TRITON_DTYPES[dtype],
            "PRECISION": precision(dtype),
        }
        return Plan(
            kernel=_grad_a_kernel,
            grid=(tiles, num_experts or splits),
            numbers=numbers,
            meta=meta,
            config=config,
            shape=(num_experts, rank, in_features) if num_experts else (rank, in_features),
            dtype=out_dtype,
            parts=splits * rank * in_features if splits > 1 else 0,
        )

    if num_experts:
        table = configs.experts_grad_a(target, num_experts * in_features, block_r, dtype.itemsize)
    else:
        table = configs.grad_a(target, num_rows, block_r, dtype.itemsize)
    return table, plan
