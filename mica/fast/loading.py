"""Adapters whose weights come from a file or from other adapters: no solver runs for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mica import backend
from mica.fast import mixed_batch
from mica.fast.bases import NewAdapter, check, initialise
from mica.fast.wrapping import around, while_enabled

# The adapters that were created within `without_solver`, whose B is 0, each with the key of its layer.
Uninitialised = list[tuple[str, NewAdapter]]
_uninitialised: ContextVar[Uninitialised | None] = ContextVar("mica_uninitialised", default=None)


@contextmanager
def without_solver() -> Iterator[Uninitialised]:
    """New adapters are left with B = 0 and listed, by the key of their layer in the model."""
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
    """`load_adapter`, and `from_pretrained`, which calls it."""
    with without_solver() as waiting:
        result = stock(*args, **kwargs)
    _initialise_missing(waiting, getattr(result, "missing_keys", ()))
    return result


def _initialise_missing(waiting: Uninitialised, missing_keys) -> None:
    """A checkpoint without this layer's B (PEFT has warned): it gets the basis it would have had."""
    missing = []
    for key, new in waiting:
        names = (f"{key}.lora_B.{new.adapter_name}", f"{key}.lora_embedding_B.{new.adapter_name}")
        if any(name in missing_key for missing_key in missing_keys for name in names):
            check(new)
            missing.append(new)
    waiting.clear()
    initialise(missing)


@while_enabled
def add_weighted_adapter(stock, self, adapters, weights, adapter_name, *args, **kwargs) -> None:
    """An error after the adapter has been created would leave one whose B is 0: nothing could train it."""
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

    So whatever was made from the old B (`mica.kernels.prepared`, `mica.fast.mixed_batch`) is made again.
    """
    try:
        return stock(*args, **kwargs)
    finally:  # also after an error: a part of the weights may be new
        backend.forget_prepared()
        mixed_batch.forget()
