"""Whether Triton kernels can run on a device. Triton is imported only in this folder."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch

# Triton's own minimum: compute capability 8.0 (NVIDIA Ampere) is the first with bf16 matrix instructions.
MINIMUM_CAPABILITY = (8, 0)
ON_A_CPU = "on a CPU PyTorch's operators are the fast path"


def raw_variable(name: str) -> Callable[[], object]:
    """A function that reads an environment variable in 0.1 µs, without decoding: for comparisons only.

    `os.environ.get` takes 0.7 µs, most of it for decoding.
    """
    has_raw_values = isinstance(getattr(os.environ, "_data", None), dict)
    if not has_raw_values:
        return functools.partial(os.environ.get, name)

    key = os.environ.encodekey(name)
    # `_data` is looked up at each call: `datasets` leaves another os.environ behind after a map by processes
    return lambda: os.environ._data.get(key)


@functools.cache
def triton_version() -> str | None:
    """The installed version of Triton, found without importing it; None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:  # PyTorch's ROCm wheels ship it under another name
        distributions = packages_distributions().get("triton")
    return version(distributions[0]) if distributions else "unknown"


def is_interpreting() -> bool:
    """Whether TRITON_INTERPRET, set to any of the words that Triton takes for yes, runs kernels in Python."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_unavailable(device: torch.device) -> str | None:
    """None if Triton kernels can run on the device, else the reason in words."""
    if device.type == "cpu" and not is_interpreting():
        return ON_A_CPU
    if triton_version() is None:
        return "Triton is not installed"
    if is_interpreting():
        return None
    if device.type != "cuda":  # ROCm builds of PyTorch call their devices "cuda" too
        return f"no Triton kernels for devices of type {device.type!r}"
    if device not in tried:
        if torch.cuda.is_current_stream_capturing():
            return (
                "no kernel was tried on it before the capture of this CUDA graph: run the model once before"
            )
        tried[device] = _why_not_device(device)
    return tried[device]


def is_settled(device: torch.device) -> bool:
    """Whether the result of `why_unavailable` is final: during a capture a device is not tried."""
    return device.type != "cuda" or device in tried or is_interpreting() or triton_version() is None


# What each device's trial found. One trial per process is enough: an index refers to one device throughout.
tried: dict[torch.device, str | None] = {}


def _why_not_device(device: torch.device) -> str | None:
    """None if a small kernel compiles, runs and is right on this device."""
    if torch.version.hip is not None:
        return "no Triton kernels for ROCm"
    if torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        return trial(device)
    except torch.OutOfMemoryError:  # says nothing about kernels, and the result would be kept
        raise
    except Exception as error:  # whatever it is (no C compiler, no driver, …), PyTorch runs instead
        text = str(error).strip().partition("\n")[0]
        return f"a trial kernel failed on it: {type(error).__name__}: {text}"


def trial(device: torch.device) -> str | None:
    """Run a small kernel; None if its result is right, else the reason in words."""
    from mica.kernels.down_projection import down_projection

    with torch.cuda.device(device), torch.no_grad():
        numbers = torch.arange(64 * 256, dtype=torch.int64, device=device).remainder(7).sub(3)
        x = numbers.view(64, 256).bfloat16()
        factor = numbers[: 16 * 256].view(16, 256).bfloat16()
        expected = (x.double() @ factor.double().t()).bfloat16()
        if not torch.equal(down_projection(x, factor), expected):
            return "a trial kernel gave a wrong result on it"
    return None
