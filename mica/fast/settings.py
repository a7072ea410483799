"""The user's settings, in one object that every patched function reads.

The fields of a module-global object change, no methods are swapped: torch.compile guards on the fields, and a
layer with an old bound method (from accelerate's hooks) follows them too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mica.ops import recompute

Recompute = Literal["norms", "activations"]
AUTO = "auto"
ALLOWED = {
    "compute_dtype": (None, torch.float32),
    "recompute": get_args(Recompute),
    "lora": (False, True),
}


@dataclass
class Settings:
    enabled: bool = False  # written only by `switch`
    compute_dtype: torch.dtype | None = None
    device: str | torch.device = "auto"
    recompute: Recompute = "norms"
    lora: bool = False
    memory: float | str | None = None


settings = Settings()

_lock = threading.Lock()
_switched_on = False
_blocks = 0  # how many `mica.fast.disabled` are entered, in all threads


def switch(on: bool | None = None, *, blocks: int = 0) -> None:
    """Turn the backend on or off.

    Args:
        on: Whether it is on outside of such blocks; None leaves that as it is.
        blocks: 1 where a block is entered in which it is off, -1 where one is left.
    """
    global _switched_on, _blocks
    with _lock:
        if on is not None:
            _switched_on = on
        _blocks += blocks
        settings.enabled = _switched_on and not _blocks


def compute_dtype(dtype: torch.dtype, factor_dtype: torch.dtype) -> torch.dtype | None:
    """Dtype of the low-rank products for activations and factors of these dtypes; None: the activations'.

    In fp16 h and its gradient overflow beyond 65504, where stock PEFT, which multiplies by fp32 masters in
    fp32, has finite numbers; a loss scale multiplies dy.
    """
    if dtype == torch.float16 and factor_dtype == torch.float32:
        return torch.float32
    if settings.compute_dtype is None:
        return None
    return torch.promote_types(settings.compute_dtype, dtype)


def change(**values) -> None:
    """Change these settings, or none and raise a ValueError."""
    for name, value in values.items():
        if name == "device":
            _check_device(value)
        elif name == "memory":
            _check_memory(value)
        elif value not in ALLOWED[name]:
            raise ValueError(f"{name} must be one of {ALLOWED[name]}, but it is {value!r}.")
    vars(settings).update(values)
    recompute.recompute_norms(settings.recompute == "norms")


def _check_memory(value: object) -> None:
    """Raise ValueError if this is no budget."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value not in (None, AUTO) and not (is_number and 0 < value < math.inf):
        raise ValueError(f"memory must be a number of GiB above 0, 'auto' or None, but it is {value!r}.")


def _check_device(requested: str | torch.device) -> None:
    """Raise ValueError if PyTorch cannot compute on this device here."""
    if requested == "auto":
        return
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto' or a torch device, but it is {requested!r}.") from error
    count = 0
    with suppress(RuntimeError):  # this build of PyTorch has no module for the type
        count = torch.get_device_module(device).device_count()  # initialises none: the process may still fork
    if (device.index or 0) >= count:
        raise ValueError(
            f"device must be 'auto' or one that this process can use, but it is {str(device)!r}, and PyTorch "
            f"sees {count} devices of type {device.type!r}."
        )


# ---------------------------------------------------------------------------------------------------
# functions that replace one of PEFT's, and get it as their first argument
# ---------------------------------------------------------------------------------------------------


def around(function: Callable, is_on: Callable[[], bool] = lambda: True) -> Callable:
    """``function(stock, *args, **kwargs)`` as a patch: stock -> its replacement."""

    def patch(stock):
        def replacement(*args, **kwargs):
            if is_on():
                return function(stock, *args, **kwargs)
            return stock(*args, **kwargs)

        return replacement

    return patch


def while_enabled(function: Callable) -> Callable:
    """`around`, but stock alone while the backend is disabled."""
    return around(function, lambda: settings.enabled)
