"""The low-rank term of an embedding, s·A[:, indices]ᵀ Bᵀ, and its gradient without atomics on data.

Formulas: `mica.reference.embedding` and `mica.reference.grad_a_embedding`.
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
from mica.kernels.launching import Choice, Plan, Plans, layout, strides


@triton.jit(do_not_specialize=["num_tokens"])
def _embedding_kernel(
    index_ptr,  # (M) integers
    a_ptr,  # (RANK, num_embeddings)
    p_ptr,  # (P_RANK, N)
    out_ptr,  # (M, N), contiguous
    num_tokens,
    num_embeddings,
    embedding_dim,
    stride_ar,
    stride_av,
    stride_pr,
    stride_pn,
    n_per_split,
    scale,
    RANK: tl.constexpr,
    P_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_N: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * n_per_split
    last = min(first + n_per_split, embedding_dim)
    row_mask = rows < num_tokens
    index = tl.load(index_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    # An index out of range must not read other memory: its row becomes NaN, which cannot be overlooked.
    valid = (index >= 0) & (index < num_embeddings)
    index = tl.where(valid, index, 0)
    a_ptrs = a_ptr + index[:, None] * stride_av + ranks.to(tl.int64)[None, :] * stride_ar
    # a gather: each number is in a different sector, so it is done once for all of the row's output
    h = tl.load(a_ptrs, mask=row_mask[:, None] & (ranks < RANK)[None, :], other=0.0)
    h = cast(h, COMPUTE)
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        p_ptrs = p_ptr + ranks.to(tl.int64)[:, None] * stride_pr + columns.to(tl.int64)[None, :] * stride_pn
        p_mask = (ranks < P_RANK)[:, None] & tl.full((1, BLOCK_N), True, tl.int1)
        mask = row_mask[:, None] & tl.full((1, BLOCK_N), True, tl.int1)
        if not EVEN_N:
            p_mask = p_mask & (columns < last)[None, :]
            mask = mask & (columns < last)[None, :]
        p = tl.load(p_ptrs, mask=p_mask, other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = dot(h, cast(p, COMPUTE), acc, PRECISION) * scale
        acc = tl.where(valid[:, None], acc, float("nan"))
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * embedding_dim + columns[None, :]
        tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "skipped"])
def _scatter_kernel(
    sorted_ptr,  # (M) indices in ascending order
    order_ptr,  # (M) where each of them came from; among equal ones ascending
    g_ptr,  # (M, COLUMNS), contiguous
    grad_ptr,  # (RANK, num_embeddings), contiguous, zeros
    num_tokens,
    num_embeddings,
    skipped,  # the index that gets no gradient, or -1
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The program of an index's first place in the sorted list adds all of its rows of g, in order."""
    place = tl.program_id(0).to(tl.int64)
    index = tl.load(sorted_ptr + place).to(tl.int64)
    before = tl.load(sorted_ptr + tl.maximum(place - 1, 0)).to(tl.int64)
    is_first = (place == 0) | (before != index)
    if is_first & (index != skipped) & (index >= 0) & (index < num_embeddings):
        ranks = tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R,), tl.float32)
        more = True
        while more:
            places = place + tl.arange(0, BLOCK_M)
            same = tl.load(sorted_ptr + places, mask=places < num_tokens, other=-1).to(tl.int64) == index
            same = same & (places < num_tokens)
            rows = tl.load(order_ptr + places, mask=same, other=0).to(tl.int64)
            mask = same[:, None] & (ranks < COLUMNS)[None, :]
            g = tl.load(g_ptr + rows[:, None] * COLUMNS + ranks[None, :], mask=mask, other=0.0)
            total += tl.sum(g.to(tl.float32), axis=0)
            place += BLOCK_M
            more = tl.sum(same.to(tl.int32), axis=0) == BLOCK_M
        grad_ptrs = grad_ptr + ranks.to(tl.int64) * num_embeddings + index
        tl.store(grad_ptrs, cast(total, grad_ptr.dtype.element_ty), mask=ranks < RANK)


def plan_embedding(
    indices: Tensor,
    lora_A: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `embedding` chooses from; ``target`` overrides the device's."""
    checks.indices(indices)
    checks.matrix("lora_A", lora_A)
    checks.matrix("factor", factor)
    limits.same_device(indices=indices, lora_A=lora_A, factor=factor)
    checks.rank("lora_A", lora_A.shape[0])
    checks.factor_rank(lora_A.shape[0], factor)
    dtype = checks.compute_dtype(compute_dtype or lora_A.dtype)

    (rank, num_embeddings), num_tokens = lora_A.shape, indices.shape[0]
    p_rank, embedding_dim = factor.shape
    target = target or target_of(lora_A.device)
    block_r = padded_rank(rank)

    def plan(config: configs.Config) -> Plan:
        tiles = ceil_div(num_tokens, config.block_m)
        splits = max(1, min(configs.PROGRAMS // max(1, tiles), ceil_div(embedding_dim, config.block_n)))
        n_per_split = ceil_div(ceil_div(embedding_dim, splits), config.block_n) * config.block_n
        return Plan(
            _embedding_kernel,
            (tiles, ceil_div(embedding_dim, n_per_split)),
            {
                "num_tokens": num_tokens,
                "num_embeddings": num_embeddings,
                "embedding_dim": embedding_dim,
                **strides(ar_av=lora_A, pr_pn=factor),
                "n_per_split": n_per_split,
                "scale": float(scale),
            },
            {
                "RANK": rank,
                "P_RANK": p_rank,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_R": block_r,
                "EVEN_N": embedding_dim % config.block_n == 0,
                "COMPUTE": TRITON_DTYPES[dtype],
                "PRECISION": precision(dtype, target),
            },
            config,
            (num_tokens, embedding_dim),
            dtype,
        )

    return Choice(
        "embedding",
        lora_A.device,
        (tuning.bucket(num_tokens), num_embeddings, embedding_dim, rank, lora_A.dtype, dtype),
        (config,) if config else configs.embedding(target, num_tokens, block_r, dtype.itemsize),
        plan,
        functools.partial(_embedding_operands, indices=indices, lora_A=lora_A, factor=factor),
    )


def _embedding_operands(
    plan: Plan, indices: Tensor, lora_A: Tensor, factor: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows, columns = plan.shape
    out = lora_A.new_empty(rows, columns, dtype=plan.dtype)
    return out, (indices.contiguous(), lora_A, factor, out)


_plans = Plans()


def embedding(
    indices: Tensor,
    lora_A: Tensor,
    factor: Tensor,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """scale·A[:, indices]ᵀ factor, accumulated in fp32 and rounded once.

    Args:
        indices: (num_tokens), int32 or int64, from 0 to num_embeddings - 1. Elsewhere the row is NaN.
        lora_A: (rank, num_embeddings), fp32/bf16/fp16, any strides.
        factor: (rank, embedding_dim), any strides: lora_B transposed. Its rows may be padded.
        scale: dimensionless.
        compute_dtype: dtype of the factors of the product and of the result; default that of lora_A.
        config: a launch configuration; default the first of `configs.embedding`.

    Returns:
        (num_tokens, embedding_dim) in compute_dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    key = (
        tuning.state(),
        layout(indices),
        layout(lora_A),
        layout(factor),
        scale,
        compute_dtype,
        config,
        fp32_setting() if (compute_dtype or lora_A.dtype) is torch.float32 else None,
    )
    plan = _plans.get(key)
    if plan is None:
        options = {"scale": scale, "compute_dtype": compute_dtype, "config": config}
        return plan_embedding(indices, lora_A, factor, **options).first(_plans, key)
    out, tensors = _embedding_operands(plan, indices, lora_A, factor)
    plan(*tensors)
    return out


def plan_grad_a_embedding(
    g: Tensor,
    indices: Tensor,
    rank: int,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Choice:
    """The launch that `grad_a_embedding` makes."""
    checks.indices(indices)
    checks.matrix("g", g)
    limits.same_device(indices=indices, g=g)
    checks.rank("g", rank)
    checks.columns("g", g, rank)
    checks.contracted("g", g, 0, "indices", indices, 0)
    block_r = padded_rank(g.shape[1])

    def plan(config: configs.Config) -> Plan:
        return Plan(
            _scatter_kernel,
            (indices.shape[0], 1),
            {
                "num_tokens": indices.shape[0],
                "num_embeddings": num_embeddings,
                "skipped": -1 if padding_idx is None else padding_idx % num_embeddings,
            },
            {"RANK": rank, "COLUMNS": g.shape[1], "BLOCK_M": config.block_m, "BLOCK_R": block_r},
            config,
            (rank, num_embeddings),
            out_dtype,
        )

    return Choice(
        "grad_a_embedding",
        g.device,
        (),
        (configs.Config(1024 // block_r, 0, 0, 4, 1),),
        plan,
        functools.partial(_scatter_operands, g=g, indices=indices),
    )


def _scatter_operands(plan: Plan, g: Tensor, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    ordered, order = indices.sort(stable=True)
    grad = g.new_zeros(plan.shape, dtype=plan.dtype)
    return grad, (ordered, order, g.contiguous(), grad)


_scatter_plans = Plans()


def grad_a_embedding(
    g: Tensor,
    indices: Tensor,
    rank: int,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dA of `embedding`: column j is the sum of the rows of g whose index is j, in the order of the tokens.

    Sorted and then summed by one program per index: no atomics, so reruns are bitwise equal.

    Args:
        g: (num_tokens, rank) or as wide as `padded_columns(rank)`: scale·dy B.
        indices: (num_tokens), int32 or int64.
        rank, num_embeddings: the shape of the result.
        padding_idx: the column that stays 0.
        out_dtype: default fp32.

    Returns:
        (rank, num_embeddings) in out_dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: it cannot be launched here.
    """
    key = (layout(g), layout(indices), rank, num_embeddings, padding_idx, out_dtype)
    plan = _scatter_plans.get(key)
    if plan is None:
        options = {"padding_idx": padding_idx, "out_dtype": out_dtype}
        return plan_grad_a_embedding(g, indices, rank, num_embeddings, **options).first(_scatter_plans, key)
    grad, tensors = _scatter_operands(plan, g, indices)
    plan(*tensors)
    return grad
