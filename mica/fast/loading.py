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
    with without_solver() as adapters:
        result = stock(*args, **kwargs)
    if missing := set(getattr(result, "missing_keys", ())):
        parameters = args[0].named_parameters(remove_duplicate=False)
        lacking = {id(parameter) for name, parameter in parameters if name in missing}
        lacking = [adapter for adapter in adapters if id(adapter.lora_B) in lacking]
        for adapter in lacking:
            check(adapter)
        initialise(lacking)
    adapters.clear()
    if isinstance(args[0], nn.Module):  # `from_pretrained` has the class, and calls `load_adapter`
        name = inspect.signature(stock).bind(*args, **kwargs).arguments.get("adapter_name")
        warn_of_a_lost_mark(args[0], name or "default")
    return result


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
