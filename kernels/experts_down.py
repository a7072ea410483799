"""h_e = scale·x_e P_eᵀ for a stack of experts: of the forward (P = A) and of the backward (x = dy, P = Bᵀ).

`down_projection`, with a P for each expert. Memory-bound: x is read once, and of P the experts with rows.
Formulas: `mica.reference_experts`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mica.kernels import checks, configs, limits, tuning, workspace
from mica.kernels.common import (
    TRITON_DTYPES,
    cast,
    dot,
    fp32_setting,
    padded_rank,
    precision,
    target_of,
)
from mica.kernels.experts_tiles import block_e, most_tiles, tile_of
from mica.kernels.launching import Choice, Plan, Plans, layout, strides
from mica.kernels.limits import padded_columns
from mica.kernels.split_sum import add_parts, split_evenly, store_sum


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _experts_down_kernel(
    x_ptr,  # (S, K)
    p_ptr,  # (E, r, K)
    offsets_ptr,  # (E)
    out_ptr,  # h: (S, COLUMNS), contiguous
    partial_ptr,  # (splits, S, COLUMNS) fp32, contiguous
    counter_ptr,  # (tiles) int32, zeros
    num_rows,
    num_experts,
    in_features,
    stride_xm,
    stride_xk,
    stride_pe,
    stride_pr,
    stride_pk,
    k_per_split,
    num_splits,
    scale,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    CLAMPED: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST_ADDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    expert, first_row, end = tile_of(offsets_ptr, tile, num_rows, num_experts, BLOCK_E, BLOCK_M)
    if (expert < num_experts) & (first_row < end):  # the same for all splits of a tile
        rows = first_row + tl.arange(0, BLOCK_M)
        ranks = tl.arange(0, BLOCK_R)
        first = split * k_per_split
        last = min(first + k_per_split, in_features)
        columns = (first + tl.arange(0, BLOCK_K)).to(tl.int64)

        # as in `down_projection`: rows beyond the expert's last read that one again and are not stored
        near = tl.minimum(rows, end - 1) if CLAMPED else rows
        x_ptrs = x_ptr + near.to(tl.int64)[:, None] * stride_xm + columns[None, :] * stride_xk
        p_ptrs = p_ptr + expert.to(tl.int64) * stride_pe
        p_ptrs = p_ptrs + ranks.to(tl.int64)[None, :] * stride_pr + columns[:, None] * stride_pk
        step = tl.full((), BLOCK_K, tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(first, last, BLOCK_K):
            x_mask = (rows < end)[:, None]
            p_mask = (ranks < RANK)[None, :]
            if not EVEN_K:
                inside = start + tl.arange(0, BLOCK_K) < last
                x_mask = inside[None, :] if CLAMPED else x_mask & inside[None, :]
                p_mask = p_mask & inside[:, None]
            if EVEN_K and CLAMPED:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=x_mask, other=0.0)
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
        store_sum(
            acc, scale, out_ptr, offsets, mask, partial_ptr, counter_ptr + tile, split, num_splits, size,
            SPLIT, LAST_ADDS,
        )  # fmt: skip


def plan_experts_down(
    x: Tensor,
    offsets: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `experts_down` chooses from; ``target`` overrides the device's."""
    checks.matrix("x", x)
    checks.matrix("factor", factor, 3)
    limits.same_device(x=x, offsets=offsets, factor=factor)
    checks.offsets(offsets, "factor", factor)
    checks.contracted("x", x, 1, "factor", factor, 2)
    checks.rank("factor", factor.shape[1])
    dtype = checks.compute_dtype(compute_dtype or x.dtype)

    (num_rows, in_features), (num_experts, rank) = x.shape, factor.shape[:2]
    target = target or target_of(x.device)
    block_r, columns = padded_rank(rank), padded_columns(rank)
    scale, size = float(scale), num_rows * columns

    def plan(config: configs.Config) -> Plan:
        tiles = most_tiles(num_rows, num_experts, config.block_m, tail=False)
        k_per_split, splits = split_evenly(in_features, config.block_k, tiles, columns, x.element_size())
        then = add_parts(size, splits, scale, target)
        return Plan(
            _experts_down_kernel,
            (tiles, splits),
            {
                "num_rows": num_rows,
                "num_experts": num_experts,
                "in_features": in_features,
                **strides(xm_xk=x, pe_pr_pk=factor),
                "k_per_split": k_per_split,
                "num_splits": splits,
                "scale": scale,
            },
            {
                "RANK": rank,
                "COLUMNS": columns,
                "BLOCK_E": block_e(num_experts),
                "BLOCK_M": config.block_m,
                "BLOCK_K": config.block_k,
                "BLOCK_R": block_r,
                "EVEN_K": in_features % config.block_k == 0,
                "CLAMPED": target.startswith("sm_"),
                "SPLIT": splits > 1,
                "LAST_ADDS": then is None,
                "COMPUTE": TRITON_DTYPES[dtype],
                "PRECISION": precision(dtype, target),
            },
            config,
            (num_rows, columns),
            dtype,
            splits * size if splits > 1 else 0,
            then,
        )

    rows_each = num_rows // num_experts
    return Choice(
        "experts_down",
        x.device,
        (tuning.bucket(num_rows), num_experts, in_features, rank, x.dtype, dtype, *x.stride()[1:]),
        (config,) if config else configs.experts_down(target, rows_each, block_r, dtype.itemsize),
        plan,
        functools.partial(_operands, x=x, offsets=offsets, factor=factor),
    )


def _operands(plan: Plan, x: Tensor, offsets: Tensor, factor: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows, columns = plan.shape
    h = x.new_empty(rows, columns, dtype=plan.dtype)
    partial, counter = workspace.of_split(plan, x) if plan.parts else (h, h)
    return h, (x, factor, offsets, h, partial, counter)


plans = Plans()


def key_of(
    x: Tensor,
    offsets: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
) -> tuple:
    """The key in ``plans`` of `experts_down` with these arguments."""
    return (
        tuning.state(),
        layout(x),
        layout(offsets),
        layout(factor),
        scale,
        compute_dtype,
        config,
        fp32_setting() if (compute_dtype or x.dtype) is torch.float32 else None,
    )


def run(plan: Plan, x: Tensor, offsets: Tensor, factor: Tensor) -> Tensor:
    """`experts_down` by its plan."""
    h, tensors = _operands(plan, x, offsets, factor)
    plan(*tensors)
    return h


def experts_down(
    x: Tensor,
    offsets: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """h_e = scale·x_e factor_eᵀ, accumulated in fp32 and rounded once; the host does not wait.

    Args:
        x: (num_rows, in_features), fp32/bf16/fp16, any strides; its rows sorted by expert.
        offsets: (num_experts,), int32/int64, contiguous: where each expert's rows end, in ascending order, at
            most num_rows.
        factor: (num_experts, rank, in_features), any strides: lora_A, or lora_B with its last two dimensions
            transposed. 1 ≤ rank ≤ 256.
        scale: dimensionless, applied to the fp32 sum.
        compute_dtype: dtype of the factors of the product and of h; default that of x.
        config: a launch configuration; default the first of `configs.experts_down`.

    Returns:
        (num_rows, padded_columns(rank)) in compute_dtype, contiguous; columns from rank on are 0. Rows after
        the last offset hold anything.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    options = {"scale": scale, "compute_dtype": compute_dtype, "config": config}
    key = key_of(x, offsets, factor, **options)
    plan = plans.get(key)
    if plan is None:
        return plan_experts_down(x, offsets, factor, **options).first(plans, key)
    return run(plan, x, offsets, factor)
