"""Code of other modules, and what ms-swift 4.6 does to PEFT as it is imported (its tuners/peft.py)."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType, ModuleType
from unittest.mock import patch

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel


def of_module(name: str, source: str) -> dict:
    """What the source defines as the text of a module of that name."""
    scope = ModuleType(name).__dict__ | {"torch": torch}
    exec(source, scope)
    return scope


@dataclass
class LoraConfig(peft.LoraConfig):
    lora_dtype: str | None = None


def _on_its_device(self, *args, **kwargs):
    x, *others = args
    return self.forward_origin(x.to(self.weight.device), *others, **kwargs)


def _init(self, model, config, *args, **kwargs):
    self.__init_origin__(model, config, *args, **kwargs)
    (only,) = config.values()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers if hasattr(only, "lora_dtype") else ():
        for factor in [*layer.lora_A.values(), *layer.lora_B.values()]:
            factor.forward_origin = factor.forward
            factor.forward = MethodType(_on_its_device, factor)


def _load_adapter(self, model_id, *args, **kwargs):
    return self.load_adapter_origin(model_id, *args, **kwargs)


@contextmanager
def swift_imported():
    """Within it functions of PEFT are wrapped, one of them with a signature that is not PEFT's.

    Their own are there under the names that swift gives them.
    """
    load_adapter = PeftModel.load_adapter
    with (
        patch.multiple(LoraModel, create=True, __init__=_init, __init_origin__=LoraModel.__init__),
        patch.multiple(PeftModel, create=True, load_adapter=_load_adapter, load_adapter_origin=load_adapter),
    ):
        yield
