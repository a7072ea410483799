"""Which path a call takes, Triton kernels or the reference: ``MICA_BACKEND`` says it, else the device."""

from __future__ import annotations

import os
import sys
import warnings

import torch

from mica.kernels import runtime

BACKENDS = ("auto", "triton", "reference")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256  # as `mica.kernels.common.MAX_RANK`, which cannot be read without Triton


_given_up: dict[torch.device, str] = {}


def give_up(device: torch.device, error: Exception) -> None:
    """No kernels on this device any more, with a warning: one of them could not be compiled or launched."""
    text = (str(error).strip() or type(error).__name__).partition("\n")[0]
    _given_up[device] = f"a kernel could not be launched: {text}"
    warnings.warn(
        f"MiCA runs on PyTorch's own operators on {device} from here on: {_given_up[device]}", stacklevel=2
    )


def forget_prepared() -> None:
    """`mica.kernels.prepared.forget`, where it has been imported: after an edit of B through ``.data``."""
    prepared = sys.modules.get("mica.kernels.prepared")
    if prepared is not None:
        prepared.forget()


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
    device: torch.device, rank: int, *dtypes: torch.dtype, backend: str | None = None
) -> str | None:
    """None if a call with such operands runs on Triton kernels, else the reason in words."""
    backend = backend or requested()
    if backend == "reference":
        return "MICA_BACKEND=reference"
    if backend == "auto" and runtime.is_interpreting() and runtime.triton_version() is not None:
        return "TRITON_INTERPRET=1, and interpreted kernels run only with MICA_BACKEND=triton"
    unavailable = runtime.why_unavailable(device) or _given_up.get(device)
    if unavailable:
        return unavailable
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            return f"no Triton kernels for {str(dtype).removeprefix('torch.')}"
    if rank > MAX_RANK:
        return f"no Triton kernels for ranks above {MAX_RANK}"
    return None


def use_kernels(device: torch.device, rank: int, *dtypes: torch.dtype) -> bool:
    """Whether this call runs on the kernels.

    Raises:
        RuntimeError: ``MICA_BACKEND=triton`` demands kernels that this call cannot have.
    """
    backend = requested()
    reason = why_not_kernels(device, rank, *dtypes, backend=backend)
    if reason and backend == "triton":
        raise RuntimeError(f"MICA_BACKEND=triton demands Triton kernels, but there are none here: {reason}.")
    return reason is None
