"""dA = scale·gᵀ drop(x), accumulated in fp32: the tokens, which are summed over, are split.

Memory-bound: x is read once. Formula: `mica.reference.grad_a`.
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
from mica.kernels.split_sum import add_parts, split_evenly, store_sum


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "threshold"])
def _grad_a_kernel(
    g_ptr,  # (M, COLUMNS)
    x_ptr,  # (M, K)
    out_ptr,  # dA: (RANK, K), contiguous
    partial_ptr,  # (splits, RANK, K) fp32, contiguous
    counter_ptr,  # (K / BLOCK_K) int32, zeros
    seed_ptr,  # (1) int64
    num_tokens,
    in_features,
    stride_gm,
    stride_gr,
    stride_xm,
    stride_xk,
    tokens_per_split,
    num_splits,
    scale,
    threshold,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST_ADDS: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    first = split * tokens_per_split
    last = min(first + tokens_per_split, num_tokens)
    rows = first + tl.arange(0, BLOCK_M)

    g_ptrs = g_ptr + rows.to(tl.int64)[:, None] * stride_gm + ranks.to(tl.int64)[None, :] * stride_gr
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    step = tl.full((), BLOCK_M, tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(first, last, BLOCK_M):
        inside = (start + tl.arange(0, BLOCK_M) < last)[:, None]
        x_mask = inside & tl.full((1, BLOCK_K), True, tl.int1)
        if not EVEN_K:
            x_mask = inside & (columns < in_features)[None, :]
        g = tl.load(g_ptrs, mask=inside & (ranks < COLUMNS)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if DROPOUT:
            keep = dropout_keep(seed, start + tl.arange(0, BLOCK_M), columns, threshold)
            x = tl.where(keep, x, 0.0)
        acc = dot(tl.trans(cast(g, COMPUTE)), cast(x, COMPUTE), acc, PRECISION)
        g_ptrs += step * stride_gm
        x_ptrs += step * stride_xm

    offsets = ranks.to(tl.int64)[:, None] * in_features + columns[None, :]
    mask = (ranks < RANK)[:, None] & (columns < in_features)[None, :]
    size = tl.cast(in_features, tl.int64) * RANK
    store_sum(
        acc, scale, out_ptr, offsets, mask, partial_ptr, counter_ptr + tile, split, num_splits, size,
        SPLIT, LAST_ADDS,
    )  # fmt: skip


def plan_grad_a(
    g: Tensor,
    x: Tensor,
    rank: int,
    *,
    out_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `grad_a` chooses from; ``target`` overrides the device's."""
    checks.matrix("g", g)
    checks.matrix("x", x)
    limits.same_device(g=g, x=x)
    checks.contracted("g", g, 0, "x", x, 0)
    checks.rank("g", rank)
    checks.columns("g", g, rank)
    limits.dropout(dropout_p, seed)
    dtype = checks.compute_dtype(torch.promote_types(g.dtype, x.dtype))

    (num_tokens, in_features), columns = x.shape, g.shape[1]
    target = target or target_of(x.device)
    block_r = padded_rank(rank)
    scale, size = 1.0 / (1.0 - dropout_p), rank * in_features

    def plan(config: configs.Config) -> Plan:
        tiles = ceil_div(in_features, config.block_k)
        tokens_per_split, splits = split_evenly(
            max(1, num_tokens), config.block_m, tiles, columns, x.element_size()
        )
        then = add_parts(size, splits, scale, target)
        return Plan(
            _grad_a_kernel,
            (tiles, splits),
            {
                "num_tokens": num_tokens,
                "in_features": in_features,
                **strides(gm_gr=g, xm_xk=x),
                "tokens_per_split": tokens_per_split,
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
                "SPLIT": splits > 1,
                "LAST_ADDS": then is None,
                "DROPOUT": dropout_p > 0,
                "COMPUTE": TRITON_DTYPES[dtype],
                "PRECISION": precision(dtype, target),
            },
            config,
            (rank, in_features),
            out_dtype,
            splits * size if splits > 1 else 0,
            then,
        )

    return Choice(
        "grad_a",
        x.device,
        (tuning.bucket(num_tokens), in_features, rank, g.dtype, x.dtype, dropout_p > 0),
        (config,) if config else configs.grad_a(target, num_tokens, block_r, dtype.itemsize),
        plan,
        functools.partial(_operands, g=g, x=x, seed=seed if dropout_p > 0 else x),
    )


def _operands(plan: Plan, g: Tensor, x: Tensor, seed: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows, columns = plan.shape
    grad = x.new_empty(rows, columns, dtype=plan.dtype)
    partial, counter = workspace.of_split(plan, x) if plan.parts else (grad, grad)
    return grad, (g, x, grad, partial, counter, seed)


plans = Plans()


def key_of(
    g: Tensor,
    x: Tensor,
    rank: int,
    *,
    out_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
) -> tuple:
    """The key in ``plans`` of `grad_a` with these arguments."""
    return (
        tuning.state(),
        layout(g),
        layout(x),
        rank,
        out_dtype,
        dropout_p,
        layout(seed) if dropout_p else None,
        config,
        fp32_setting() if torch.float32 in (g.dtype, x.dtype) else None,
    )


def run(plan: Plan, g: Tensor, x: Tensor, seed: Tensor | None = None) -> Tensor:
    """`grad_a` by its plan; ``seed`` if there is dropout."""
    grad, tensors = _operands(plan, g, x, x if seed is None else seed)
    plan(*tensors)
    return grad


def grad_a(
    g: Tensor,
    x: Tensor,
    rank: int,
    *,
    out_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """dA = gᵀ drop(x), accumulated in fp32 and rounded once.

    Args:
        g: (num_tokens, rank) or as wide as `padded_columns(rank)`, as `down_projection` gives it.
        x: (num_tokens, in_features), fp32/bf16/fp16, any strides. No tokens give zeros.
        rank: rows of the result, from 1 to 256.
        out_dtype: default fp32.
        dropout_p, seed: as in the forward.
        config: a launch configuration; default the first of `configs.grad_a`.

    Returns:
        (rank, in_features) in out_dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    options = {"out_dtype": out_dtype, "dropout_p": dropout_p, "seed": seed}
    key = key_of(g, x, rank, config=config, **options)
    plan = plans.get(key)
    if plan is None:
        return plan_grad_a(g, x, rank, config=config, **options).first(plans, key)
    return run(plan, g, x, seed if dropout_p else None)
