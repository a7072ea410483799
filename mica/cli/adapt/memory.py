"""``--memory``: gradient checkpointing of the fewest layers with which a step fits a device."""

from argparse import Namespace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from mica.cli.adapt import base
from mica.cli.adapt.methods import METHODS
from mica.cli.adapt.options import AUTO
from mica.cli.fits import GIB, Setup, count_step
from mica.cli.loading import find_device
from mica.errors import UsageError

_USABLE = 0.95  # of a GPU: its allocator rounds, and workspaces are not counted


class Plan(NamedTuple):
    """Which layers are checkpointed: the first ``number`` of ``layers``.

    ``total_bytes``: what a step then takes, with weights and AdamW's states.
    """

    number: int
    layers: int
    total_bytes: int

    def __str__(self) -> str:
        total = self.total_bytes / GIB
        return f"checkpointing {self.number} of {self.layers} layers: a step takes {total:.2f} GiB (counted)"


def plan(args: Namespace, config: PreTrainedConfig | None) -> Plan:
    """The fewest layers for ``args.memory``, as `mica fits` counts: without weights.

    ``config``: that of the base, None for a GGUF file.

    Raises UsageError if all layers are too few, or what a step takes is not known without values.
    """
    if args.train_embeddings:
        raise UsageError("--memory: trained embeddings are not counted; use --gradient-checkpointing")
    memory = _of_gpu() if args.memory == AUTO else args.memory
    counted = count_step(_setup(args), _options(args, config))
    layers = len(counted.kinds)
    number, total = counted.fewest(memory)
    if number is None:
        least = counted.row(layers)["total_bytes"] / GIB
        raise UsageError(
            f"--memory {args.memory}: a step takes {least:.2f} GiB even with all {layers} layers "
            "checkpointed; lower --sequence-length or --batch-size"
        )
    return Plan(number, layers, total)


def _of_gpu() -> float:
    """GiB that this process may use."""
    device = find_device()
    if device.type != "cuda":
        raise UsageError("--memory auto: there is no GPU to ask; give GiB")
    free, _ = torch.cuda.mem_get_info(device)
    return _USABLE * free / GIB


def _setup(args: Namespace) -> Setup:
    return Setup(args.method, METHODS[args.method].config, is_here=True)


def _options(args: Namespace, config: PreTrainedConfig | None) -> Namespace:
    """Those of `mica fits`, for the dtype that the base is going to have."""
    dtype = args.dtype
    if dtype == "auto" and getattr(config, "quantization_config", None) is None:
        dtype = base.own_dtype(config, find_device())
    same = ("model", "trust_remote_code", "batch_size", "rank", "dropout", "target_modules")
    return Namespace(
        **{name: getattr(args, name) for name in same},
        tokens=args.sequence_length,
        bits=base.BITS.get(args.quantize),
        loss="logits",
        dtype=dtype,
    )
