"""What ms-swift 4.6 does to PEFT as it is imported (its tuners/peft.py), as far as its recipe undoes it."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from unittest.mock import patch

import peft
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel


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


def _create_and_replace(self, peft_config, adapter_name, target, *args, **kwargs):
    return self._create_and_replace_origin(peft_config, adapter_name, target, *args, **kwargs)


def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
    return self._cast_adapter_dtype_origin(adapter_name, autocast_adapter_dtype)


def _load_adapter(self, model_id, *args, **kwargs):
    return self.load_adapter_origin(model_id, *args, **kwargs)


def _wrapped(owner: type, **functions):
    """Within it these are the owner's; its own are there under the names that swift gives them."""
    names = {name: f"{name}_origin" for name in functions} | {"__init__": "__init_origin__"}
    origins = {names[name]: getattr(owner, name) for name in functions}
    return patch.multiple(owner, create=True, **origins, **functions)


@contextmanager
def swift_imported():
    """Within it PEFT's functions are wrapped, by signatures of swift's own."""
    with (
        _wrapped(
            LoraModel,
            __init__=_init,
            _create_and_replace=_create_and_replace,
            _cast_adapter_dtype=_cast_adapter_dtype,
        ),
        _wrapped(PeftModel, load_adapter=_load_adapter),
    ):
        yield
