"""A layer's forms, timed on scratch operands at the first call of its kind: `settle`.

What is timed is a whole call, as a training step makes it: the forward with autograd's node, and all that
this node does in the backward. Nobody else sees it. The operands are made here, of a generator's random
numbers, no saved-tensor hooks are called, and nothing is counted. Nodes are called directly: autograd's
engine would call them in threads of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from mica.errors import first_line
from mica.native.build import say
from mica.ops.operator import call_counts, in_form
from mica.paths import tuning
from mica.paths.operands import Operands
from mica.paths.tuning import NATIVE, REFERENCE, Kind, Layer, Rounds

Call = Callable[[Tensor, Operands], Tensor]  # x, operands -> y


def settle(kind: Kind, x: Tensor, operands: Operands, from_python: Call, from_cpp: Call | None) -> bool:
    """Settle how calls of this kind run, from what is known or by measuring; False: not at this moment.

    Args:
        kind: The kind of the call that asks.
        x, operands: Those of that call. Their shapes, dtypes and frozen tensors are used.
        from_python: The function that computes the layer in the form of `in_form`.
        from_cpp: The function that computes it on the reference path in C++; None if C++ does not.
    """
    table = tuning.table(x.device)
    if not table.measuring.acquire(blocking=False):  # another thread measures, and nobody waits
        return False
    try:
        layer = table.find(kind) or _measured(kind, x, operands, from_python, from_cpp)
        if layer is None:
            return False
        table.settle(kind, layer)
        return True
    finally:
        table.measuring.release()


def _measured(
    kind: Kind, x: Tensor, operands: Operands, from_python: Call, from_cpp: Call | None
) -> Layer | None:
    """None where nothing can be measured now."""
    if not tuning.table(x.device).is_on:
        return tuning.UNMEASURED
    frozen = [tensor for tensor in (operands.weight, operands.bias) if tensor is not None]
    if tuning.why_not_now(x.device) or any(tensor.is_inference() for tensor in frozen):
        return None
    calls = {REFERENCE: from_python}
    if from_cpp is not None:
        calls[NATIVE] = from_cpp
    calls |= dict.fromkeys(tuning.forms_of(kind), from_python)

    start = tuning.clock()
    has_memory = True

    def leave_out(form: str, error: Exception) -> None:
        nonlocal has_memory
        has_memory = has_memory and not isinstance(error, torch.OutOfMemoryError)
        warnings.warn(f"MiCA leaves out the form {form!r} of {kind}: {first_line(error)}", stacklevel=2)

    try:
        with _unseen():
            forward, backward = _rounds(kind, _scratch(kind, x, operands), calls, leave_out)
    except Exception as error:  # whatever keeps the reference path from running on scratch operands
        what = f"MiCA runs {kind} on the reference path, as it could not be measured"
        warnings.warn(f"{what}: {first_line(error)}", stacklevel=2)
        return tuning.UNMEASURED
    layer = Layer(*tuning.chosen(forward, backward), date.today().isoformat())
    seconds = tuning.clock() - start
    where = tuning.device_name(x.device)
    found = f"forward {layer.forward.found()}; backward {layer.backward.found()}"
    say(f"measured in {seconds:.1f} s how {kind} runs on {where}: {found}")
    # another process may find the memory
    return layer if has_memory else layer._replace(day="")


@contextmanager
def _unseen() -> Iterator[None]:
    """As in a training step, and out of sight of those who count calls or watch what autograd saves."""

    def itself(tensor: Tensor) -> Tensor:
        return tensor

    counts = dict(call_counts)
    try:
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(itself, itself):
            yield
    finally:
        call_counts.clear()
        call_counts.update(counts)


def _scratch(kind: Kind, x: Tensor, operands: Operands) -> tuple[Tensor, Operands]:
    """Random x, A and B, of which none is 0 as new factors are: a wrong update would not be seen."""
    generator = torch.Generator(x.device).manual_seed(0)

    def normal(like: Tensor, scale: float, offset: int = 0) -> Tensor:
        memory = torch.empty(like.numel() + offset, dtype=like.dtype, device=like.device)
        return memory[offset:].view(like.shape).normal_(0.0, scale, generator=generator)

    lora_A = normal(operands.lora_A, kind.in_features**-0.5).requires_grad_()
    lora_B = normal(operands.lora_B, kind.rank**-0.5).requires_grad_(kind.trains_B)
    own_x = normal(x, 1.0, offset=0 if kind.is_aligned else 1).requires_grad_()
    return own_x, operands._replace(lora_A=lora_A, lora_B=lora_B, scaling=1.0)


def _rounds(
    kind: Kind,
    scratch: tuple[Tensor, Operands],
    calls: dict[str, Call],
    leave_out: Callable[[str, Exception], None],
) -> tuple[Rounds, Rounds]:
    """Those of the forward and of the backward."""
    device = scratch[0].device
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    tolerance = max(tuning.TOLERANCES[dtype] for dtype in kind.dtypes[:2])

    def forward(form: str) -> list[Tensor]:
        with in_form(form):
            return [calls[form](*scratch)]

    forwards = {form: partial(forward, form) for form in calls}
    of_forward = tuning.timed(forwards, tolerance, synchronize, leave_out)

    # an edge owns what its node has saved: with PyTorch 2.11 a node in Python alone loses that with y
    edges = {form: get_gradient_edge(forward(form)[0]) for form in of_forward}
    (y,) = forward(REFERENCE)
    grad_output = y.detach()

    def backward(form: str) -> Sequence[Tensor]:
        with in_form(form), torch.no_grad():
            return _gradients(edges[form].node, grad_output, kind.trains_B)

    backwards = {form: partial(backward, form) for form in edges}
    of_backward = tuning.timed(backwards, tolerance, synchronize, leave_out)
    return of_forward, of_backward


def _gradients(node, grad_output: Tensor, has_h: bool) -> list[Tensor]:
    """dx, dA and, where B is trained, dB, of one of the two nodes that a layer can have."""
    if hasattr(node, "apply"):  # Python's
        gradients = node.apply(grad_output, None)
    else:
        gradients = node(grad_output, *[None] * has_h)
    return [gradient for gradient in gradients if gradient is not None]
