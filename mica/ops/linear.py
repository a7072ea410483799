"""The linear layer: `mica_linear`, and what `mica.fast` calls without its checks.

The maths is `mica.paths.torch_path`'s; the operators state none of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mica.dtypes import SIXTEEN_BIT
from mica.ops.checks import check_linear
from mica.ops.operator import (
    alias,
    as_matrix,
    autocast_to,
    below_autograd,
    call_counts,
    is_eager,
    like,
    no_autocast,
    operator,
    run_backward,
    run_formula,
    save,
    saved,
    without_none,
    without_values,
)
from mica.paths import choose, torch_path


def mica_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer with its MiCA adapter: x Wᵀ + bias + scaling·(drop(x) Aᵀ) Bᵀ.

    Args:
        x: (..., in_features), fp64/fp32/bf16/fp16.
        weight: (out_features, in_features), frozen, in the dtype of x. A transposed view is fine.
        lora_A: (rank, in_features), trained; the dtype of x, or an fp32 master over 16-bit x.
        lora_B: (out_features, rank), frozen; dtypes as for lora_A.
        scaling: lora_alpha / rank, dimensionless.
        bias: (out_features), frozen, in the dtype of x.
        compute_dtype: dtype of the low-rank products; default the dtype of x. Under autocast everything
            runs in autocast's dtype, as PEFT's layer does.
        dropout_p: probability in [0, 1) with which an element of x is dropped before lora_A.
        seed: int64 (1), where dropout_p > 0. It determines the mask, which is never stored: drawn with
            torch's generator, gradient checkpointing recomputes the same mask.

    Returns:
        (..., out_features) in the dtype of x (of autocast where it is on).

    Gradients: lora_A's in its own dtype, accumulated in fp32 (under autocast perhaps rounded to its dtype, as
    PyTorch does); x's where x needs it. Saved for the backward: x as it came and references to the operands.
    Definition: `mica.paths.torch_path` (arXiv 2604.01694).

    Raises:
        TypeError: a dtype that is not allowed, a tensor that is not dense, an argument of another type.
        ValueError: shapes or devices that do not fit, or a frozen operand that requires a gradient.
        RuntimeError: MICA_BACKEND=triton where there are no kernels for the call.
    """
    check_linear(x, weight, lora_A, lora_B, bias, scaling, compute_dtype, dropout_p, seed)
    return linear(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)


def _linear(
    x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None, grad_dtype=None
):
    dtypes = (x.dtype, compute_dtype or x.dtype, lora_A.dtype, lora_B.dtype)
    operands = (as_matrix(x), weight, lora_A, lora_B, scaling, bias, compute_dtype)
    return like(x.shape, run_formula("linear", x, lora_A.shape[0], dtypes, *operands, dropout_p, seed))


def _linear_backward(grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask, *options):
    needs_x, needs_A = output_mask
    operands = (x if needs_A else None, weight if needs_x else None, lora_A, lora_B, scaling, compute_dtype)
    return without_none(grad_output, *_gradients(grad_output, *operands, *options))


def _gradients(grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, *options):
    """(dx, dA); None where no gradient is needed, and so x or the weight is None."""
    dtypes = (grad_output.dtype, compute_dtype, lora_A.dtype, lora_B.dtype)
    dy, x = as_matrix(grad_output), None if x is None else as_matrix(x)
    operands = (dy, x, weight, lora_A, lora_B, scaling, compute_dtype, *options)
    with no_autocast():
        grad_x, grad_A = run_formula("linear_backward", dy, lora_A.shape[0], dtypes, *operands)
    return None if grad_x is None else like(grad_output.shape, grad_x), grad_A


def _linear_fake(
    x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None, grad_dtype=None
):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_backward_fake(
    grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype, output_mask, *options
):
    needs_x, needs_A = output_mask
    grad_x = grad_output.new_empty(*grad_output.shape[:-1], lora_A.shape[1]) if needs_x else None
    grad_A = lora_A.new_empty(lora_A.shape) if needs_A else None
    return without_none(grad_output, grad_x, grad_A)


class _MicaLinear(torch.autograd.Function):
    """``run`` computes y: `_linear` or the operator (`mica.ops.operator.operator`)."""

    @staticmethod
    def forward(
        ctx, run, x, weight, lora_A, lora_B, scaling, bias, dtype, dropout_p=0.0, seed=None, grad_dtype=None
    ):
        _, needs_x, _, needs_A = ctx.needs_input_grad[:4]
        ctx.numbers = scaling, dtype or x.dtype, dropout_p, grad_dtype
        # x as it came: no fp32 copy, no h, no mask, and nothing that no gradient needs.
        kept_x = x if needs_A else None
        kept_weight = weight if needs_x else None
        kept_A = lora_A if needs_x else without_values(lora_A)
        save(ctx, kept_x, kept_weight, kept_A, lora_B, seed)
        with below_autograd():
            return run(x, weight, lora_A, lora_B, scaling, bias, dtype, dropout_p, seed, grad_dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, lora_A, lora_B, seed = saved(ctx)
        scaling, compute_dtype, dropout_p, grad_dtype = ctx.numbers
        operands = grad_output, x, weight, lora_A, lora_B, scaling, compute_dtype
        if torch.is_grad_enabled() or not is_eager(grad_output, x):
            mask = [weight is not None, x is not None]
            args = *operands, mask, dropout_p, seed, grad_dtype
            grads = run_backward(torch.ops.mica.linear_backward, _linear_backward, operands[:5], *args)
            grad_x, grad_A = (grad if needed else None for grad, needed in zip(grads, mask, strict=True))
        else:
            with below_autograd():
                grad_x, grad_A = _gradients(*operands, dropout_p, seed, grad_dtype)
        return None, grad_x, None, grad_A, None, None, None, None, None, None, None


def _cast(
    kind, x, weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p=0.0, seed=None, grad_dtype=None
):
    x, weight, bias = (autocast_to(tensor, kind) for tensor in (x, weight, bias))
    return x, weight, lora_A, lora_B, scaling, bias, None, dropout_p, seed, x.dtype


linear = operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias,"
    " ScalarType? compute_dtype, float dropout_p=0.0, Tensor? seed=None, ScalarType? grad_dtype=None)"
    " -> Tensor",
    _linear,
    _linear_fake,
    _MicaLinear.apply,
    _cast,
)
operator(
    "linear_backward",
    "(Tensor grad_output, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling,"
    " ScalarType compute_dtype, bool[2] output_mask, float dropout_p=0.0, Tensor? seed=None,"
    " ScalarType? grad_dtype=None) -> (Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)


def traced(x, weight, lora_A, lora_B, scaling, bias, compute_dtype) -> Tensor:
    """`linear` as PyTorch's own operations, for a compiler: autocast reaches each, and autograd follows."""
    y, dtype = F.linear(x, weight, bias), compute_dtype or x.dtype
    h = F.linear(x.to(dtype), (lora_A * scaling).to(dtype))
    return (y + F.linear(h, lora_B.to(h.dtype))).to(y.dtype)


# Multiplications of a base product up to which autograd itself follows the formula in fp32 and fp64 on a CPU,
# all operands of one dtype. No Python runs in its backward, and the same tensors are saved; dx takes an
# addition more. Time relative to the Function, AVX512, one thread: 16 x 64 x 64 0.91, 16 x 576 x 576 (2^22)
# 1.00, 1024 x 576 x 576 1.15. In a Llama block of 64 / 128, whose code does not stay in the caches: 0.89 of
# stock PEFT's instead of 1.04.
CPU_HOST_BOUND = 2**22


def _is_host_bound(x: Tensor, lora_A: Tensor, lora_B: Tensor, out_features: int, dtype) -> bool:
    """``dtype``: as given for the low-rank products. On a device with kernels see `choose.is_host_bound`."""
    own = x.dtype
    if not (lora_A.dtype is lora_B.dtype is own and (dtype is None or dtype is own)):
        return False
    work = x.numel() * out_features
    if not choose.is_host_bound(work):
        return False
    if x.is_cpu and own not in SIXTEEN_BIT and work <= CPU_HOST_BOUND:
        return True
    return choose.use_kernels(x.device, lora_A.shape[0], own, own, own, own, function="linear")


def composed(x, weight, lora_A, lora_B, scaling, bias) -> Tensor:
    call_counts["linear"] += 1
    # what autograd saves of the rest are views, whose memory an assignment to ``.data`` does not change
    rows = alias(x) if x.dim() == 2 else as_matrix(x)
    return like(x.shape, torch_path.linear(rows, weight, lora_A, lora_B, scaling, bias))


def linear_eager(x, weight, lora_A, lora_B, scaling, bias, compute_dtype, autocast_dtype) -> Tensor:
    """`linear` without dropout, for callers that know that `is_eager` holds.

    autocast_dtype: autocast's where it is on. What it casts is cast here, where autograd follows it.
    """
    needs_gradient = torch.is_grad_enabled() and (lora_A.requires_grad or x.requires_grad)
    if autocast_dtype is not None:
        x, weight = x.to(autocast_dtype), weight.to(autocast_dtype)
        bias = None if bias is None else bias.to(autocast_dtype)
    elif _is_host_bound(x, lora_A, lora_B, weight.shape[0], compute_dtype):
        if needs_gradient:
            return composed(x, weight, lora_A, lora_B, scaling, bias)
        with below_autograd():
            return composed(x, weight, lora_A, lora_B, scaling, bias)
    operands = x, weight, lora_A, lora_B, scaling, bias, compute_dtype
    if needs_gradient:
        with no_autocast():
            return _MicaLinear.apply(_linear, *operands, 0.0, None, autocast_dtype)
    with below_autograd(), no_autocast():
        return _linear(*operands)
