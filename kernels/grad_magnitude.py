"""Σ dy⊙z over the tokens and dz = factor⊙dy, both from one reading of dy: DoRA's backward.

The kernel is memory-bound: 6 bytes for each of M·N 16-bit numbers, where PyTorch's operators, which write
products in fp32, move more than 20. Formulas: `mica.paths.columns`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mica.kernels import configs
from mica.kernels.common import cast, ceil_div
from mica.kernels.launching import Plan, Planned, launcher


@triton.jit(do_not_specialize=["num_rows"])
def _grad_magnitude_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N)
    factor_ptr,  # (N) fp32
    dz_ptr,  # (M, N)
    sums_ptr,  # (tiles of rows, N) fp32
    num_rows,
    out_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < out_features
    mask = (rows < num_rows)[:, None] & column_mask[None, :]
    places = rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    dy = tl.load(dy_ptr + places, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + places, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + columns, mask=column_mask, other=0.0)
    tl.store(dz_ptr + places, cast(dy * factor[None, :], dz_ptr.dtype.element_ty), mask=mask)
    # The compiler makes one operation of a product and the addition that follows, but not of an fma. Where a
    # thread has one row only, two threads that write the same sum would otherwise differ in its last bit.
    sums = tl.sum(tl.fma(dy, z, 0.0), axis=0)
    tl.store(sums_ptr + tl.cast(tile, tl.int64) * out_features + columns, sums, mask=column_mask)


def _run(launch, plan, grad_output, z, factor, dz):
    sums = factor.new_empty(plan.shape)
    launch(grad_output, z, factor, dz, sums)
    return sums


@launcher(_run)
def grad_magnitude(grad_output: Tensor, z: Tensor, factor: Tensor, dz: Tensor) -> Planned:
    """dz = factor⊙dy, rounded once, and the parts of Σ dy⊙z in fp32; the host does not wait.

    Args:
        grad_output: dy, (num_rows, out_features), fp32/bf16/fp16, contiguous, as all the others.
        z: (num_rows, out_features), fp32/bf16/fp16.
        factor: (out_features,), fp32.
        dz: (num_rows, out_features), fp32/bf16/fp16: where the kernel writes.

    Returns:
        The sums over each tile of rows, (tiles, out_features) in fp32: their sum over the first dimension is
        Σ dy⊙z. Without rows there are no tiles.

    Raises:
        LaunchError: no configuration can be launched here.
    """
    num_rows, out_features = grad_output.shape

    def plan(config: configs.Config) -> Plan:
        tiles_m = ceil_div(num_rows, config.block_m)
        tiles_n = ceil_div(out_features, config.block_n)
        return Plan(
            kernel=_grad_magnitude_kernel,
            grid=(tiles_m * tiles_n, 1),
            numbers={"num_rows": num_rows, "out_features": out_features},
            meta={"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
            config=config,
            shape=(tiles_m, out_features),
        )

    return configs.GRAD_MAGNITUDE, plan
