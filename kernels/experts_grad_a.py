"""dA_e = g_eᵀ x_e for a stack of experts, accumulated in fp32; 0 for an expert without rows.

`grad_a`, with a sum over each expert's own rows. The experts are the programs: a sum is not split, and one
expert that has most of the rows takes longer than the same rows spread over many. Memory-bound: x is read
once. Formula: `mica.reference_experts`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mica.kernels import checks, configs, limits, tuning
from mica.kernels.common import (
    TRITON_DTYPES,
    cast,
    ceil_div,
    dot,
    fp32_setting,
    padded_rank,
    precision,
    target_of,
)
from mica.kernels.experts_tiles import rows_of
from mica.kernels.launching import Choice, Plan, Plans, layout, strides


@triton.jit(do_not_specialize=["num_rows"])
def _experts_grad_a_kernel(
    g_ptr,  # (S, COLUMNS)
    x_ptr,  # (S, K)
    offsets_ptr,  # (E)
    out_ptr,  # dA: (E, RANK, K), contiguous
    num_rows,
    num_experts,
    in_features,
    stride_gm,
    stride_gr,
    stride_xm,
    stride_xk,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    first, last = rows_of(offsets_ptr, expert, num_rows, num_experts)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)

    g_ptrs = g_ptr + rows[:, None] * stride_gm + ranks.to(tl.int64)[None, :] * stride_gr
    x_ptrs = x_ptr + rows[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk
    step = tl.full((), BLOCK_M, tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(first, last, BLOCK_M):
        inside = (start + tl.arange(0, BLOCK_M) < last)[:, None]
        x_mask = inside & tl.full((1, BLOCK_K), True, tl.int1)
        if not EVEN_K:
            x_mask = inside & (columns < in_features)[None, :]
        g = tl.load(g_ptrs, mask=inside & (ranks < COLUMNS)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        acc = dot(tl.trans(cast(g, COMPUTE)), cast(x, COMPUTE), acc, PRECISION)
        g_ptrs += step * stride_gm
        x_ptrs += step * stride_xm

    offsets = (expert.to(tl.int64) * RANK + ranks[:, None]) * in_features + columns[None, :]
    mask = (ranks < RANK)[:, None] & (columns < in_features)[None, :]
    tl.store(out_ptr + offsets, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def plan_experts_grad_a(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    rank: int,
    *,
    out_dtype: torch.dtype = torch.float32,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `experts_grad_a` chooses from; ``target`` overrides the device's."""
    checks.matrix("g", g)
    checks.matrix("x", x)
    limits.same_device(g=g, x=x, offsets=offsets)
    checks.offsets(offsets)
    checks.contracted("g", g, 0, "x", x, 0)
    checks.rank("g", rank)
    checks.columns("g", g, rank)
    dtype = checks.compute_dtype(torch.promote_types(g.dtype, x.dtype))

    (num_rows, in_features), num_experts = x.shape, offsets.shape[0]
    target = target or target_of(x.device)
    block_r = padded_rank(rank)

    def plan(config: configs.Config) -> Plan:
        return Plan(
            _experts_grad_a_kernel,
            (ceil_div(in_features, config.block_k), num_experts),
            {
                "num_rows": num_rows,
                "num_experts": num_experts,
                "in_features": in_features,
                **strides(gm_gr=g, xm_xk=x),
            },
            {
                "RANK": rank,
                "COLUMNS": g.shape[1],
                "BLOCK_M": config.block_m,
                "BLOCK_K": config.block_k,
                "BLOCK_R": block_r,
                "EVEN_K": in_features % config.block_k == 0,
                "COMPUTE": TRITON_DTYPES[dtype],
                "PRECISION": precision(dtype, target),
            },
            config,
            (num_experts, rank, in_features),
            out_dtype,
        )

    numbers = num_experts * in_features
    return Choice(
        "experts_grad_a",
        x.device,
        (tuning.bucket(num_rows), num_experts, in_features, rank, g.dtype, x.dtype),
        (config,) if config else configs.experts_grad_a(target, numbers, block_r, dtype.itemsize),
        plan,
        functools.partial(_operands, g=g, x=x, offsets=offsets),
    )


def _operands(plan: Plan, g: Tensor, x: Tensor, offsets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    grad = x.new_empty(plan.shape, dtype=plan.dtype)
    return grad, (g, x, offsets, grad)


plans = Plans()


def key_of(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    rank: int,
    *,
    out_dtype: torch.dtype = torch.float32,
    config: configs.Config | None = None,
) -> tuple:
    """The key in ``plans`` of `experts_grad_a` with these arguments."""
    return (
        tuning.state(),
        layout(g),
        layout(x),
        layout(offsets),
        rank,
        out_dtype,
        config,
        fp32_setting() if torch.float32 in (g.dtype, x.dtype) else None,
    )


def experts_grad_a(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    rank: int,
    *,
    out_dtype: torch.dtype = torch.float32,
    config: configs.Config | None = None,
) -> Tensor:
    """dA_e = g_eᵀ x_e, accumulated in fp32 in the order of the rows and rounded once; the host does not wait.

    Args:
        g: (num_rows, rank) or as wide as `padded_columns(rank)`, as `experts_down` gives it.
        x: (num_rows, in_features), fp32/bf16/fp16, any strides; its rows sorted by expert.
        offsets: (num_experts,), int32/int64, contiguous: where each expert's rows end, in ascending order, at
            most num_rows.
        rank: rows of each expert's result, from 1 to 256.
        out_dtype: default fp32.
        config: a launch configuration; default the first of `configs.experts_grad_a`.

    Returns:
        (num_experts, rank, in_features) in out_dtype, contiguous; zeros for an expert without rows.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    options = {"out_dtype": out_dtype, "config": config}
    key = key_of(g, x, offsets, rank, **options)
    plan = plans.get(key)
    if plan is None:
        return plan_experts_grad_a(g, x, offsets, rank, **options).first(plans, key)
    grad, tensors = _operands(plan, g, x, offsets)
    plan(*tensors)
    return grad
