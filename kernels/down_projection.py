"""h = scale·drop(x) Pᵀ: the skinny product of the forward (P = A) and of the backward (x = dy, P = Bᵀ).

Memory-bound: x is read once, at 2·M·K·r flops for M·K numbers. Formulas: `mica.reference.linear` and
`mica.reference.grad_h`.
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
    ceil_div,
    dot,
    dropout_keep,
    fp32_setting,
    keep_threshold,
    padded_rank,
    precision,
    target_of,
)
from mica.kernels.launching import Choice, Plan, Plans, layout, strides
from mica.kernels.limits import padded_columns
from mica.kernels.split_sum import add_parts, split_evenly, store_sum


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "threshold"])
def _down_projection_kernel(
    x_ptr,  # (M, K)
    p_ptr,  # (r, K)
    out_ptr,  # h: (M, COLUMNS), contiguous
    partial_ptr,  # (splits, M, COLUMNS) fp32, contiguous
    counter_ptr,  # (M / BLOCK_M) int32, zeros
    seed_ptr,  # (1) int64
    num_tokens,
    in_features,
    stride_xm,
    stride_xk,
    stride_pr,
    stride_pk,
    k_per_split,
    num_splits,
    scale,
    threshold,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    CLAMPED: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST_ADDS: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    first = split * k_per_split
    last = min(first + k_per_split, in_features)
    columns = first + tl.arange(0, BLOCK_K)

    # On NVIDIA rows beyond the last read the last one again and are not stored: the loop needs no mask for
    # them, and fp32 with dropout does not spill. On AMD loads without a mask become narrow.
    near = tl.minimum(rows, num_tokens - 1) if CLAMPED else rows
    x_ptrs = x_ptr + near.to(tl.int64)[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    p_ptrs = p_ptr + ranks.to(tl.int64)[None, :] * stride_pr + columns.to(tl.int64)[:, None] * stride_pk
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(first, last, BLOCK_K):
        x_mask = (rows < num_tokens)[:, None]
        p_mask = (ranks < RANK)[None, :]
        if not EVEN_K:
            inside = start + tl.arange(0, BLOCK_K) < last
            x_mask = inside[None, :] if CLAMPED else x_mask & inside[None, :]
            p_mask = p_mask & inside[:, None]
        if EVEN_K and CLAMPED:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if DROPOUT:
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
    mask = (rows < num_tokens)[:, None] & (ranks < COLUMNS)[None, :]
    size = tl.cast(num_tokens, tl.int64) * COLUMNS
    store_sum(
        acc, scale, out_ptr, offsets, mask, partial_ptr, counter_ptr + tile, split, num_splits, size,
        SPLIT, LAST_ADDS,
    )  # fmt: skip


def plan_down_projection(
    x: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `down_projection` chooses from; ``target`` overrides the device's."""
    checks.matrix("x", x)
    checks.matrix("factor", factor)
    limits.same_device(x=x, factor=factor)
    checks.contracted("x", x, 1, "factor", factor, 1)
    checks.rank("factor", factor.shape[0])
    limits.dropout(dropout_p, seed)
    dtype = checks.compute_dtype(compute_dtype or x.dtype)

    (num_tokens, in_features), rank = x.shape, factor.shape[0]
    target = target or target_of(x.device)
    block_r, columns = padded_rank(rank), padded_columns(rank)
    scale, size = float(scale) / (1.0 - dropout_p), num_tokens * columns

    def plan(config: configs.Config) -> Plan:
        tiles = ceil_div(num_tokens, config.block_m)
        k_per_split, splits = split_evenly(in_features, config.block_k, tiles, columns, x.element_size())
        then = add_parts(size, splits, scale, target)
        return Plan(
            _down_projection_kernel,
            (tiles, splits),
            {
                "num_tokens": num_tokens,
                "in_features": in_features,
                **strides(xm_xk=x, pr_pk=factor),
                "k_per_split": k_per_split,
                "num_splits": splits,
                "scale": scale,
                "threshold": keep_threshold(dropout_p),
            },
            {
                "RANK": rank,
                "COLUMNS": columns,
                "BLOCK_M": config.block_m,
                "BLOCK_K": config.block_k,
                "BLOCK_R": block_r,
                "EVEN_K": in_features % config.block_k == 0,
                "CLAMPED": target.startswith("sm_"),
                "SPLIT": splits > 1,
                "LAST_ADDS": then is None,
                "DROPOUT": dropout_p > 0,
                "COMPUTE": TRITON_DTYPES[dtype],
                "PRECISION": precision(dtype, target),
            },
            config,
            (num_tokens, columns),
            dtype,
            splits * size if splits > 1 else 0,
            then,
        )

    return Choice(
        "down_projection",
        x.device,
        (tuning.bucket(num_tokens), in_features, rank, x.dtype, dtype, dropout_p > 0, *x.stride()[1:]),
        (config,) if config else configs.down_projection(target, num_tokens, block_r, dtype.itemsize),
        plan,
        functools.partial(_operands, x=x, factor=factor, seed=seed if dropout_p > 0 else x),
    )


def _operands(plan: Plan, x: Tensor, factor: Tensor, seed: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows, columns = plan.shape
    h = x.new_empty(rows, columns, dtype=plan.dtype)
    partial, counter = workspace.of_split(plan, x) if plan.parts else (h, h)
    return h, (x, factor, h, partial, counter, seed)


plans = Plans()


def key_of(
    x: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
) -> tuple:
    """The key in ``plans`` of `down_projection` with these arguments."""
    return (
        tuning.state(),
        layout(x),
        layout(factor),
        scale,
        compute_dtype,
        dropout_p,
        layout(seed) if dropout_p else None,
        config,
        fp32_setting() if (compute_dtype or x.dtype) is torch.float32 else None,
    )


def run(plan: Plan, x: Tensor, factor: Tensor, seed: Tensor | None = None) -> Tensor:
    """`down_projection` by its plan; ``seed`` if there is dropout."""
    h, tensors = _operands(plan, x, factor, x if seed is None else seed)
    plan(*tensors)
    return h


def down_projection(
    x: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """h = scale·drop(x) factorᵀ, accumulated in fp32 and rounded once.

    Args:
        x: (num_tokens, in_features), fp32/bf16/fp16, any strides.
        factor: (rank, in_features), any strides: lora_A, or lora_B transposed. 1 ≤ rank ≤ 256.
        scale: dimensionless, applied to the fp32 sum.
        compute_dtype: dtype of the factors of the product and of h; default that of x.
        dropout_p, seed: drop elements of x with probability p in [0, 1), by the int64 seed, shape (1,).
        config: a launch configuration; default the first of `configs.down_projection`.

    Returns:
        (num_tokens, padded_columns(rank)) in compute_dtype, contiguous; columns from rank on are 0.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    options = {"scale": scale, "compute_dtype": compute_dtype, "dropout_p": dropout_p, "seed": seed}
    key = key_of(x, factor, config=config, **options)
    plan = plans.get(key)
    if plan is None:
        return plan_down_projection(x, factor, config=config, **options).first(plans, key)
    return run(plan, x, factor, seed if dropout_p else None)
