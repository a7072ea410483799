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
from mica.fast.saving import warn_of_a_lost_mark
from mica.fast.settings import around, while_enabled
from mica.paths import choose

# Beside an adapter on a GGUF file: the folder of the checkpoint that `mica adapt` has made of that file.
BASE = "base"

# Adapters created within `without_solver`, whose B is still 0; None outside of it.
uninitialised: ContextVar[list[NewAdapter] | None] = ContextVar("mica_uninitialised", default=None)


@contextmanager
def without_solver() -> Iterator[list[NewAdapter]]:
    """Within it new adapters keep B = 0 and are listed."""
    outer = uninitialised.get()
    token = uninitialised.set([] if outer is None else outer)
    try:
        yield uninitialised.get()
    finally:
        uninitialised.reset(token)


@while_enabled
def load(stock, *args, **kwargs):
    """In place of `load_adapter`, and of `from_pretrained`, which calls it.

    A layer whose B the checkpoint lacks (PEFT has warned) gets the basis of a new adapter.
    """
    model = args[0]  # of `from_pretrained`, which calls `load_adapter`, the class
    name = inspect.signature(stock).bind(*args, **kwargs).arguments.get("adapter_name") or "default"
    with without_solver() as adapters, _whole(model, name, adapters):
        result = stock(*args, **kwargs)
        missing = {*getattr(result, "missing_keys", ())}  # transformers has more that it did not load
        if missing := missing | {key for key, *_ in getattr(result, "mismatched_keys", ())}:
            parameters = model.named_parameters(remove_duplicate=False)
            lacking = {id(parameter) for key, parameter in parameters if key in missing}
            lacking = [adapter for adapter in adapters if id(adapter.lora_B) in lacking]
            for adapter in lacking:
                check(adapter)
            initialise(lacking)
        for adapter in adapters:  # transformers' loader makes parameters that require a gradient
            adapter.lora_B.requires_grad_(False)
    adapters.clear()
    if isinstance(model, nn.Module):
        warn_of_a_lost_mark(model, name)
    return result


@contextmanager
def _whole(model, name: str, created: list[NewAdapter]) -> Iterator[None]:
    """An error after the adapter's creation would leave one with B = 0, which nothing could train."""
    is_new = not _has(model, name)
    try:
        yield
    except Exception:
        if created and is_new and _has(model, name):
            model.delete_adapter(name)
        raise


def _has(model, name: str) -> bool:
    return isinstance(model, nn.Module) and name in getattr(model, "peft_config", ())


@while_enabled
def find_base(stock, cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
    """In place of ``PeftConfig.from_pretrained``: a base that lies beside the adapter is found there.

    PEFT takes a relative path from the working directory, so the adapter names its base by the absolute path
    that it had; since then the folder of both may have been moved, and another run's be in its place.
    """
    config = stock(cls, pretrained_model_name_or_path, subfolder, **kwargs)
    recorded = config.base_model_name_or_path
    if recorded and os.path.isabs(recorded) and os.path.basename(recorded) == BASE:
        own = os.path.abspath(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        if os.path.basename(own).startswith("checkpoint-"):
            own = os.path.dirname(own)
        if os.path.isfile(os.path.join(own, BASE, "config.json")):
            config.base_model_name_or_path = os.path.join(own, BASE)
    return config


@while_enabled
def add_weighted_adapter(stock, self, adapters, weights, adapter_name, *args, **kwargs) -> None:
    with without_solver() as created, _whole(self, adapter_name, created):
        stock(self, adapters, weights, adapter_name, *args, **kwargs)


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
