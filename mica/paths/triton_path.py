"""The operators' bodies on Triton kernels: which kernels make up a formula of `mica.paths.reference_path`.

    h  = down(x, A); y = x Wᵀ + bias by the vendor's library; y += h Bᵀ in place
    g  = down(dy, Bᵀ); dA = grad_a(g, x); dx = dy W by the vendor's library; dx += g A in place
    dB = grad_a(h, dy)ᵀ where B is trained

In other forms (`mica.kernels.configs.FORM_NAMES`) base product and update are one kernel, or the update is
written first and the base product is added to it, or the vendor's library computes h, g and dA too. Which
form runs is measured (`mica.paths.tuning`). Where the base layer was called y and dx are updates alone.

On a stack of experts the same, expert by expert: the kernels read the ends of the experts' rows on the
device. So does PyTorch's grouped product where there is a kernel for it (bf16 on sm_90 and sm_100).
Elsewhere the host waits once for these ends and multiplies expert by expert.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mica.kernels.common import LaunchError as LaunchError
from mica.kernels.common import NotLoadedError as NotLoadedError
from mica.kernels.common import fp32_setting
from mica.kernels.down_projection import down_projection as down
from mica.kernels.fused_linear import fused_linear
from mica.kernels.grad_a import grad_a
from mica.kernels.grad_magnitude import grad_magnitude as scale_and_sum
from mica.kernels.launching import RecordedLaunches, layout
from mica.kernels.prepared_b import prepare, prepare_experts
from mica.kernels.up_projection import up_projection_
from mica.paths import columns, reference_path
from mica.paths.operands import Operands

# Dense and of experts: the layouts of the operands tell them apart.
recorded_forward = RecordedLaunches(down, up_projection_)
recorded_backward = RecordedLaunches(down, grad_a, up_projection_)

# From these sizes on an A that is wider than the products' dtype is rounded before the launches. Each row of
# tiles reads all of it through the L2 cache: 8192 tokens read 134 MB of an fp32 A (64 x 4096), 67 MB of x.
# Rounding is one more launch, and with fewer tokens the host, not the device, determines a layer's time.
WIDE_RANK, MANY_TOKENS = 64, 2048


def as_operand(lora_A: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """lora_A as kernels read it fastest, for products in ``dtype``: they round to that, so no bit differs.

    The rounded copy is not kept for the next call: a write through ``lora_A.data`` changes no version.
    """
    if lora_A.shape[0] < WIDE_RANK or num_tokens < MANY_TOKENS or lora_A.dtype.itemsize <= dtype.itemsize:
        return lora_A
    return lora_A.to(dtype)


# ---------------------------------------------------------------------------------------------------
# a layer
# ---------------------------------------------------------------------------------------------------


def linear(x: Tensor, operands: Operands, *, form: str = "split") -> tuple[Tensor, Tensor | None]:
    """As `mica.paths.reference_path.linear`, in a form of `mica.kernels.configs.FORM_NAMES`.

    h is None where no backward needs it: where lora_B is frozen for good.
    """
    weight, lora_A, lora_B = operands.weight, operands.lora_A, operands.lora_B
    scaling, dropout_p, bias = operands.scaling, operands.dropout_p, operands.bias
    dtype = operands.low_rank_dtype(x)
    key = layout(x), layout(lora_A), lora_B.shape[0], scaling, dtype, dropout_p, fp32_setting()
    steps = recorded_forward.get(key)
    if steps is None:
        numbers = {"scale": scaling, "compute_dtype": dtype, "dropout_p": dropout_p}
        steps = recorded_forward.record(key, numbers, {})
    down, update = steps
    if form == "mixed":
        h = reference_path.down_projection(x, lora_A, scaling, dtype)
    else:
        h = down(x, as_operand(lora_A, x.shape[0], dtype), operands.seed)
    base_output = operands.base_output
    wide = dtype if base_output is None else torch.promote_types(base_output.dtype, dtype)
    factor = prepare(lora_B, wide, not operands.trains_B)
    if base_output is not None:
        out = base_output.new_empty(base_output.shape)  # contiguous, as torch.compile is told
        y = up_projection_(base_output, h, factor, None, out, compute_dtype=wide)
    elif form == "first":
        update_alone = torch.mm(h, factor) if bias is None else torch.addmm(bias, h, factor)
        y = update_alone.addmm_(x, weight.t())
    elif form in ("split", "mixed"):
        y = update(F.linear(x, weight, bias), h, factor)
    else:
        y = fused_linear(x, weight.t(), h, factor, bias)
    return y, h[:, : operands.rank].contiguous() if operands.trains_B else None


def linear_backward(
    grad_output: Tensor, x: Tensor | None, operands: Operands, needs_x: bool, *, form: str = "split"
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dA) as `mica.paths.reference_path.linear_backward`.

    Kernels sum dA in fp32 and write it in the dtype of lora_A, whatever the dtype of autocast.
    """
    weight, lora_A, lora_B = operands.weight, operands.lora_A, operands.lora_B
    scaling, dropout_p, seed = operands.scaling, operands.dropout_p, operands.seed
    compute_dtype = operands.low_rank_dtype(grad_output)
    key = layout(grad_output), layout(x), layout(lora_A), scaling, compute_dtype, dropout_p, fp32_setting()
    steps = recorded_backward.get(key)
    if steps is None:
        scaled = {"scale": scaling, "compute_dtype": compute_dtype}
        dropped = {"dropout_p": dropout_p}
        shaped = {"rank": lora_A.shape[0], "out_dtype": lora_A.dtype}
        steps = recorded_backward.record(key, scaled, shaped | dropped, dropped)
    down, grad, update = steps
    grad_x = grad_A = None
    if form == "mixed":
        g = reference_path.grad_h(grad_output, lora_B, scaling, compute_dtype)
        grad_A = None if x is None else reference_path.grad_a(g, x).to(lora_A.dtype)
    else:
        g = down(grad_output, prepare(lora_B, compute_dtype, not operands.trains_B))
        grad_A = None if x is None else grad(g, x, seed)
    if needs_x:
        operand = as_operand(lora_A, g.shape[0], compute_dtype)
        if weight is None and not dropout_p:  # nothing to add to: the vendor's product writes it
            grad_x = reference_path.grad_x_update(g[:, : lora_A.shape[0]], operand)
        elif weight is None:
            nothing = g.new_zeros(g.shape[0], lora_A.shape[1])
            grad_x = up_projection_(nothing, g, operand, seed, dropout_p=dropout_p)
        elif form == "first":
            update_alone = torch.mm(g[:, : lora_A.shape[0]], operand.to(compute_dtype))
            grad_x = update_alone.addmm_(grad_output, weight)
        elif form in ("split", "mixed"):
            grad_x = update(torch.mm(grad_output, weight), g, operand, seed)
        else:
            grad_x = fused_linear(grad_output, weight, g, operand, None, seed, dropout_p=dropout_p)
    return grad_x, grad_A


def grad_b(
    grad_output: Tensor, h: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype | None, *, form: str = "split"
) -> Tensor:
    """As `mica.paths.reference_path.grad_b`; kernels round only to ``dtype``."""
    if form == "mixed":
        return reference_path.grad_b(grad_output, h, dtype, grad_dtype)
    return grad_a(h, grad_output, rank=h.shape[1], out_dtype=dtype).t().contiguous()


def grad_magnitude(grad_output: Tensor, z: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """As `mica.paths.columns.grad_magnitude`."""
    dz = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    tensors = grad_output.contiguous(), z.contiguous(), factor.contiguous()
    return dz, scale_and_sum(*tensors, dz).sum(0)


# ---------------------------------------------------------------------------------------------------
# a stack of experts
# ---------------------------------------------------------------------------------------------------

# PyTorch's grouped product takes bf16 from sm_80 on, where before sm_90 it waits for the device itself, and
# any dtype on a CPU.
_MOST_GROUPS = 1023  # of its CUDA kernel
_MOST_ELEMENTS = 2**31 - 1  # of x, and of y: with more, an illegal access was reported (torchtitan#1932)


def experts_linear(x: Tensor, offsets: Tensor, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """As `mica.paths.reference_path.experts_linear`; h as in `linear`."""
    lora_A, lora_B, scaling = operands.lora_A, operands.lora_B, operands.scaling
    dtype = operands.low_rank_dtype(x)
    offsets = offsets.contiguous()
    bias = None if operands.bias is None else operands.bias.to(x.dtype)
    tensors = layout(x), layout(offsets), layout(lora_A), layout(bias), lora_B.shape[1]
    key = *tensors, scaling, dtype, fp32_setting()
    numbers = {"scale": scaling, "compute_dtype": dtype}
    down, update = recorded_forward.get(key) or recorded_forward.record(key, numbers, {})
    h = down(x, lora_A, None, offsets)
    y = base_product(x, offsets, operands.weight.transpose(1, 2))
    factor = prepare_experts(lora_B, dtype, not operands.trains_B)
    y = update(y, h, factor, None, None, bias, offsets)
    return y, h[:, : operands.rank].contiguous() if operands.trains_B else None


def experts_base(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `mica.paths.reference_path.experts_base`."""
    y = base_product(x, offsets, weight.transpose(1, 2))
    rows = torch.arange(len(y), dtype=offsets.dtype, device=y.device)
    if bias is not None:
        padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])])  # for the rows of no expert
        y = y.add_(padded.index_select(0, torch.searchsorted(offsets, rows, right=True)))
    return y.masked_fill_((rows >= offsets[-1]).unsqueeze(1), 0)


def experts_linear_backward(
    grad_output: Tensor, x: Tensor | None, offsets: Tensor, operands: Operands, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `mica.paths.reference_path.experts_linear_backward`."""
    lora_A, lora_B, scaling = operands.lora_A, operands.lora_B, operands.scaling
    compute_dtype = operands.low_rank_dtype(grad_output)
    grad_x = grad_A = None
    offsets = offsets.contiguous()
    tensors = layout(grad_output), layout(x), layout(offsets), layout(lora_A)
    key = *tensors, scaling, compute_dtype, fp32_setting()
    scaled = {"scale": scaling, "compute_dtype": compute_dtype}
    shaped = {"rank": lora_A.shape[1], "out_dtype": lora_A.dtype}
    down, grad, update = recorded_backward.get(key) or recorded_backward.record(key, scaled, shaped, {})
    factor = prepare_experts(lora_B, compute_dtype, not operands.trains_B)
    g = down(grad_output, factor, None, offsets)
    if x is not None:
        grad_A = grad(g, x, None, offsets)
    if needs_x:
        grad_x = update(
            base_product(grad_output, offsets, operands.weight), g, lora_A, None, None, None, offsets
        )
    return grad_x, grad_A


def experts_grad_b(grad_output: Tensor, h: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """As `mica.paths.reference_path.experts_grad_b`."""
    transposed = grad_a(h, grad_output, None, offsets.contiguous(), rank=h.shape[1], out_dtype=dtype)
    return transposed.permute(2, 1, 0).contiguous().permute(2, 0, 1)


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
        return F.grouped_mm(x, weight, offs=offsets.to(torch.int32))
    y = x.new_empty(count, weight.shape[2])
    for expert, rows in reference_path.hit(offsets):
        torch.mm(x[rows], weight[expert].to(x.dtype), out=y[rows])
    return y


@functools.cache
def _is_grouped(device: torch.device, dtype: torch.dtype, num_experts: int) -> bool:
    """Whether `grouped_mm` takes this dtype and number of experts on this device."""
    if num_experts > _MOST_GROUPS:
        return False
    if device.type == "cpu":
        return True
    is_bf16_on_cuda = device.type == "cuda" and dtype is torch.bfloat16
    return is_bf16_on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)


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


# A formula -> the same on kernels
KERNELS = {
    reference_path.linear: linear,
    reference_path.linear_backward: linear_backward,
    reference_path.grad_b: grad_b,
    columns.grad_magnitude: grad_magnitude,
    reference_path.experts_linear: experts_linear,
    reference_path.experts_linear_backward: experts_linear_backward,
    reference_path.experts_base: experts_base,
    reference_path.experts_grad_b: experts_grad_b,
}
