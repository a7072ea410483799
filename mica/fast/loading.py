"""Adapters whose weights come from a file or from other adapters: the solver does not run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from mica.fast.create.solving import NewAdapter, check, initialise
from mica.fast.forward import mixed_batch
from mica.fast.forward.expert_params import is_wrapper
from mica.fast.saving import warn_of_a_lost_mark
from mica.fast.settings import around, while_enabled
from mica.paths import choose

# Beside an adapter on a GGUF file: the folder of the checkpoint that `mica adapt` has made of that file.
BASE = "base"

# Adapters created within `without_solver`, whose B is still 0, each with its layer's key in the model.
Uninitialised = list[tuple[str, NewAdapter]]
_uninitialised: ContextVar[Uninitialised | None] = ContextVar("mica_uninitialised", default=None)


@contextmanager
def without_solver() -> Iterator[Uninitialised]:
    """Within it new adapters keep B = 0 and are listed."""
    outer = _uninitialised.get()
    if outer is not None:
        yield outer
        return
    token = _uninitialised.set([])
    try:
        yield _uninitialised.get()
    finally:
        _uninitialised.reset(token)


def uninitialised() -> Uninitialised | None:
    """The list of `without_solver`, None outside of it."""
    return _uninitialised.get()


@while_enabled
def load(stock, *args, **kwargs):
    """In place of `load_adapter`, and of `from_pretrained`, which calls it."""
    with without_solver() as adapters:
        result = stock(*args, **kwargs)
    missing_keys = getattr(result, "missing_keys", ())
    _initialise_missing(_by_module(adapters, args[0]) if missing_keys else adapters, missing_keys)
    adapters.clear()
    if isinstance(args[0], nn.Module):  # `from_pretrained` has the class, and calls `load_adapter`
        name = inspect.signature(stock).bind(*args, **kwargs).arguments.get("adapter_name")
        warn_of_a_lost_mark(args[0], name or "default")
    return result


def _by_module(adapters: Uninitialised, model: nn.Module) -> Uninitialised:
    """With the keys of wrappers of parameters, nested ones too: PEFT creates them by the parameter's name."""
    names = {module: name for name, module in model.named_modules() if is_wrapper(module)}
    return [(names.get(adapter.layer, key), adapter) for key, adapter in adapters]


def _initialise_missing(adapters: Uninitialised, missing_keys) -> None:
    """A layer whose B the checkpoint lacks (PEFT has warned) gets the basis of a new adapter.

    PEFT's keys have a prefix before the layer's: of the layers whose key ends one, the longest is meant.
    """
    missing = {}
    for missing_key in missing_keys:
        matches = [(key, adapter) for key, adapter in adapters if _is_lora_b(f".{missing_key}", key, adapter)]
        if matches:
            key, adapter = max(matches, key=lambda match: len(match[0]))
            check(adapter)
            missing[key] = adapter
    initialise(list(missing.values()))


def _is_lora_b(missing_key: str, key: str, adapter: NewAdapter) -> bool:
    names = (f".{key}.{factor}.{adapter.adapter_name}" for factor in ("lora_B", "lora_embedding_B"))
    return missing_key.removesuffix(".weight").endswith(tuple(names))


@while_enabled
def find_base(stock, cls, folder, subfolder=None, **kwargs):
    """In place of ``PeftConfig.from_pretrained``: a base that lies beside the adapter is found there.

    PEFT takes a relative path from the working directory, so the adapter names its base by the absolute path
    that it had; since then the folder of both may have been moved, and another run's be in its place.
    """
    config = stock(cls, folder, subfolder, **kwargs)
    recorded = config.base_model_name_or_path
    if recorded and os.path.isabs(recorded) and os.path.basename(recorded) == BASE:
        own = os.path.abspath(os.path.join(folder, subfolder or ""))
        if os.path.basename(own).startswith("checkpoint-"):
            own = os.path.dirname(own)
        if os.path.isfile(os.path.join(own, BASE, "config.json")):
            config.base_model_name_or_path = os.path.join(own, BASE)
    return config


@while_enabled
def add_weighted_adapter(stock, self, adapters, weights, adapter_name, *args, **kwargs) -> None:
    """An error after the adapter's creation would leave one with B = 0, which nothing could train."""
    is_new = adapter_name not in self.peft_config
    try:
        with without_solver():
            stock(self, adapters, weights, adapter_name, *args, **kwargs)
    except Exception:
        if is_new and adapter_name in self.peft_config:
            self.delete_adapter(adapter_name)
        raise


@around
def hotswap_adapter_from_state_dict(stock, *args, **kwargs):
    """PEFT writes the new adapter through ``.data``, which PyTorch does not count as a change of a tensor.

    So whatever was derived from the old B (`mica.kernels.prepared_b`, `forward.mixed_batch`) is dropped.
    """
    try:
        return stock(*args, **kwargs)
    finally:  # also after an error: a part of the weights may be new
        choose.clear_prepared()
        mixed_batch.clear()
