"""The saved configuration of MiCA adapters of single parameters, in a form that stock PEFT loads.

Stock refuses ``init_lora_weights="mica"`` together with `target_parameters`, although it needs nothing but
plain LoRA to run such an adapter. So the file says plain LoRA, and what it is in ``auto_mapping``, a
dictionary of which stock reads two keys and keeps the others. For a configuration in memory that is no
difference: it says "mica" before and after, and again when it is loaded with this package.
"""

from __future__ import annotations

import copy

from mica.fast.eligibility import requests_mica
from mica.fast.wrapping import around, while_enabled

MARK = "init_lora_weights"  # in `auto_mapping`


@around
def save_config(stock, self, save_directory: str, **kwargs) -> None:
    """Also while the backend is disabled: the file must load."""
    if not (requests_mica(self) and getattr(self, "target_parameters", None)):
        return stock(self, save_directory, **kwargs)
    saved = copy.copy(self)
    saved.init_lora_weights = True
    saved.auto_mapping = {**(self.auto_mapping or {}), MARK: "mica"}
    if kwargs.get("auto_mapping_dict") is not None:  # it takes the place of the other
        kwargs["auto_mapping_dict"] = {**kwargs["auto_mapping_dict"], MARK: "mica"}
    return stock(saved, save_directory, **kwargs)


@while_enabled
def read_config(stock, self, *args, **kwargs) -> None:
    """In place of ``LoraConfig.__post_init__``: a configuration that was saved so is MiCA's again."""
    if isinstance(self.auto_mapping, dict) and self.auto_mapping.get(MARK) == "mica":
        self.init_lora_weights = "mica"
        self.auto_mapping = {key: value for key, value in self.auto_mapping.items() if key != MARK} or None
    stock(self, *args, **kwargs)
