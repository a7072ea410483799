"""The user's settings, in one object that every patched function reads.

The fields of a module-global object change, no methods are swapped: torch.compile guards on the fields, and a
layer with an old bound method (from accelerate's hooks) follows them too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

ON_UNSUITABLE = ("raise", "skip")
COMPUTE_DTYPES = (None, torch.float32)
GATE_UP = ("fused", "halves")


@dataclass
class Settings:
    enabled: bool = False  # written only by `switch` and `blocked`
    compute_dtype: torch.dtype | None = None
    on_unsuitable: str = "raise"
    device: str | torch.device = "auto"
    gate_up: str = "fused"


settings = Settings()

_lock = threading.Lock()
_switched_on = False
_blocks = 0  # how many `blocked` are entered, in all threads


def switch(on: bool) -> None:
    """Turn the backend on or off, outside of `blocked`."""
    global _switched_on
    with _lock:
        _switched_on = on
        settings.enabled = on and not _blocks


@contextmanager
def blocked() -> Iterator[None]:
    """The backend is off while any thread is inside."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(step: int) -> None:
    global _blocks
    with _lock:
        _blocks += step
        settings.enabled = _switched_on and not _blocks


def compute_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Dtype of the low-rank products for activations x; None: that of x."""
    dtype = settings.compute_dtype
    return None if dtype is None else torch.promote_types(dtype, x.dtype)


def change(
    compute_dtype: torch.dtype | None,
    on_unsuitable: str,
    device: str | torch.device,
    gate_up: str,
) -> None:
    """Change all of the user's settings, or none and raise a ValueError."""
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(
            "compute_dtype must be None (adapters compute in the dtype of the activations) or torch.float32 "
            f"(stock PEFT's arithmetic), but it is {compute_dtype!r}."
        )
    if on_unsuitable not in ON_UNSUITABLE:
        raise ValueError(f"on_unsuitable must be one of {ON_UNSUITABLE}, but it is {on_unsuitable!r}.")
    if gate_up not in GATE_UP:
        raise ValueError(f"gate_up must be one of {GATE_UP}, but it is {gate_up!r}.")
    if device != "auto":
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be 'auto' or a torch device, but it is {device!r}.") from error
    settings.compute_dtype, settings.on_unsuitable = compute_dtype, on_unsuitable
    settings.device, settings.gate_up = device, gate_up
