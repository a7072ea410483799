"""The ranks and dtypes that kernels take, and checks shared with the operators. Importable without Triton."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

MAX_RANK = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def padded_columns(rank: int) -> int:
    """The width of h, g and prepared B in memory: the rank rounded up to a multiple of 16.

    Narrower rows would be loaded number by number.
    """
    return (rank + 15) // 16 * 16


def are_narrow(*row_strides: int) -> bool:
    """Whether rows of these strides, in elements, are loaded number by number.

    All that Triton knows of a stride is whether 16 divides it. Where it does not, nothing is loaded ahead
    either, and a kernel takes 4 to 8 times as long (modelled).
    """
    return math.gcd(16, *row_strides) != 16


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors, given by their names in messages, lie on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all operands must be on one device, but found {places}.")


def dropout(dropout_p: float, seed: Tensor | None) -> None:
    """Raises ValueError unless 0 ≤ ``dropout_p`` < 1, with an int64 ``seed`` of shape (1,) if it is not 0."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, but it is {dropout_p}.")
    if dropout_p > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.shape != (1,)):
        kind = "None" if seed is None else f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise ValueError(f"seed must be an int64 tensor of shape (1,) where dropout_p > 0, but it is {kind}.")


def is_tracked(frozen: Tensor) -> bool:
    """Whether a change of this parameter shows in its version, so that what was made of it may be kept.

    Writes through ``.data`` never do. Nor does gathering a sharded parameter into the storage that it had
    before: FSDP2's modules are in a table of PyTorch (if there is one, nothing in the process is tracked),
    FSDP1's parameters are views, and ZeRO's have an id. Under DDP every write counts. Inference tensors have
    no version.
    """
    sharded = sys.modules.get("torch.distributed._composable_state")
    return not (
        frozen.is_inference()
        or frozen._base is not None
        or hasattr(frozen, "ds_id")
        or hasattr(frozen, "_is_flat_param")
        or (sharded is not None and getattr(sharded, "_module_state_mapping", True))
    )
