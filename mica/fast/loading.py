"""Adapters whose weights come from a file or from other adapters: the solver does not run."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from peft.tuners import lora
from torch import Tensor, nn

from mica.fast.caches import clear_caches
from mica.fast.create.solving import NewAdapter, check, initialise
from mica.fast.forward.eligibility import is_mica
from mica.fast.settings import around, settings, while_enabled

# Beside an adapter on a GGUF file: the folder of the checkpoint that `mica adapt` has made of that file.
BASE = "base"

# Adapters created within `without_solver`, whose B is still 0; None outside of it.
uninitialised: ContextVar[list[NewAdapter] | None] = ContextVar("mica_uninitialised", default=None)


@contextmanager
def without_solver() -> Iterator[list[NewAdapter]]:
    """Within it new adapters keep B = 0 and are listed."""
    adapters = uninitialised.get()
    if adapters is None:
        adapters = []
    token = uninitialised.set(adapters)
    try:
        yield adapters
    finally:
        uninitialised.reset(token)


@while_enabled
def load(stock, *args, **kwargs):
    """In place of `load_adapter`, and of `from_pretrained`, which calls it.

    A layer whose B the checkpoint lacks gets the basis of a new adapter, also with ``low_cpu_mem_usage``.
    """
    model = args[0]  # the class for `from_pretrained`, which calls `load_adapter`
    name = inspect.signature(stock).bind(*args, **kwargs).arguments.get("adapter_name") or "default"
    with without_solver() as adapters, _whole(model, name, adapters):
        result = stock(*args, **kwargs)
        missing = set(getattr(result, "missing_keys", ()))
        for key, *_ in getattr(result, "mismatched_keys", ()):  # which transformers did not load either
            missing.add(key)
        if missing:
            _start_without_b(model, name, adapters, missing, keeps_b=False)
            for adapter in adapters:
                adapter.leave_meta_device()
        for adapter in adapters:  # transformers' loader makes parameters that require a gradient
            adapter.lora_B.requires_grad_(False)
    adapters.clear()
    return result


@while_enabled
def set_state_dict(stock, model, peft_model_state_dict, adapter_name="default", *args, **kwargs):
    """In place of `set_peft_model_state_dict`, for an adapter that exists already, as in a resumed training.

    Where the state dict has no B, the layer keeps its own; on the meta device there is none to keep. Layers
    that got the adapter in the present `load` are left to that.
    """
    result = stock(model, peft_model_state_dict, adapter_name, *args, **kwargs)
    created = {adapter.layer for adapter in uninitialised.get() or ()}
    adapters = [
        NewAdapter(name, layer, adapter_name)
        for name, layer in model.named_modules()
        if is_mica(layer, adapter_name) and layer not in created
    ]

    _start_without_b(model, adapter_name, adapters, set(result.missing_keys), keeps_b=True)
    return result


def _start_without_b(
    model: nn.Module, name: str, adapters: list[NewAdapter], missing: set[str], keeps_b: bool
) -> None:
    """Give those whose B is ``missing`` the B of a new adapter, and A = 0 where A has no values either.

    ``keeps_b``: only where B has no values either. Parameters are compared by identity: in PEFT's nested
    wrappers one has several names. Which B an A was trained with cannot be seen, so where A was loaded there
    is a warning; the solvers' bases agree up to sign and rotation.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    lacking = {id(parameter) for key, parameter in parameters if key in missing}
    without_b = [adapter for adapter in adapters if id(adapter.lora_B) in lacking]
    orphaned = [adapter.name for adapter in without_b if id(adapter.lora_A) not in lacking]
    anew = [adapter for adapter in without_b if not keeps_b or adapter.lora_B.is_meta]
    for adapter in anew:
        adapter.leave_meta_device()
        check(adapter)
    initialise(anew)
    if not orphaned:
        return
    outcome = "these layers keep the B that they had"
    if anew:
        outcome = "B was computed anew from the base weights"
    others = f" and {len(orphaned) - 1} more layers" if len(orphaned) > 1 else ""
    warnings.warn(
        f"the checkpoint of adapter {name!r} has A but no B of {orphaned[0]}{others}, so {outcome}. That is "
        "the B that A was trained with only if this package made it, on this very base: stock PEFT's differs "
        "in signs and rotation, and with another B the adapter computes something else. Save whole adapters, "
        "with model.save_pretrained(folder) or peft.get_peft_model_state_dict(model); a filter by "
        "requires_grad loses B, which is frozen.",
        stacklevel=5,
    )


@contextmanager
def _whole(model, name: str, created: list[NewAdapter]) -> Iterator[None]:
    """Delete a new adapter again after an error: it would have B = 0, and nothing could train it."""
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
    is_path = isinstance(recorded, str) and os.path.isabs(recorded)  # PEFT checks no type
    if not is_path or os.path.basename(recorded) != BASE:
        return config
    folder = Path(os.path.abspath(os.path.join(pretrained_model_name_or_path, subfolder or "")))
    if folder.name.startswith("checkpoint-"):
        folder = folder.parent
    if (folder / BASE / "config.json").is_file():
        config.base_model_name_or_path = str(folder / BASE)
    return config


@while_enabled
def add_weighted_adapter(stock, self, adapters, weights, adapter_name, *args, **kwargs) -> None:
    with without_solver() as created, _whole(self, adapter_name, created):
        stock(self, adapters, weights, adapter_name, *args, **kwargs)


@around
def hotswap_adapter_from_state_dict(stock, model, state_dict, adapter_name, *args, **kwargs):
    """PEFT writes the new adapter through ``.data``, which PyTorch does not count as a change of a tensor.

    So whatever was derived from the old B is dropped.
    """
    if settings.enabled:
        _check_is_whole(model, state_dict, adapter_name)
    try:
        return stock(model, state_dict, adapter_name, *args, **kwargs)
    finally:  # also after an error: a part of the weights may be new
        clear_caches()


def _check_is_whole(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str) -> None:
    """Raise ValueError if the state dict lacks what a layer cannot do without, as PEFT sets that to 0.

    It does so for the layers of the old adapter that the new one leaves alone. There A = B = 0 is right: no
    update. But a MiCA layer with B = 0 does nothing with its A, and nothing could train it; and DoRA
    multiplies the whole output of a layer by its magnitude.
    """
    given = {key.removesuffix(".weight") for key in state_dict}  # an embedding's parameters have no such end
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        name = name.removeprefix("_orig_mod.")  # of torch.compile's wrapper, which the keys lack
        kind = "lora_embedding" if isinstance(layer, lora.Embedding) else "lora"
        parts = f"{kind}_A", f"{kind}_B", "lora_magnitude_vector"
        has_a, has_b, has_magnitude = (f"{name}.{part}.{adapter_name}" in given for part in parts)
        if is_mica(layer, adapter_name) and has_a and not has_b:
            raise ValueError(
                f"hotswapping adapter {adapter_name!r} needs a whole adapter, but the new one has A and no B "
                f"of {name!r}: save it with model.save_pretrained(folder), or load it with "
                "model.load_adapter, which computes B anew from the base weights."
            )
        if adapter_name in layer.lora_magnitude_vector and not has_magnitude:
            raise ValueError(
                f"hotswapping adapter {adapter_name!r} needs DoRA's magnitudes of all its layers, but the "
                f"new one has none of {name!r}, whose output would be 0: load it under another name, with "
                "model.load_adapter."
            )
