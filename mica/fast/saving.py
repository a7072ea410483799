"""The saved configuration of MiCA adapters of single parameters, in a form that stock PEFT loads.

Stock refuses ``init_lora_weights="mica"`` together with `target_parameters`, although it needs nothing but
plain LoRA to run such an adapter. So the file says plain LoRA, written by PEFT "0.21.2+mica": stock keeps a
loaded configuration's ``peft_version`` and parses it for OFT only, as a version of which "+mica" is a valid
local part. A configuration in memory says "mica" before and after it is saved, and again when it is loaded
with this package.
"""

from __future__ import annotations

import copy

from mica.fast.forward.eligibility import requests_mica
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
