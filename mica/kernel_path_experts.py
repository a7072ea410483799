"""`mica.kernel_path` for a stack of experts: which kernels make up a formula of `mica.reference_experts`.

    h  = experts_down(x, A); y = x_e W_eᵀ by PyTorch's grouped product; y_e += bias_e + h_e B_eᵀ in place
    g  = experts_down(dy, Bᵀ); dA = experts_grad_a(g, x); dx = dy_e W_e, grouped; dx_e += g_e A_e in place

The kernels read the ends of the experts' rows on the device. So does the grouped product where PyTorch has a
kernel for it (bf16 on sm_90 and sm_100). Elsewhere the host waits once for these ends and multiplies expert
by expert.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mica import reference_experts
from mica.kernels.common import LaunchError
from mica.kernels.experts_down import experts_down
from mica.kernels.experts_grad_a import experts_grad_a as grad_a
from mica.kernels.experts_up import experts_up_
from mica.kernels.prepared import prepare_experts

__all__ = ["LaunchError", "experts_base", "experts_linear", "experts_linear_backward"]

# `grouped_mm` is public from PyTorch 2.10 on. What it is from then on: bf16 from sm_80 on, where before sm_90
# it waits for the device itself; any dtype on a CPU. Before: bf16 on sm_90 only.
_grouped_mm = getattr(F, "grouped_mm", None)
_before_2_10 = _grouped_mm is None
if _before_2_10:
    _grouped_mm = getattr(torch, "_grouped_mm", None)
_MOST_GROUPS = 1023  # of its CUDA kernel
_MOST_ELEMENTS = 2**31 - 1  # of x, and of y: with more, an illegal access was reported (torchtitan#1932)


def experts_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `mica.reference_experts.experts_linear`."""
    dtype = compute_dtype or x.dtype
    bias = None if bias is None else bias.to(x.dtype)
    h = experts_down(x, offsets, lora_A, scale=scaling, compute_dtype=dtype)
    factor = prepare_experts(lora_B, dtype)
    return experts_up_(base_product(x, offsets, weight.transpose(1, 2)), h, offsets, factor, bias=bias)


def experts_base(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `mica.reference_experts.experts_base`."""
    y = base_product(x, offsets, weight.transpose(1, 2))
    rows = torch.arange(len(y), dtype=offsets.dtype, device=y.device)
    if bias is not None:
        padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])])  # for the rows of no expert
        y = y.add_(padded.index_select(0, torch.searchsorted(offsets, rows, right=True)))
    return y.masked_fill_((rows >= offsets[-1]).unsqueeze(1), 0)


def experts_linear_backward(
    grad_output: Tensor,
    x: Tensor | None,
    offsets: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """As `mica.reference_experts.experts_linear_backward`."""
    grad_x = grad_A = None
    factor = prepare_experts(lora_B, compute_dtype)
    g = experts_down(grad_output, offsets, factor, scale=scaling, compute_dtype=compute_dtype)
    if x is not None:
        grad_A = grad_a(g, x, offsets, lora_A.shape[1], out_dtype=lora_A.dtype)
    if weight is not None:
        grad_x = experts_up_(base_product(grad_output, offsets, weight), g, offsets, lora_A)
    return grad_x, grad_A


# ---------------------------------------------------------------------------------------------------
# the base weights
# ---------------------------------------------------------------------------------------------------


def base_product(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """x_e weight_e, (num_rows, out) contiguous; rows after the last offset hold anything.

    x (num_rows, in), weight (num_experts, in, out): a view of the frozen weights, transposed or not, cast to
    the dtype of x where theirs is another (under autocast).
    """
    count, features = x.shape
    is_small = count * max(x.stride(0), features, weight.shape[2]) <= _MOST_ELEMENTS
    groups = is_small and _is_grouped(x.device, x.dtype, len(offsets))
    if groups and _is_aligned(weight := weight.to(x.dtype)):
        if not _is_aligned(x):
            x = x.clone(memory_format=torch.contiguous_format)
        return _grouped_mm(x, weight, offs=offsets.to(torch.int32))
    y = x.new_empty(count, weight.shape[2])
    for expert, rows in reference_experts.hit(offsets):
        torch.mm(x[rows], weight[expert].to(x.dtype), out=y[rows])
    return y


@functools.cache
def _is_grouped(device: torch.device, dtype: torch.dtype, num_experts: int) -> bool:
    """Whether `grouped_mm` takes this dtype and number of experts on this device."""
    if _grouped_mm is None or num_experts > _MOST_GROUPS:
        return False
    if device.type == "cpu":
        return not _before_2_10
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return False
    if torch.version.hip is not None:
        return not _before_2_10
    capability = torch.cuda.get_device_capability(device)
    return capability[0] == 9 if _before_2_10 else capability >= (8, 0)


def _is_aligned(tensor: Tensor) -> bool:
    """As `grouped_mm` demands: of the last two strides one is 1, the rest and the address are whole 16 bytes.

    So are features (all sizes of a stack but the first, the last of a matrix): otherwise its result has gaps
    between the rows.
    """
    *outer, rows, columns = tensor.stride()
    short, long = (tensor.shape[-1], rows) if columns == 1 else (tensor.shape[-2], columns)
    numbers = 16 // tensor.element_size()
    sizes = (*outer, long, *tensor.shape[1:])
    return (
        1 in (rows, columns)
        and long >= max(1, short)
        and not tensor.data_ptr() % 16
        and not any(size % numbers for size in sizes)
    )
