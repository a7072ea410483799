"""y_e += bias_e + h_e P_e in place for a stack of experts: of the forward (P = Bᵀ) and of dx (h = g, P = A).

`up_projection`, with a P for each expert. Memory-bound: y is read and written once. Formulas:
`mica.reference_experts`.
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
    fp32_setting,
    padded_rank,
    precision,
    target_of,
    wide_product,
)
from mica.kernels.experts_tiles import block_e, most_tiles, tile_of
from mica.kernels.launching import Choice, Plan, Plans, layout, strides


@triton.jit(do_not_specialize=["num_rows"])
def _experts_up_kernel(
    y_ptr,  # (S, N)
    h_ptr,  # (S, H_RANK columns)
    p_ptr,  # (E, P_RANK, N)
    bias_ptr,  # (E, N) if HAS_BIAS
    offsets_ptr,  # (E)
    num_rows,
    num_experts,
    out_features,
    stride_ym,
    stride_yn,
    stride_hm,
    stride_hr,
    stride_pe,
    stride_pr,
    stride_pn,
    stride_be,
    stride_bn,
    H_RANK: tl.constexpr,
    P_RANK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs write one row of tiles, as in `up_projection`; the next rows read the same P_e.
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    expert, first_row, end = tile_of(offsets_ptr, tile, num_rows, num_experts, BLOCK_E, BLOCK_M)
    if first_row < end:
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = (rows < end)[:, None]
        if EVEN_N:
            mask = row_mask & tl.full((1, BLOCK_N), True, tl.int1)
        else:
            mask = row_mask & (columns < out_features)[None, :]
        columns_64 = columns.to(tl.int64)
        y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + columns_64[None, :] * stride_yn
        if expert < num_experts:
            # requested before the product is computed: y is nearly all of the traffic
            base = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                bias = bias_ptr + expert.to(tl.int64) * stride_be + columns_64 * stride_bn
                base += tl.load(bias, mask=columns < out_features, other=0.0).to(tl.float32)[None, :]
            acc = wide_product(
                h_ptr, p_ptr + expert.to(tl.int64) * stride_pe, rows, columns, end, out_features, stride_hm,
                stride_hr, stride_pr, stride_pn, H_RANK, P_RANK, BLOCK_R, BLOCK_K, EVEN_N, COMPUTE, PRECISION,
            )  # fmt: skip
            tl.store(y_ptrs, cast(base + acc, y_ptr.dtype.element_ty), mask=mask)
        else:  # these rows belong to no expert, and nothing has written them
            tl.store(y_ptrs, tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty), mask=mask)


def plan_experts_up(
    y: Tensor,
    h: Tensor,
    offsets: Tensor,
    factor: Tensor,
    *,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `experts_up_` chooses from; ``target`` overrides the device's."""
    checks.matrix("y", y)
    checks.matrix("h", h)
    checks.matrix("factor", factor, 3)
    (num_rows, out_features), num_experts = y.shape, factor.shape[0]
    limits.same_device(y=y, h=h, offsets=offsets, factor=factor, bias=bias)
    checks.offsets(offsets, "factor", factor)
    checks.contracted("y", y, 0, "h", h, 0)
    checks.contracted("y", y, 1, "factor", factor, 2)
    rank, p_rank = h.shape[1], factor.shape[1]
    checks.rank("factor", p_rank)
    checks.ranks_fit(h, factor[0])
    if bias is not None:
        checks.matrix("bias", bias)
        checks.shape("bias", bias, (num_experts, out_features), "(num_experts, out_features)")
    dtype = checks.compute_dtype(compute_dtype or h.dtype)

    target = target or target_of(y.device)
    block_r = padded_rank(p_rank)

    def plan(config: configs.Config) -> Plan:
        tiles = most_tiles(num_rows, num_experts, config.block_m, tail=True)
        return Plan(
            _experts_up_kernel,
            (tiles * ceil_div(out_features, config.block_n), 1),
            {
                "num_rows": num_rows,
                "num_experts": num_experts,
                "out_features": out_features,
                **strides(ym_yn=y, hm_hr=h, pe_pr_pn=factor, be_bn=y if bias is None else bias),
            },
            {
                "H_RANK": rank,
                "P_RANK": p_rank,
                "BLOCK_E": block_e(num_experts),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_R": block_r,
                "BLOCK_K": min(config.block_k, block_r),
                "EVEN_N": out_features % config.block_n == 0,
                "HAS_BIAS": bias is not None,
                "COMPUTE": TRITON_DTYPES[dtype],
                "PRECISION": precision(dtype, target),
            },
            config,
        )

    tensors = (y, h, factor, y if bias is None else bias, offsets)
    rows_each = num_rows // num_experts
    return Choice(
        "experts_up",
        y.device,
        (tuning.bucket(num_rows), num_experts, out_features, p_rank, y.dtype, dtype),
        (config,) if config else configs.experts_up(target, rows_each, block_r, dtype.itemsize),
        plan,
        lambda plan: (y, tensors),
        updates=(y,),
    )


plans = Plans()


def key_of(
    y: Tensor,
    h: Tensor,
    offsets: Tensor,
    factor: Tensor,
    *,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
) -> tuple:
    """The key in ``plans`` of `experts_up_` with these arguments."""
    return (
        tuning.state(),
        layout(y),
        layout(h),
        layout(offsets),
        layout(factor),
        layout(bias),
        compute_dtype,
        config,
        fp32_setting() if (compute_dtype or h.dtype) is torch.float32 else None,
    )


def experts_up_(
    y: Tensor,
    h: Tensor,
    offsets: Tensor,
    factor: Tensor,
    *,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """y_e += bias_e + h_e factor_e in place: summed in fp32, rounded once; the host does not wait.

    Args:
        y: (num_rows, out_features), fp32/bf16/fp16, any strides; its rows sorted by expert. Those after the
            last offset become 0, whatever they held.
        h: (num_rows, rank) or as wide as `padded_columns(rank)`, as `experts_down` gives it.
        offsets: (num_experts,), int32/int64, contiguous: where each expert's rows end, in ascending order, at
            most num_rows.
        factor: (num_experts, rank, out_features), any strides: lora_B with its last two dimensions
            transposed, or lora_A. Its ranks may be padded too.
        bias: (num_experts, out_features), any strides.
        compute_dtype: dtype of the factors of the product; default that of h.
        config: a launch configuration; default the first of `configs.experts_up`.

    Returns:
        y.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    options = {"bias": bias, "compute_dtype": compute_dtype, "config": config}
    key = key_of(y, h, offsets, factor, **options)
    plan = plans.get(key)
    if plan is None:
        return plan_experts_up(y, h, offsets, factor, **options).first(plans, key)
    plan(y, h, factor, y if bias is None else bias, offsets)
    return y
