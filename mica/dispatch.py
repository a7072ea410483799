"""What all operators ``torch.ops.mica.*`` share: the library, choice of path, autograd and autocast rules."""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mica import backend, reference

# How often each operator's body ran, eager or compiled: the proof that a path was taken. Counted in the
# bodies, which torch.compile never looks into. "linear" counts every call, "linear_kernels" those on Triton.
call_counts: Counter[str] = Counter()

LIBRARY = torch.library.Library("mica", "DEF")

# Around the body of a forward. Without autograd alone a body's ``.view`` would make the output a view, and an
# in-place operation on it (nn.ReLU(inplace=True), ``y += x``) an error: autograd allows none on a Function's.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

_NOTHING = nullcontext()

_force_plain = contextvars.ContextVar("mica_force_plain", default=False)


def compute(name: str, function: str, tensor: Tensor, rank: int, dtypes: tuple, *args):
    """`mica.kernel_path`'s function where kernels run for these operands, else `mica.reference`'s."""
    call_counts[name] += 1
    formula = getattr(reference, function)
    if _force_plain.get() or not backend.use_kernels(tensor.device, rank, *dtypes, function=function):
        return formula(*args)
    from mica import kernel_path  # imports Triton

    try:
        result = getattr(kernel_path, function)(*args)
    except kernel_path.LaunchError as error:  # before anything ran: no operand has changed
        if backend.requested() == "triton":
            raise
        backend.give_up(tensor.device, function, rank, dtypes, error)
        return formula(*args)
    call_counts[f"{name}_kernels"] += 1
    return result


def plain(body: Callable) -> Callable:
    """The body on the reference alone: what autograd and every function transform can follow."""

    def run(*args):
        token = _force_plain.set(True)
        try:
            return body(*args)
        finally:
            _force_plain.reset(token)

    return run


def is_transformed() -> bool:
    """Under torch.func (grad, jvp, vmap), or where forward-mode AD may have made dual tensors."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def saved(ctx) -> tuple[Tensor | None, ...]:
    """What the forward has saved.

    Raises:
        RuntimeError: also for an edit that stock PEFT forgives where it has saved an fp32 copy of x.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "x, lora_A, lora_B or the weight of a MiCA layer has been modified by an inplace operation after "
            "the layer's forward. They are kept as they came, without a copy: edit a clone of x instead."
        ) from error


def backward_of(operator: Callable, body: Callable) -> Callable:
    """What a backward calls. With ``create_graph=True`` the plain formulas, so higher derivatives hold."""
    return plain(body) if torch.is_grad_enabled() else operator


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Off for the products of a body: a user who calls backward inside autocast gets the same dA."""
    device_type = tensor.device.type
    # where it is off already, 10 µs less a backward
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NOTHING


def autocast_to(tensor: Tensor | None, device_type: str) -> Tensor | None:
    """As PEFT's layers do under autocast: products in its dtype, fp64 as it is; A stays its fp32 master."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def define(name: str, schema: str, body: Callable, fake: Callable) -> None:
    """One operator: its schema (arguments and results), body for every device, and fake for tracing."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mica::{name}", fake, lib=LIBRARY)


def differentiate(name: str, apply: Callable, body: Callable) -> None:
    """Its autograd; the plain formulas where `is_transformed`, which any transform can follow."""

    def autograd(*args):
        return plain(body)(*args) if is_transformed() else apply(*args)

    LIBRARY.impl(name, autograd, "Autograd")


def autocast(name: str, rule: Callable[[str], Callable]) -> None:
    """Its autocast rule for each kind of device; ``rule(device_type)`` is the operator under it."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, rule(device_type), key)
