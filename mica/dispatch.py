"""What all operators ``torch.ops.mica.*`` share: the library, choice of path, autograd and autocast rules."""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Sequence
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


PLAIN = (Tensor, torch.nn.Parameter)  # the classes of tensors that nothing listens to


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call may go to a body itself: nobody but autograd and autocast looks on, eager and plain.

    The way through torch.library costs about 15 µs a call (measured), a whole layer of stock PEFT 40. It is
    taken where a graph is traced or compiled, under a dispatch or function mode (selective checkpointing,
    counters of flops), a function transform, forward-mode AD, and for tensors of other classes (DTensor).
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or is_transformed()
        or torch._C._get_tracing_state() is not None
    )


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


def run_backward(operator: Callable, body: Callable, tensors: Sequence[Tensor | None], *args):
    """What a backward does. With ``create_graph=True`` the plain formulas, so higher derivatives hold.

    The body below autograd, though no gradients are enabled there: PyTorch's calls take 1 µs less each.
    """
    if torch.is_grad_enabled():
        return plain(body)(*args)
    if not is_direct(*tensors):
        return operator(*args)
    with below_autograd():
        return body(*args)


def rows(tensor: Tensor) -> Tensor:
    """(..., n) as a matrix (tokens, n)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


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
    """Its autograd; the plain formulas where `is_transformed`, which any transform can follow.

    ``apply(run, *args)``: of an autograd.Function whose forward is ``run`` below autograd. From here that is
    the operator again, for whoever traces or looks on.
    """
    operator = getattr(torch.ops.mica, name).default

    def autograd(*args):
        return plain(body)(*args) if is_transformed() else apply(operator, *args)

    LIBRARY.impl(name, autograd, "Autograd")


def autocast(name: str, rule: Callable[[str], Callable]) -> None:
    """Its autocast rule for each kind of device; ``rule(device_type)`` is the operator under it."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, rule(device_type), key)


def front(name: str, apply: Callable, body: Callable, rule: Callable[[str], Callable]) -> Callable:
    """``torch.ops.mica.<name>`` without the dispatcher where `is_direct`: same arguments, same results.

    ``apply``, ``body`` and ``rule`` are what the operator was given by `differentiate`, `define` and
    `autocast`. Without a gradient there is no autograd.Function either.
    """
    operator = getattr(torch.ops.mica, name).default
    rules = {device_type: rule(device_type) for device_type in ("cpu", "cuda")}

    def call(*args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        device_type = tensors[0].device.type
        if device_type not in rules or not is_direct(*tensors):
            return operator(*args)
        if torch.is_autocast_enabled(device_type):
            return rules[device_type](*args)
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor.requires_grad:
                    return apply(body, *args)
        with below_autograd():
            return body(*args)

    return call
