"""Which path a call takes, Triton kernels or the reference: set by ``MICA_BACKEND``, else by the device."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NamedTuple

import torch

from mica.kernels import configs, runtime
from mica.kernels.limits import DTYPES, MAX_RANK, names_of

BACKENDS = ("auto", "triton", "reference")


class Refused(NamedTuple):
    """What runs on the reference from some call on: a function of `mica.paths.triton_path`, its operands."""

    device: torch.device
    function: str
    rank: int
    dtypes: tuple[torch.dtype, ...]


_given_up: dict[Refused, str] = {}
_missed: set[Refused] = set()

# The raw value of ``MICA_BACKEND``, None where it is unset, in 0.1 µs; only for comparisons.
setting = runtime.raw_variable("MICA_BACKEND")
_interpreting = runtime.raw_variable("TRITON_INTERPRET")

# What `use_kernels` has returned. Only the environment and `give_up` can change it.
_verdicts: dict[tuple, bool] = {}


def give_up(
    device: torch.device, function: str, rank: int, dtypes: tuple[torch.dtype, ...], error: Exception
) -> None:
    """Use no kernels for this function with such operands from now on; a warning names it and the reason."""
    text = (str(error).strip() or type(error).__name__).partition("\n")[0]
    what = f"{function} at rank {rank} ({names_of(dtypes)})"
    _given_up[Refused(device, function, rank, dtypes)] = f"{what} was given up: {text}"
    _verdicts.clear()
    warnings.warn(
        f"MiCA runs {what} on PyTorch's own operators on {device} from here on: {text}", stacklevel=2
    )


def note_missed(
    device: torch.device, function: str, rank: int, dtypes: tuple[torch.dtype, ...], error: Exception
) -> None:
    """Warn, once, that this function with such operands runs without kernels in a CUDA graph."""
    missed = Refused(device, function, rank, dtypes)
    if missed not in _missed:
        _missed.add(missed)
        what = f"{function} at rank {rank} ({names_of(dtypes)})"
        warnings.warn(
            f"MiCA runs {what} on PyTorch's own operators in a CUDA graph on {device}: {error}", stacklevel=2
        )


def is_host_bound(work: int) -> bool:
    """Whether a layer of so many multiplications has no kernels, if its operands have one dtype.

    With fp32 masters over 16-bit rows the casts would cost what is saved. Demanded kernels always run.
    """
    return work <= configs.HOST_BOUND and setting() not in ("triton", b"triton")


def clear() -> None:
    """Decide again which path calls take, and retry what was given up: after a change of driver."""
    _given_up.clear()
    _missed.clear()
    _verdicts.clear()


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


def why_not_kernels(
    device: torch.device,
    rank: int,
    *dtypes: torch.dtype,
    backend: str | None = None,
    function: str | None = None,
) -> str | None:
    """None if a call with such operands runs on Triton kernels, else the reason in words.

    ``function``: of `mica.paths.triton_path`; if None, the reason why any of them was given up counts too.
    """
    backend = backend or requested()
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
    if function is not None:
        return _given_up.get(Refused(device, function, rank, dtypes))
    return next((reason for key, reason in _given_up.items() if _concerns(key, device, rank, dtypes)), None)


def _concerns(refused: Refused, device: torch.device, rank: int, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether this affects a layer with operands of these dtypes."""
    return refused.device == device and refused.rank == rank and set(dtypes) <= set(refused.dtypes)


def use_kernels(device: torch.device, rank: int, *dtypes: torch.dtype, function: str | None = None) -> bool:
    """Whether this call, of a function of `mica.paths.triton_path`, runs on the kernels.

    Raises:
        RuntimeError: ``MICA_BACKEND=triton`` demands kernels that this call cannot have.
    """
    key = (setting(), _interpreting(), device, rank, dtypes, function)
    verdict = _verdicts.get(key)
    if verdict is None:
        verdict = _decide(device, rank, dtypes, function)
        if runtime.is_settled(device):
            _verdicts[key] = verdict
    return verdict


def _decide(device: torch.device, rank: int, dtypes: tuple[torch.dtype, ...], function: str | None) -> bool:
    backend = requested()
    reason = why_not_kernels(device, rank, *dtypes, backend=backend, function=function)
    if reason and backend == "triton":
        raise RuntimeError(f"MICA_BACKEND=triton demands Triton kernels, but there are none here: {reason}.")
    return reason is None
