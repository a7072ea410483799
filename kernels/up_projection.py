"""y += scale·keep⊙(h P) in place: the wide product of the forward (P = Bᵀ) and of dx (h = g, P = A).

Memory-bound: y is read and written once, at 2·M·N·r flops for 2·M·N numbers. Formulas:
`mica.reference.linear` and `mica.reference.grad_x`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mica.kernels import checks, configs, limits, tuning
from mica.kernels.common import (
    TRITON_DTYPES,
    cast,
    ceil_div,
    dropout_keep,
    fp32_setting,
    keep_threshold,
    padded_rank,
    precision,
    target_of,
    wide_product,
)
from mica.kernels.launching import Choice, Plan, Plans, layout, strides


@triton.jit(do_not_specialize=["num_tokens", "threshold"])
def _up_projection_kernel(
    base_ptr,  # (M, N)
    out_ptr,  # (M, N), with base's strides; may be base
    h_ptr,  # (M, H_RANK columns)
    p_ptr,  # (P_RANK, N)
    seed_ptr,  # (1) int64
    num_tokens,
    out_features,
    stride_bm,
    stride_bn,
    stride_om,
    stride_on,
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
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs write one row of tiles: they share h's rows, and y's memory pages are opened once.
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = (rows < num_tokens)[:, None]
    if EVEN_N:
        mask = row_mask & tl.full((1, BLOCK_N), True, tl.int1)
    else:
        mask = row_mask & (columns < out_features)[None, :]
    rows_64, columns_64 = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    # requested before the product is computed: y is nearly all of the traffic
    base = tl.load(base_ptr + rows_64 * stride_bm + columns_64 * stride_bn, mask=mask, other=0.0)
    acc = wide_product(
        h_ptr, p_ptr, rows, columns, num_tokens, out_features, stride_hm, stride_hr, stride_pr, stride_pn,
        H_RANK, P_RANK, BLOCK_R, BLOCK_K, EVEN_N, COMPUTE, PRECISION,
    ) * scale  # fmt: skip
    if DROPOUT:
        acc = tl.where(dropout_keep(tl.load(seed_ptr), rows, columns, threshold), acc, 0.0)
    out_ptrs = out_ptr + rows_64 * stride_om + columns_64 * stride_on
    tl.store(out_ptrs, cast(base.to(tl.float32) + acc, out_ptr.dtype.element_ty), mask=mask)


def plan_up_projection(
    base: Tensor,
    h: Tensor,
    factor: Tensor,
    *,
    out: Tensor | None = None,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `up_projection_` chooses from; ``target`` overrides the device's."""
    out = base if out is None else out
    for name, tensor in (("base", base), ("h", h), ("factor", factor)):
        checks.matrix(name, tensor)
    num_tokens, out_features = base.shape
    limits.same_device(base=base, h=h, factor=factor, out=out)
    checks.contracted("base", base, 0, "h", h, 0)
    checks.contracted("base", base, 1, "factor", factor, 1)
    checks.rank("factor", factor.shape[0])
    checks.shape("out", out, (num_tokens, out_features), "the shape of base")
    rank, p_rank = h.shape[1], factor.shape[0]
    checks.ranks_fit(h, factor)
    limits.dropout(dropout_p, seed)
    dtype = checks.compute_dtype(compute_dtype or h.dtype)

    target = target or target_of(base.device)
    block_r = padded_rank(p_rank)

    def plan(config: configs.Config) -> Plan:
        tiles = ceil_div(num_tokens, config.block_m) * ceil_div(out_features, config.block_n)
        return Plan(
            _up_projection_kernel,
            (tiles, 1),
            {
                "num_tokens": num_tokens,
                "out_features": out_features,
                **strides(bm_bn=base, om_on=out, hm_hr=h, pr_pn=factor),
                "scale": float(scale) / (1.0 - dropout_p),
                "threshold": keep_threshold(dropout_p),
            },
            {
                "H_RANK": rank,
                "P_RANK": p_rank,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_R": block_r,
                "BLOCK_K": min(config.block_k, block_r),
                "EVEN_N": out_features % config.block_n == 0,
                "DROPOUT": dropout_p > 0,
                "COMPUTE": TRITON_DTYPES[dtype],
                "PRECISION": precision(dtype, target),
            },
            config,
        )

    tensors = (base, out, h, factor, seed if dropout_p > 0 else base)
    return Choice(
        "up_projection",
        base.device,
        (tuning.bucket(num_tokens), out_features, p_rank, base.dtype, dtype, dropout_p > 0),
        (config,) if config else configs.up_projection(target, num_tokens, block_r, dtype.itemsize),
        plan,
        lambda plan: (out, tensors),
        updates=(out,) if out.data_ptr() == base.data_ptr() else (),
    )


plans = Plans()


def key_of(
    base: Tensor,
    h: Tensor,
    factor: Tensor,
    *,
    out: Tensor | None = None,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
) -> tuple:
    """The key in ``plans`` of `up_projection_` with these arguments."""
    return (
        tuning.state(),
        layout(base),
        layout(h),
        layout(factor),
        layout(out),
        scale,
        compute_dtype,
        dropout_p,
        layout(seed) if dropout_p else None,
        config,
        fp32_setting() if (compute_dtype or h.dtype) is torch.float32 else None,
    )


def up_projection_(
    base: Tensor,
    h: Tensor,
    factor: Tensor,
    *,
    out: Tensor | None = None,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """base += scale·keep⊙(h factor) in place: summed in fp32, rounded once to base's dtype.

    Args:
        base: (num_tokens, out_features), fp32/bf16/fp16, any strides.
        h: (num_tokens, rank) or as wide as `padded_columns(rank)`, as `down_projection` gives it.
        factor: (rank, out_features), any strides: lora_B transposed, or lora_A. Its rows may be padded too.
        out: where to write instead of into base; shape of base.
        scale: dimensionless, applied to the fp32 product.
        compute_dtype: dtype of the factors of the product; default that of h.
        dropout_p, seed: zero the elements of the *product* that `down_projection` dropped from x.
        config: a launch configuration; default the first of `configs.up_projection`.

    Returns:
        base (or out).

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    options = {"out": out, "scale": scale, "compute_dtype": compute_dtype, "config": config}
    options |= {"dropout_p": dropout_p, "seed": seed}
    key = key_of(base, h, factor, **options)
    plan = plans.get(key)
    if plan is None:
        return plan_up_projection(base, h, factor, **options).first(plans, key)
    out = base if out is None else out
    plan(base, out, h, factor, seed if dropout_p else base)
    return out


def run(plan: Plan, base: Tensor, h: Tensor, factor: Tensor) -> Tensor:
    """`up_projection_` by its plan, without dropout."""
    plan(base, base, h, factor, base)
    return base
