"""W + s·B A, summed in fp32 and rounded once. Formula: `mica.reference.merge`.

The update is a wide product of the rank like any other, so the device code is the up-projection's; what is
different is that fp32 stays fp32, whatever the setting for training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mica.kernels import checks, configs
from mica.kernels.launching import Choice
from mica.kernels.up_projection import plan_up_projection, up_projection_

_FULL_FP32 = {"compute_dtype": torch.float32, "exact": True}


def _checked(weight: Tensor, lora_A: Tensor, lora_B: Tensor, out: Tensor | None) -> Tensor:
    """Where the sum is to be written."""
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        checks.matrix(name, tensor)
    (out_features, in_features), rank = weight.shape, lora_A.shape[0]
    checks.rank("lora_A", rank)
    checks.shape("lora_A", lora_A, (rank, in_features), "(rank, in_features)")
    checks.shape("lora_B", lora_B, (out_features, rank), "(out_features, rank)")
    return torch.empty_like(weight) if out is None else out


def plan_merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    config: configs.Config | None = None,
    target: str | None = None,
) -> Choice:
    """The launches that `merge` chooses from; ``target``: another one than the device's."""
    out = _checked(weight, lora_A, lora_B, out)
    return plan_up_projection(
        weight, lora_B, lora_A, out=out, scale=scale, config=config, target=target, **_FULL_FP32
    )


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """W + scale·B A.

    Args:
        weight: (out_features, in_features), fp32/bf16/fp16, any strides.
        lora_A: (rank, in_features). lora_B: (out_features, rank). fp32/bf16/fp16, any strides.
        scale: dimensionless.
        out: write there; may be the weight itself. Default: a new tensor.
        config: a launch configuration; default the first of `configs.up_projection`.

    Returns:
        (out_features, in_features) in the dtype of the weight.

    Raises:
        ValueError, TypeError: an argument that is not as above.
        LaunchError: no configuration can be launched here.
    """
    out = _checked(weight, lora_A, lora_B, out)
    return up_projection_(weight, lora_B, lora_A, out=out, scale=scale, config=config, **_FULL_FP32)
