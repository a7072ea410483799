"""The saved configuration of MiCA adapters of single parameters, in a form that stock PEFT loads.

Stock refuses ``init_lora_weights="mica"`` together with `target_parameters`, although it needs nothing but
plain LoRA to run such an adapter. So the file says plain LoRA, written by PEFT "0.21.2+mica": stock keeps a
loaded configuration's ``peft_version`` and reads it for OFT only, as a version, of which "+mica" is a valid
local part. For a configuration in memory that is no difference: it says "mica" before and after, and again
when it is loaded with this package.
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
# Of older files, in `auto_mapping`, which stock writes anew where there is no task_type.
_OLD_MARK = {"init_lora_weights": "mica"}


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
    """In place of ``LoraConfig.__post_init__``: a configuration that was saved so is MiCA's again."""
    version, mapping = self.peft_version or "", self.auto_mapping
    if version.endswith(_MARK):
        self.init_lora_weights, self.peft_version = "mica", version.removesuffix(_MARK)
    elif isinstance(mapping, dict) and _OLD_MARK.items() <= mapping.items():
        self.init_lora_weights = "mica"
        self.auto_mapping = {key: value for key, value in mapping.items() if key not in _OLD_MARK} or None
    stock(self, *args, **kwargs)


def warn_of_a_lost_mark(model: nn.Module, adapter: str) -> None:
    """If an adapter of parameters was loaded as plain LoRA, but has MiCA's B: it would be trained."""
    layers = [module for module in model.modules() if is_wrapper(module) and adapter in module.lora_A]
    layers = [layer for layer in layers if not is_mica(layer, adapter)]
    if layers and all(_is_orthonormal(lora_B_of(layer, adapter)) for layer in layers):
        warnings.warn(
            f"adapter {adapter!r} was loaded as LoRA, but each B of its target_parameters is orthonormal, as "
            "MiCA's are: its file has probably lost the mark of MiCA, and B would be trained. To load it as "
            f"MiCA, append {_MARK!r} to the peft_version in its adapter_config.json.",
            stacklevel=4,
        )


def _is_orthonormal(lora_B: Tensor) -> bool:
    """Whether B of three of the experts (E, out_features, r) is, within the rounding of bf16."""
    if not is_dense(lora_B) or lora_B.is_meta:
        return False
    some = lora_B.detach()[[0, len(lora_B) // 2, -1]].float()
    gram = some.mT @ some
    return (gram - torch.eye(gram.shape[-1], device=gram.device)).abs().max().item() <= 2**-7
