"""Whether Triton kernels can run on a device. Triton is imported in this folder and nowhere else."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import torch

# Triton's own minimum: compute capability 8.0 (NVIDIA Ampere) is the first with bf16 matrix instructions.
MINIMUM_CAPABILITY = (8, 0)


def triton_version() -> str | None:
    """The installed version of Triton, found without importing it; None where it is not installed."""
    return version("triton") if importlib.util.find_spec("triton") else None


def why_unavailable(device: torch.device) -> str | None:
    """None if Triton kernels can run on the device, else the reason in words."""
    if device.type != "cuda":  # ROCm builds of PyTorch call their devices "cuda" too
        return f"no Triton kernels for devices of type {device.type!r}"
    if triton_version() is None:
        return "Triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
