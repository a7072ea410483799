"""How a call runs: on Triton kernels, in which form, or on the reference path, and why.

`choice_of` is the one decision. The operators follow it; `mica.fast.explain` and the benchmarks report it.
``MICA_BACKEND`` demands a path; by default the operands and what was measured on the device decide
(`mica.paths.tuning`). C++ computes all layers on the `devices_without_kernels`, and elsewhere those whose
keys are in `cpp_keys`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mica import native
from mica.errors import first_line
from mica.kernels import runtime
from mica.kernels.limits import DTYPES, MAX_RANK, names_of
from mica.paths import products, tuning
from mica.paths.operands import Operands
from mica.paths.tuning import REFERENCE, Kind, Part

BACKENDS = ("auto", "triton", "reference")

# Forms of a call. A layer has one of `configs.FORM_NAMES`; any other function on kernels has only `KERNELS`.
KERNELS = "kernels"
ERROR = "error"  # kernels are demanded, and there are none

LORA = "lora_"  # begins the name of a function whose lora_B may be trained


class Choice(NamedTuple):
    """The form in which a call runs, and why.

    Attributes:
        form: "reference", "error", "kernels", or of a layer one of `configs.FORM_NAMES`.
        reason: Why it is not on kernels, as text or as the measurement that says so; None if it is.
        measured: The measurement, where it speaks for kernels.
        unsettled: The kind of layer, where nothing is known of that yet.
    """

    form: str
    reason: str | Part | None = None
    measured: Part | None = None
    unsettled: Kind | None = None


def kind_of(
    operands: Operands, dtypes: tuple[torch.dtype, ...], rows: Tensor, x: Tensor | None = None
) -> Kind:
    """The kind of a layer's call, by which measurements are found.

    Args:
        operands: The layer's operands.
        dtypes: As `choice_of` takes them.
        rows: x (tokens, in_features) in the forward, grad_output (tokens, out_features) in the backward.
        x: The x of a backward that needs it; else None.
    """
    sizes = operands.rank, operands.lora_A.shape[1], operands.out_features, tuning.rounded_up(len(rows))
    is_aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (rows, x))
    return Kind(operands.trains_B, dtypes, *sizes, operands.dropout_p > 0.0, is_aligned)


# Kernels that failed to launch, by device, function, rank and dtypes as `choice_of` takes them, and the
# message. PyTorch computes these calls from then on.
_given_up: dict[tuple[torch.device, str, int, tuple[torch.dtype, ...]], str] = {}

# The raw value of ``MICA_BACKEND``, None where it is unset, in 0.1 µs; only for comparisons.
setting = runtime.raw_variable("MICA_BACKEND")
_interpreting = runtime.raw_variable("TRITON_INTERPRET")

# What `choice_of` has found out without looking at a layer. Only the environment and `give_up` can change it.
_choices: dict[tuple, Choice] = {}

# The indices of devices (-1: a CPU) on which C++ computes every layer, as there is no other way.
_CPU = -1
devices_without_kernels = {_CPU}
# Keys of GPU layers that were measured to be fastest on PyTorch in both passes: C++ runs them.
cpp_keys: set[bytes] = set()
_ON_KERNELS = Choice(KERNELS)


def choice_of(
    function: str,
    device: torch.device,
    rank: int,
    dtypes: tuple[torch.dtype, ...],
    kind: Callable[[], Kind] | None = None,
) -> Choice:
    """How a call of a formula of `mica.paths.reference_path` runs.

    Args:
        function: The name of the formula, with `LORA` in front where lora_B may be trained.
        device: The device of the operands.
        rank: The rank of the adapter.
        dtypes: Those of the operands and products; for a layer those of x (or dy), of the products, of lora_A
            and of lora_B.
        kind: A function that gives the kind of a layer; None for other formulas. It is called only where
            kernels could run: on a CPU nothing is looked at.

    Raises:
        ValueError: ``MICA_BACKEND`` has a value that is not allowed.
    """
    key = (setting(), _interpreting(), device, rank, dtypes, function)
    choice = _choices.get(key)
    if choice is None:
        reason = why_not_kernels(device, rank, *dtypes, function=function)
        choice = _ON_KERNELS
        if reason is not None:
            choice = Choice(ERROR if requested() == "triton" else REFERENCE, reason)
        if runtime.is_settled(device):
            _choices[key] = choice
            if device.type == "cuda" and runtime.why_unavailable(device) is not None:
                devices_without_kernels.add(device.index)
    if choice is _ON_KERNELS and kind is not None:
        return _choice_of_layer(function, device, kind())
    return choice


def why_not_cpp(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why C++ calls no layer on this device; None if it may, or if that would have to be compiled first.

    Args:
        device: The device of the layer.
        dtypes: The dtypes in which x and the low-rank products are multiplied.
    """
    reason = None if native.needs_compiler() else native.why_not()
    if reason is not None:
        return reason
    for dtype in dtypes:
        if device.type == "cpu" and not products.has_native(dtype):
            return f"this processor has no instructions for {names_of([dtype])}"
    return None


def _choice_of_layer(function: str, device: torch.device, kind: Kind) -> Choice:
    """The form that was measured to be the fastest for this part of a layer."""
    table = tuning.table(device)
    layer = table.find(kind)
    if layer is None and function == "grad_b":  # which does not know whether its layer has dropout
        layer = table.find(kind._replace(has_dropout=True))
    is_demanded = setting() in ("triton", b"triton")
    is_settled = is_demanded or (layer is not None and layer.is_settled)
    unsettled = None if is_settled else kind
    part = None
    if layer is not None:
        part = layer.forward if function.removeprefix(LORA) == "linear" else layer.backward
    if is_demanded and (part is None or part.form == REFERENCE):
        return Choice("split")
    if part is None:
        why = tuning.why_not_now(device) or "a call does that"
        return Choice(REFERENCE, f"not measured: {why}", unsettled=unsettled)
    if part.form == REFERENCE:
        return Choice(REFERENCE, part, unsettled=unsettled)
    return Choice(part.form, measured=part, unsettled=unsettled)


def demand_error(choice: Choice) -> RuntimeError:
    """What a call with the form "error" raises."""
    return RuntimeError(
        f"MICA_BACKEND=triton demands Triton kernels, but there are none here: {choice.reason}."
    )


def give_up(
    device: torch.device, function: str, rank: int, dtypes: tuple[torch.dtype, ...], error: Exception
) -> None:
    """Use no kernels for this function with such operands from now on; a warning names it and the reason."""
    text = first_line(error)
    what = f"{function} at rank {rank} ({names_of(dtypes)})"
    _given_up[device, function, rank, dtypes] = f"{what} was given up: {text}"
    _choices.clear()
    failed = f"the Triton kernel for {what} failed on {device}"
    warnings.warn(f"{failed}; PyTorch computes it from now on: {text}", stacklevel=2)


def note_missed(
    device: torch.device, function: str, rank: int, dtypes: tuple[torch.dtype, ...], error: Exception
) -> None:
    """Warn that this function with such operands runs without kernels in a CUDA graph."""
    what = f"{function} at rank {rank} ({names_of(dtypes)})"
    warnings.warn(
        f"MiCA runs {what} on the reference path in a CUDA graph on {device}: {error}", stacklevel=2
    )


def clear() -> None:
    """Decide again which path calls take, and retry what was given up: after a change of driver.

    What was measured is read again from its file.
    """
    _given_up.clear()
    _choices.clear()
    tuning.clear()
    devices_without_kernels.clear()
    devices_without_kernels.add(_CPU)
    cpp_keys.clear()


def clear_prepared() -> None:
    """`mica.kernels.prepared_b.clear` if it has been imported: after an edit of B through ``.data``."""
    prepared = sys.modules.get("mica.kernels.prepared_b")
    if prepared is not None:
        prepared.clear()


def requested() -> str:
    """The value of ``MICA_BACKEND``: "auto" (default), "triton" or "reference".

    Raises:
        ValueError: another value.
    """
    value = os.environ.get("MICA_BACKEND") or "auto"
    if value not in BACKENDS:
        raise ValueError(f"MICA_BACKEND must be one of {', '.join(BACKENDS)}, but it is {value!r}.")
    return value


def why_not_kernels(device: torch.device, rank: int, *dtypes: torch.dtype, function: str) -> str | None:
    """None if a call with such operands runs on Triton kernels, else the reason in words.

    Args:
        device: The device of the operands.
        rank: The rank of the adapter.
        dtypes: The dtypes of the operands and products.
        function: The name of a formula, which may have been given up.
    """
    backend = requested()
    if backend == "reference":
        return "MICA_BACKEND=reference"
    if backend == "auto" and runtime.is_interpreting() and runtime.triton_version() is not None:
        return "TRITON_INTERPRET=1, and interpreted kernels run only with MICA_BACKEND=triton"
    unavailable = runtime.why_unavailable(device)
    if unavailable:
        return unavailable
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"no Triton kernels for {names_of([dtype])}"
    if rank > MAX_RANK:
        return f"no Triton kernels for ranks above {MAX_RANK}"
    return _given_up.get((device, function, rank, dtypes))
