"""How an adapter comes to be: PEFT's `mica_init` on the subspace solver, for a whole model at once.

`get_peft_model` creates layer after layer. Each is checked as it is created (rank, dtype, finite weight),
so that a hopeless configuration fails before any work; the solver then runs over all of them under one
progress bar. If anything goes wrong the model is put back as it was: no layer stays half adapted.
"""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from peft.tuners import lora
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from mica.dtypes import SIXTEEN_BIT
from mica.errors import UnsuitableLayerError
from mica.fast import quantised
from mica.fast.bases import Wanted, check, exact, fill
from mica.fast.eligibility import MiCAEmbeddingVariant, MiCALinearVariant, adapter_weights
from mica.fast.settings import settings


@dataclass
class _Entry:
    """One target module on its way to an adapter: enough to finish it, and to take it back."""

    key: str
    parent: nn.Module
    child_name: str
    original: nn.Module
    wanted: Wanted | None = None  # set once `mica_init` has asked for a basis

    def undo(self, adapter_name: str) -> None:
        if getattr(self.parent, self.child_name) is not self.original:
            setattr(self.parent, self.child_name, self.original)
        elif isinstance(self.original, lora.LoraLayer):
            self.original.delete_adapter(adapter_name)


@dataclass
class _Injection:
    entries: list[_Entry] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


_injection: ContextVar[_Injection | None] = ContextVar("mica_injection", default=None)

# (layer name, layer, adapter name) of adapters whose weights a file or another adapter will provide.
Unfilled = list[tuple[str, nn.Module, str]]
unfilled: ContextVar[Unfilled | None] = ContextVar("mica_unfilled", default=None)


def is_mica(init_lora_weights) -> bool:
    return isinstance(init_lora_weights, str) and init_lora_weights.lower() == "mica"


def resolve_lora_variant(stock):
    def resolve_lora_variant(self, *, config, **kwargs):
        """Any spelling of "mica" is MiCA. Stock initialises for "MICA" too but then trains B, silently."""
        if settings.enabled and is_mica(config.init_lora_weights):
            config.init_lora_weights = "mica"  # in the saved configuration too, for whoever loads it
        return stock(self, config=config, **kwargs)

    return resolve_lora_variant


# ---------------------------------------------------------------------------------------------------
# one layer
# ---------------------------------------------------------------------------------------------------


def _current_entry() -> _Entry | None:
    injection = _injection.get()
    return injection.entries[-1] if injection is not None and injection.entries else None


def _name_of(layer) -> str:
    entry = _current_entry()
    return f"layer {entry.key!r}" if entry else f"this {type(layer.get_base_layer()).__name__} layer"


def update_layer(stock):
    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
        """An adapter on a quantised base: plain LoRA's, then MiCA's A and B and its variant.

        Stock has no MiCA there: it reads the packed ``weight`` (GPTQ's and HQQ's layers have none), and most
        of these classes resolve no variant for it, so that B would be trained.
        """
        if not settings.enabled or not is_mica(config.init_lora_weights):
            return stock(self, adapter_name, r, lora_alpha, config, **kwargs)
        refusal = quantised.why_not(self)
        if refusal:
            raise UnsuitableLayerError(f"MiCA cannot be initialised: {_name_of(self)} {refusal}")
        if quantised.kind_of(self) is None:
            return stock(self, adapter_name, r, lora_alpha, config, **kwargs)
        config.init_lora_weights = "mica"
        plain = copy.copy(config)
        plain.init_lora_weights = True
        variant = self.resolve_lora_variant(config=plain)
        if variant is not None:
            raise ValueError(
                f"MiCA cannot be combined with another variant of LoRA, but the configuration asks for "
                f"{type(variant).__name__} on {_name_of(self)}."
            )
        plain.init_lora_weights = False
        stock(self, adapter_name, r, lora_alpha, plain, **kwargs)
        packed = getattr(self.get_base_layer(), "weight", None)
        with nullcontext() if packed is None else gather_params_ctx(packed):
            self.mica_init(adapter_name)
        self.lora_variant[adapter_name] = MiCALinearVariant()
        MiCALinearVariant.init(self, adapter_name=adapter_name, config=config, **kwargs)
        return None

    return update_layer


def mica_init(stock):
    def mica_init(self, adapter_name: str) -> None:
        if not settings.enabled or not _prepare(self, adapter_name):
            return stock(self, adapter_name)
        return None

    return mica_init


def _prepare(layer, adapter_name: str) -> bool:
    """A = 0, and B filled, or noted as one that has to be. False if this is no layer of ours."""
    lora_A, lora_B = adapter_weights(layer, adapter_name)
    if lora_B.is_meta:
        return False
    if quantised.kind_of(layer) is not None:
        # The dtype is plain LoRA's: the packed weight's says nothing.
        lora_A.data.zero_()
        if quantised.stored(layer).is_meta:  # another process has the weight, and will provide B
            return True
        empty = {"device": lora_B.device, "dtype": lora_B.dtype}
    else:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(weight, Tensor) or type(layer) not in (lora.Linear, lora.Embedding):
            return False
        empty = {
            "device": lora_A.device if weight.is_meta else weight.device,
            "dtype": weight.dtype if weight.is_floating_point() else None,
        }
        lora_A.data = torch.zeros(lora_A.shape, **empty)
    entry = _current_entry()
    if unfilled.get() is not None:
        lora_B.data = torch.zeros(lora_B.shape, **empty)
        unfilled.get().append((entry.key if entry else "", layer, adapter_name))
        return True
    wanted = Wanted(_name_of(layer), layer, adapter_name)
    check(wanted)
    if entry:
        entry.wanted = wanted  # solved with all the others, at the end of the injection
    else:
        lora_B.data = lora_B.data.to(**empty)
        fill([wanted])
    return True


# ---------------------------------------------------------------------------------------------------
# a whole model
# ---------------------------------------------------------------------------------------------------


def create_and_replace(stock):
    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ):
        injection = _injection.get()
        if injection is not None:
            injection.entries.append(_Entry(current_key, parent, target_name, target))
        try:
            return stock(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        except UnsuitableLayerError as error:
            if injection is None or settings.on_unsuitable != "skip":
                raise
            injection.entries.pop().undo(adapter_name)
            injection.skipped.append(current_key)
            warnings.warn(
                f"{error} The layer is left without an adapter (on_unsuitable='skip').", stacklevel=2
            )
            return None

    return _create_and_replace


def inject_adapter(stock):
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        if not settings.enabled or not is_mica(getattr(config, "init_lora_weights", None)):
            return stock(self, model, adapter_name, *args, **kwargs)
        injection = _Injection()
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        targeted = list(self.targeted_module_names)
        token = _injection.set(injection)
        try:
            stock(self, model, adapter_name, *args, **kwargs)
            if injection.skipped and not injection.entries:
                raise UnsuitableLayerError(
                    f"none of the {len(injection.skipped)} target modules is suitable for MiCA with "
                    f"r={config.r}; the warnings above name them."
                )
            fill([entry.wanted for entry in injection.entries if entry.wanted is not None])
        except BaseException:
            for entry in reversed(injection.entries):
                entry.undo(adapter_name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            self.targeted_module_names = targeted
            raise
        finally:
            _injection.reset(token)
        if injection.skipped:
            skipped = set(injection.skipped)
            self.targeted_module_names = [name for name in self.targeted_module_names if name not in skipped]
            _exclude(config, injection.skipped)
        return None

    return inject_adapter


def _exclude(config, names: list[str]) -> None:
    """So that the saved adapter matches the layers that have one, for stock PEFT too."""
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = f"({config.exclude_modules})|" + "|".join(re.escape(name) for name in names)
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), *names}


def cast_adapter_dtype(stock):
    def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's cast to fp32, then what it loses: the exact basis, and an embedding's frozen B."""
        if not settings.enabled:
            return stock(model, adapter_name, autocast_adapter_dtype)
        layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, lora.LoraLayer)
            and type(layer.lora_variant.get(adapter_name)) in (MiCALinearVariant, MiCAEmbeddingVariant)
        ]
        trainable = [
            [weight.requires_grad for weight in adapter_weights(layer, adapter_name)] for layer in layers
        ]
        stock(model, adapter_name, autocast_adapter_dtype)
        for layer, flags in zip(layers, trainable, strict=True):
            weights = adapter_weights(layer, adapter_name)
            for weight, requires_grad in zip(weights, flags, strict=True):
                weight.requires_grad_(requires_grad)
            layer._freeze_non_trainable_peft_weights(adapter_name)
            _restore_exact(layer, adapter_name, weights[1])
        return None

    return cast_adapter_dtype


def _restore_exact(layer, adapter_name: str, lora_B: Tensor) -> None:
    basis = exact.get(layer, {}).pop(adapter_name, None)
    if basis is None or lora_B.dtype != torch.float32 or basis.shape != lora_B.shape:
        return
    basis = basis.to(lora_B.device)
    rounded = (basis.to(dtype).float() for dtype in SIXTEEN_BIT)
    if any(torch.equal(lora_B, candidate) for candidate in rounded):  # else somebody has set another B
        lora_B.data = basis


# ---------------------------------------------------------------------------------------------------
# loading: the weights come from elsewhere, so no solver runs
# ---------------------------------------------------------------------------------------------------


def load_adapter(stock):
    def load_adapter(self, *args, **kwargs):
        if not settings.enabled:
            return stock(self, *args, **kwargs)
        waiting = unfilled.get()
        token = None
        if waiting is None:
            waiting = []
            token = unfilled.set(waiting)
        try:
            result = stock(self, *args, **kwargs)
        finally:
            if token is not None:
                unfilled.reset(token)
        _fill_missing(waiting, getattr(result, "missing_keys", ()))
        return result

    return load_adapter


def _fill_missing(waiting: Unfilled, missing_keys) -> None:
    """A checkpoint without this layer's B (PEFT has warned): it gets the basis it would have had."""
    missing = []
    for key, layer, adapter_name in waiting:
        names = (f"{key}.lora_B.{adapter_name}", f"{key}.lora_embedding_B.{adapter_name}")
        if any(name in key for key in missing_keys for name in names):
            wanted = Wanted(f"layer {key!r}", layer, adapter_name)
            check(wanted)
            missing.append(wanted)
    waiting.clear()
    fill(missing)


def without_solver(stock):
    """For `from_pretrained`, which its `load_adapter` completes, and `add_weighted_adapter`."""

    def wrapper(*args, **kwargs):
        if not settings.enabled:
            return stock(*args, **kwargs)
        token = unfilled.set([])
        try:
            return stock(*args, **kwargs)
        finally:
            unfilled.reset(token)

    return wrapper


def add_weighted_adapter(stock):
    stock = without_solver(stock)

    def add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs) -> None:
        """An error after the adapter has been made would leave one whose B is 0: nothing could train it."""
        is_new = adapter_name not in self.peft_config
        try:
            stock(self, adapters, weights, adapter_name, *args, **kwargs)
        except Exception:
            if settings.enabled and is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    return add_weighted_adapter
