"""The linear layer: `mica_linear`, and what `mica.fast` calls without its checks.

Where the base layer has to be called (quantised, hooked, trained), its output is an operand, `base_output`,
and the adapter alone is the same node of autograd: y = base_output + scaling·(drop(x) Aᵀ) Bᵀ.

The maths is in `mica.paths`; the operators state none of it.
"""

from __future__ import annotations

import os
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from mica import native
from mica.ops import computed, recompute, trial
from mica.ops.checks import LINEAR, check_operands
from mica.ops.operator import (
    AUTOCAST,
    as_matrix,
    autocast_to,
    below_autograd,
    call_counts,
    in_form,
    is_eager,
    like,
    no_autocast,
    operator,
    run_backward,
    run_formula,
    save,
    saved,
    without_gradient,
    without_none,
    without_values,
)
from mica.paths import choose, products, reference_path, tuning
from mica.paths.choose import kind_of
from mica.paths.operands import Operands


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
    """A frozen linear layer with its MiCA or LoRA adapter: x Wᵀ + bias + scaling·(drop(x) Aᵀ) Bᵀ.

    Args:
        x: The input, (..., in_features), in fp64, fp32, bf16 or fp16.
        weight: The frozen weight, (out_features, in_features), in the dtype of x. A transposed view is fine.
        lora_A: The trained factor, (rank, in_features), in the dtype of x or as an fp32 master over 16-bit x.
        lora_B: The other factor, (out_features, rank), frozen in MiCA and trained in LoRA; dtypes as for
            lora_A.
        scaling: lora_alpha / rank, a number without a unit.
        bias: The frozen bias, (out_features), in the dtype of x; None for none.
        compute_dtype: The dtype of the low-rank products; None means that of x. In fp16 x·Aᵀ and dy·B
            overflow beyond 65504: `mica.fast` passes fp32 over fp32 masters, as stock PEFT computes. Under
            autocast everything runs in autocast's dtype, as PEFT's layer does.
        dropout_p: The probability in [0, 1) with which an element of x is dropped before lora_A.
        seed: An int64 tensor of shape (1,), needed where dropout_p > 0. It determines the mask, which is
            never stored: drawn with torch's generator, gradient checkpointing recomputes the same mask.

    Returns:
        (..., out_features) in the dtype of x (of autocast where it is on).

    Gradients: lora_A and lora_B get theirs in their own dtype, accumulated in fp32 (under autocast perhaps
    rounded to its dtype, as PyTorch does); x gets one where it needs it. Saved for the backward are
    references to the operands, x as it came where lora_A is trained, and h = scaling·drop(x) Aᵀ where lora_B
    is. Definition: arXiv 2604.01694, 2106.09685; tests/support/definition.py.

    Raises:
        TypeError: An operand or the compute_dtype is not of a floating dtype, or the weight or bias is not of
            the dtype of x outside autocast.
        ValueError: Shapes or devices do not fit, or a frozen operand requires a gradient.
        RuntimeError: MICA_BACKEND=triton is set, and there are no kernels for the call.
    """
    seed = seed if dropout_p else None
    operands = Operands(weight, lora_A, lora_B, scaling, bias, compute_dtype, dropout_p, seed)
    check_operands(LINEAR, x=x, **operands._asdict())
    return linear(x, *operands._replace(trains_B=lora_B.requires_grad))


def linear(x: Tensor, *args) -> Tensor:
    """`mica_linear` without its checks, or without its base product where there is a base_output.

    Args:
        x: The input, (..., in_features).
        args: The fields of `Operands`, in their order.

    Returns:
        (..., out_features), a new tensor in the dtype of x, or of the base_output.
    """
    operands = Operands(*args)
    device_type = x.device.type
    tensors = x, operands.weight, operands.lora_A, operands.lora_B, operands.bias, operands.base_output
    if device_type not in AUTOCAST or not is_eager(*tensors):
        y, _ = _linear_and_h(x, *args)
        return y
    if torch.is_autocast_enabled(device_type):
        operands = _under_autocast(x, operands)
    return linear_eager(x, *operands)


def _under_autocast(x: Tensor, operands: Operands) -> Operands:
    """As PEFT's layer runs there: all products in autocast's dtype, but for fp64, which stays as it is."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
    return operands._replace(compute_dtype=None, autocast_dtype=dtype)


def _linear(x, *args, may_settle=True):
    """(y, h), or (y, None) where lora_B is frozen; ``may_settle``: as `run_formula`."""
    operands = Operands(*args)
    kind = None
    matrix = as_matrix(x)
    if operands.base_output is None:
        operands = _with_dtype_of(x, operands)
        kind = partial(kind_of, operands, operands.dtypes(x), matrix)
    else:
        operands = operands._replace(base_output=as_matrix(operands.base_output))
        call_counts["linear_added"] += 1
    y, h = run_formula(
        reference_path.linear,
        x,
        operands.rank,
        operands.dtypes(x),
        matrix,
        operands,
        kind=kind,
        trains_B=operands.trains_B,
        may_settle=may_settle,
    )
    return like(x.shape, y), like(x.shape, h) if operands.trains_B else None


def _with_dtype_of(x: Tensor, operands: Operands) -> Operands:
    """Weight and bias in the dtype of x, to which autocast has cast that.

    They are kept for the backward as they are, and cast there again: the copies of all weights would take
    half the memory of fp32 ones, and a step of SmolLM2-135M takes no longer (1.09 of the bare model's time).
    """
    weight = autocast_to(operands.weight, x.dtype)
    return operands._replace(weight=weight, bias=autocast_to(operands.bias, x.dtype))


def _linear_backward(grad_output, x, output_mask, *args, is_called=False, grad_h=None):
    """``is_called``: whether the forward had a base_output; then there is no weight."""
    needs_x, needs_A = output_mask
    operands = _with_dtype_of(grad_output, Operands(*args))
    dy = as_matrix(grad_output)
    matrix = as_matrix(x) if needs_A else None
    dtypes = operands.dtypes(dy)
    kind = None if is_called else partial(kind_of, operands, dtypes, dy, matrix)
    with no_autocast():
        dx, dA = run_formula(
            reference_path.linear_backward,
            dy,
            operands.rank,
            dtypes,
            dy,
            matrix,
            operands,
            needs_x,
            *([] if grad_h is None else [as_matrix(grad_h)]),  # only in second derivatives: no kernel
            kind=kind,
            trains_B=operands.trains_B,
        )
    return without_none(grad_output, None if dx is None else like(grad_output.shape, dx), dA)


def _linear_operator(x, *args):
    return without_none(x, *_linear(x, *args, may_settle=False))


def _linear_fake(x, *args):
    operands = Operands(*args)
    like_y = x if operands.base_output is None else operands.base_output
    y = like_y.new_empty(*x.shape[:-1], operands.out_features)
    if not operands.trains_B:
        return without_none(x, y, None)
    return y, x.new_empty(*x.shape[:-1], operands.rank, dtype=_product_dtype(x, operands))


def _product_dtype(rows: Tensor, operands: Operands) -> torch.dtype:
    """That of the low-rank products, of which a trace knows the shapes alone."""
    tokens = rows.new_empty(rows.shape[:-1].numel(), 0)
    return products.product_dtype(tokens, (operands.lora_A, operands.lora_B), operands.low_rank_dtype(rows))


def _linear_backward_fake(grad_output, x, output_mask, *args, is_called=False):
    needs_x, needs_A = output_mask
    operands = Operands(*args)
    lora_A = operands.lora_A
    grad_x = None
    if needs_x:
        dtype = _product_dtype(grad_output, operands) if is_called else grad_output.dtype
        grad_x = grad_output.new_empty(*grad_output.shape[:-1], lora_A.shape[1], dtype=dtype)
    return without_none(grad_output, grad_x, lora_A.new_empty(lora_A.shape) if needs_A else None)


_NO_GRADIENTS = Operands(*[None] * len(Operands._fields))


class _Linear(torch.autograd.Function):
    """``run`` computes (y, h or None): `_linear`, or the operator (`mica.ops.operator.operator`).

    h is an output, so that second derivatives reach x and lora_A through it.
    """

    @staticmethod
    def forward(ctx, run, x, *args):
        operands = Operands(*args)
        _, needs_x, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        ctx.set_materialize_grads(False)
        operands = operands._replace(trains_B=operands.trains_B or needs_B)
        with below_autograd():
            y, h = run(x, *operands)
        if h is not None and not needs_B:
            ctx.mark_non_differentiable(h)
        # no fp32 copy, no mask, and nothing that no gradient needs
        kept_x = x if needs_A else None
        kept_weight = operands.weight if needs_x else None
        kept_A = operands.lora_A if needs_x else without_values(operands.lora_A)
        kept_h = h if needs_B else None
        save(ctx, kept_x, kept_weight, kept_A, operands.lora_B, operands.seed, outputs=[kept_h])
        ctx.is_called = operands.base_output is not None
        tensors = ("weight", "lora_A", "lora_B", "bias", "seed", "base_output")
        ctx.operands = operands._replace(compute_dtype=operands.low_rank_dtype(x), **dict.fromkeys(tensors))
        return y, h

    @staticmethod
    def backward(ctx, grad_output, grad_h):
        x, weight, lora_A, lora_B, seed, h = saved(ctx)
        operands = ctx.operands._replace(weight=weight, lora_A=lora_A, lora_B=lora_B, seed=seed)
        if grad_output is None and grad_h is None:
            return None, None, *_NO_GRADIENTS
        grad_base = grad_output if ctx.is_called else None
        if grad_output is None:
            grad_output = without_gradient(grad_h, weight, lora_B)
        grad_x = grad_A = grad_B = None
        mask = [ctx.needs_input_grad[1], x is not None]
        if any(mask):
            tensors = grad_output, x, weight, lora_A, lora_B
            args = grad_output, x, mask, *operands
            backward, body = (
                partial(function, is_called=ctx.is_called)
                for function in (torch.ops.mica.linear_backward, _linear_backward)
            )
            grad_x, grad_A = run_backward(backward, body, tensors, *args, mask=mask, grad_h=grad_h)
        if h is not None:
            in_features = 0 if ctx.is_called else lora_A.shape[1]
            grad_B = grad_b(grad_output, h, lora_B.dtype, operands.autocast_dtype, in_features)
        gradients = _NO_GRADIENTS._replace(lora_A=grad_A, lora_B=grad_B, base_output=grad_base)
        return None, grad_x, *gradients


def _cast(device_type, x, *args):
    operands = _under_autocast(x, Operands(*args))
    return autocast_to(x, operands.autocast_dtype), *operands


def linear_eager(x, *args) -> Tensor:
    """`linear` for callers that know that `is_eager` holds.

    x is cast here, or in C++, as autocast does, where autograd follows.

    Args:
        x: The input, (..., in_features).
        args: The fields of `Operands`, in their order.

    Raises:
        ValueError: x has no dimensions.
    """
    if x.dim() == 0:
        as_matrix(x)  # raises
    operands = Operands(*args)
    if torch.is_grad_enabled() and operands.lora_A.requires_grad:
        return recompute.call(_run, x, *operands, dtype=operands.autocast_dtype)
    return _run(x, *operands)


def _run(x, *args) -> Tensor:
    """From C++, or else from Python, in the form that is the fastest on this device."""
    module = native.module()
    if module is not None:
        y = module.linear(x, *args)
        if y is not None:
            return y
    operands = Operands(*args)
    try:
        return _from_python(x, operands)
    except tuning.UnsettledError as unsettled:
        kind = unsettled.kind
    return _settled(kind, module, x, operands)


def _settled(kind: tuning.Kind, module: ModuleType | None, x, operands: Operands) -> Tensor:
    """The first call of a kind in this process: how it and those after it run is settled before it runs."""
    from_cpp = None
    if module is not None and not operands.dropout_p:  # C++ has masks on CPUs only
        from_cpp = lambda x, operands: module.linear_on_reference(x, *operands)  # noqa: E731
    if not trial.settle(kind, x, operands, _from_python, from_cpp):
        with in_form(choose.REFERENCE):
            return _from_python(x, operands)
    forward, backward, *_ = tuning.table(x.device).find(kind)
    if from_cpp is not None and forward.form == backward.form == choose.REFERENCE:
        choose.cpp_keys.add(module.key_of(x, *operands))
        return from_cpp(x, operands)
    return _from_python(x, operands)


def _from_python(x, operands: Operands) -> Tensor:
    if operands.autocast_dtype is not None:
        x = autocast_to(x, operands.autocast_dtype)
    tensors = x, operands.lora_A, operands.lora_B, operands.base_output
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        with no_autocast():
            y, _ = _Linear.apply(_linear, x, *operands)
        return y
    with below_autograd(), no_autocast():
        y, _ = _linear(x, *operands)
    return y


def configure(module: ModuleType) -> None:
    """Tell the C++ what it shares with Python."""
    limits = products.FEW_TO_ROUND, products.FEW_ROWS, products.CHUNK, reference_path.TOKENS_PER_CHUNK
    module.configure_linear(
        limits,
        products.HAS_WIDE_SUMS,
        computed.EDITED.format(computed.OPERANDS),
        call_counts=call_counts,
        os=vars(os),
        modules=native.modules,
        instructions=products.ANSWERS,
        devices_without_kernels=choose.devices_without_kernels,
        cpp_keys=choose.cpp_keys,
        recompute=vars(recompute),
        value_of=computed.value_of,
        python_linear=linear,
    )


native.when_loaded(configure)

# The names stay from release to release: graphs in Inductor's cache, which outlives one, call by them.
_FACTORS = (
    "Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, ScalarType? compute_dtype,"
    " float dropout_p=0.0, Tensor? seed=None, ScalarType? grad_dtype=None, bool trains_B=False,"
    " Tensor? base_output=None"
)
_linear_and_h = operator(
    "linear",
    f"(Tensor x, Tensor? weight, {_FACTORS}) -> (Tensor, Tensor)",
    _linear_operator,
    _linear_fake,
    _Linear.apply,
    _cast,
)
operator(
    "linear_backward",
    f"(Tensor grad_output, Tensor? x, bool[2] output_mask, Tensor? weight, {_FACTORS}, *,"
    " bool is_called=False) -> (Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)


# ---------------------------------------------------------------------------------------------------
# the gradient of a trained lora_B
# ---------------------------------------------------------------------------------------------------


def grad_b(
    grad_output: Tensor,
    h: Tensor,
    dtype: torch.dtype,
    grad_dtype: torch.dtype | None = None,
    in_features: int = 0,
) -> Tensor:
    """The gradient of lora_B, computed in a backward.

    Args:
        grad_output: The gradient dy of the output, (..., out_features).
        h: What the forward has multiplied by lora_B, (..., rank).
        dtype: The dtype of the result, which is that of lora_B.
        grad_dtype: A dtype to which the sum may be rounded first, as PyTorch does under autocast; None for
            none.
        in_features: The width of the layer whose backward this is, which decides on its form; 0 where the
            base layer was called.

    Returns:
        dB, (out_features, rank).
    """
    tensors = grad_output, h
    return run_backward(torch.ops.mica.grad_b, _grad_b, tensors, *tensors, dtype, grad_dtype, in_features)


def _grad_b(grad_output, h, dtype, grad_dtype, in_features):
    dy = as_matrix(grad_output)
    dtypes = (dy.dtype, h.dtype, dtype, dtype)

    def kind_of_layer() -> tuning.Kind:
        sizes = h.shape[-1], in_features, dy.shape[1], tuning.rounded_up(len(dy))
        return tuning.Kind(True, dtypes, *sizes, has_dropout=False, is_aligned=dy.data_ptr() % 16 == 0)

    kind = kind_of_layer if in_features else None
    with no_autocast():
        return run_formula(
            reference_path.grad_b, dy, h.shape[-1], dtypes, dy, as_matrix(h), dtype, grad_dtype, kind=kind
        )


def _grad_b_fake(grad_output, h, dtype, grad_dtype, in_features):
    return h.new_empty(grad_output.shape[-1], h.shape[-1], dtype=dtype)


operator(
    "grad_b",
    "(Tensor grad_output, Tensor h, ScalarType dtype, ScalarType? grad_dtype, SymInt in_features) -> Tensor",
    _grad_b,
    _grad_b_fake,
)
