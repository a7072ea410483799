"""The saved configuration of MiCA adapters of single parameters, in a form that stock PEFT loads.

Stock refuses ``init_lora_weights="mica"`` together with `target_parameters`, although it needs nothing but
plain LoRA to run such an adapter. So the file says plain LoRA, written by PEFT "0.21.2+mica": stock keeps a
loaded configuration's ``peft_version`` and parses it for OFT only, as a version of which "+mica" is a valid
local part. A configuration in memory says "mica" before and after it is saved, and again when it is loaded
with this package.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from mica.fast.forward.decide import is_dense
from mica.fast.forward.eligibility import is_mica, requests_mica
from mica.fast.forward.expert_params import is_wrapper, lora_B_of
from mica.fast.settings import around, while_enabled

_MARK = "+mica"  # at the end of `peft_version`


@around
def save_config(stock, self, save_directory: str, **kwargs) -> None:
    """Also while the backend is disabled: the file must load."""
    if not (requests_mica(self) and getattr(self, "target_parameters", None)):
        return stock(self, save_directory, **kwargs)
    saved = copy.copy(self)
    saved.init_lora_weights = True
    saved.peft_version = f"{self.peft_version}{_MARK}"
    return stock(saved, save_directory, **kwargs)


@while_enabled
def read_config(stock, self, *args, **kwargs) -> None:
    """In place of ``LoraConfig.__post_init__``: a configuration with the mark is MiCA's again."""
    version = self.peft_version or ""
    if version.endswith(_MARK):
        self.init_lora_weights = "mica"
        self.peft_version = version.removesuffix(_MARK)
    stock(self, *args, **kwargs)


def warn_of_a_lost_mark(model: nn.Module, adapter: str) -> None:
    """If an adapter of parameters was loaded as plain LoRA, but has MiCA's B: it would be trained."""
    layers = []
    for module in model.modules():
        if is_wrapper(module) and adapter in module.lora_A and not is_mica(module, adapter):
            layers.append(module)
    if layers and all(_is_orthonormal(lora_B_of(layer, adapter)) for layer in layers):
        warnings.warn(
            f"adapter {adapter!r} was loaded as LoRA, but each B of its target_parameters is orthonormal, as "
            "MiCA's are: its file has probably lost the mark of MiCA, and B would be trained. To load it as "
            f"MiCA, append {_MARK!r} to the peft_version in its adapter_config.json.",
            stacklevel=4,
        )


def _is_orthonormal(lora_B: Tensor) -> bool:
    """Whether B, (E, out_features, r), is orthonormal within the rounding of bf16, in three experts."""
    if not is_dense(lora_B) or lora_B.is_meta:
        return False
    some = lora_B.detach()[[0, len(lora_B) // 2, -1]].float()
    gram = some.mT @ some
    return (gram - torch.eye(gram.shape[-1], device=gram.device)).abs().max().item() <= 2**-7
