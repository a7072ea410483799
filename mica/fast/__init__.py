"""The backend of PEFT's MiCA and LoRA. ``import mica.fast`` enables it for MiCA; nothing else has to change.

    import mica.fast
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(init_lora_weights="mica", r=16, target_modules="all-linear"))

After ``mica.fast.enable(lora=True)`` plain LoRA runs on it, too. Where the backend does not apply, PEFT's own
code runs; ``mica.fast.explain(model)`` shows where and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mica.fast import checkpointing, patching
from mica.fast import settings as _settings
from mica.fast.caches import clear_caches
from mica.fast.explain import Explanation, explain
from mica.fast.merge.report import MergeReport
from mica.fast.merge.reporting import merge_report
from mica.ops import call_counts

__all__ = [
    "Explanation",
    "MergeReport",
    "call_counts",
    "clear_caches",
    "disable",
    "disabled",
    "enable",
    "explain",
    "is_enabled",
    "merge_report",
    "uninstall",
]


_AS_IT_IS: Any = ...  # a setting that `enable` leaves alone


def enable(
    *,
    lora: bool = _AS_IT_IS,
    compute_dtype: torch.dtype | None = _AS_IT_IS,
    device: str | torch.device = _AS_IT_IS,
    recompute: _settings.Recompute = _AS_IT_IS,
    memory: float | str | None = _AS_IT_IS,
) -> None:
    """Run adapters on this backend, as the import does for MiCA. A setting that is not given stays.

    Args:
        lora: Whether plain LoRA and DoRA run on this backend, and are merged by it, too: adapters of linear
            layers without another variant of PEFT's (aLoRA, …), which may train lora_A, lora_B or both. It is
            False at first.
        compute_dtype: The dtype of the low-rank products. None, which it is at first, means that of the
            activations, so a bf16 model's adapters compute in bf16 from their fp32 master weights (a few
            tokens on a CPU in fp32, where that is faster), but in fp32 over fp16 activations, outside
            autocast, whose gradients could overflow. ``torch.float32`` gives stock PEFT's products over a
            16-bit base, still without its fp32 copy of the activations.
        device: Where the initialisation solves weights that are on the CPU. "auto", which it is at first,
            means on an accelerator, if there is one with enough memory, else on the CPU; otherwise it is a
            device. Weights on an accelerator are solved there.
        recompute: What the backward computes again instead of keeping it. "activations" means the x of a
            layer that is act(G)·U or act(G). "norms", which it is at first, means also the output of an RMS
            norm, once for all layers that share it, and the 32-bit copy of its 16-bit input. The bits of the
            gradients are the same.
        memory: GiB of the device that a step may take in all: weights, adapter, gradients, an optimizer's
            states, activations and loss. "auto" means what is free there whenever a batch begins, less 5 %
            of the device. Where transformers' gradient checkpointing is on, each batch then checkpoints only
            as many layers as it needs to fit, and losses and gradients are the same to the bit. None, which
            it is at first, leaves all as they are set. See `mica.fast.checkpointing`.

    Raises:
        ValueError: A value is not one of these, or it is a device that this process does not have.
    """
    given = {
        "lora": lora,
        "compute_dtype": compute_dtype,
        "device": device,
        "recompute": recompute,
        "memory": memory,
    }
    _settings.change(**{name: value for name, value in given.items() if value is not _AS_IT_IS})
    _settings.switch(patching.install())
    checkpointing.install()


def disable() -> None:
    """Run PEFT's own code, as if this package had not been imported; `enable` undoes it."""
    _settings.switch(False)


def is_enabled() -> bool:
    """Whether the backend is on at this moment, in this process."""
    return _settings.settings.enabled


@contextmanager
def disabled() -> Iterator[None]:
    """PEFT's own code while any thread is inside such a ``with`` block; the settings are kept.

    Blocks nest, in one thread and across threads. They apply to the whole process: PyTorch runs a device's
    backward, and with it the recomputation of a checkpointed forward, in other threads, as `nn.DataParallel`
    does with forwards. A forward and its recomputation must run the same code: where gradients
    are checkpointed, ``loss.backward()`` belongs in the block in which the forward ran.

    `enable` and `disable` inside a block take effect when the last block is left.
    """
    _settings.switch(blocks=1)
    try:
        yield
    finally:
        _settings.switch(blocks=-1)


def uninstall() -> None:
    """Give PEFT all its functions back, the very same objects: stock PEFT, bit for bit."""
    _settings.switch(False)
    patching.uninstall()
    checkpointing.uninstall()


enable()
