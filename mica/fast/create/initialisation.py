"""How an adapter is created: PEFT's `mica_init` on the subspace solver, for a whole model at once.

`get_peft_model` creates layer after layer. Each is checked as it is created (rank, dtype, finite weight),
so that a hopeless configuration fails before any work; the solver then runs over all of them under one
progress bar. If anything fails the model is restored: no layer stays half adapted.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Integral

import torch
from peft.tuners import lora
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from mica.errors import UnsuitableLayerError
from mica.fast import known_peft
from mica.fast.create import quantised
from mica.fast.create.solving import NewAdapter, check, initialise, is_outline, restore_exact
from mica.fast.forward import call_counts, tensor_parallel
from mica.fast.forward.eligibility import MiCALinearVariant, adapter_weights, is_mica, requests_mica
from mica.fast.forward.expert_params import is_wrapper
from mica.fast.frameworks import REMEDIES_OF_INITIALISATION, UNDO, owner_of
from mica.fast.known_peft import INITIALISATION
from mica.fast.loading import uninitialised
from mica.fast.settings import around, settings, while_enabled


@dataclass
class _Entry:
    """One target module that is getting an adapter: enough to finish it, and to take it back."""

    key: str
    parent: nn.Module
    child_name: str
    original: nn.Module
    is_adapted: bool  # ``original`` is a LoRA layer that gets one more adapter; else it is wrapped
    is_parameter: bool  # of `target_parameters`: the key is the parameter's
    adapter: NewAdapter | None = None  # set once `mica_init` has requested a basis
    is_initialised: bool = False  # whether `mica_init` was called for it

    def undo(self, adapter_name: str) -> None:
        if self.is_adapted:
            self.original.delete_adapter(adapter_name)
        elif getattr(self.parent, self.child_name) is not self.original:
            setattr(self.parent, self.child_name, self.original)


@dataclass
class _Injection:
    is_outline: bool  # no B is computed
    entries: list[_Entry] = field(default_factory=list)
    skipped: list[_Entry] = field(default_factory=list)


# The tuner's records of what it has adapted; older versions of PEFT have the first only.
_TARGETED = ("targeted_module_names", "targeted_parameter_names")

_injection: ContextVar[_Injection | None] = ContextVar("mica_injection", default=None)


# ---------------------------------------------------------------------------------------------------
# one layer
# ---------------------------------------------------------------------------------------------------


@while_enabled
def resolve_lora_variant(stock, self, *, config, **kwargs):
    """Any spelling of "mica" is MiCA. Stock initialises for "MICA" too, but then silently trains B.

    Raises:
        ValueError: the configuration asks for another variant of LoRA too.
        UnsuitableLayerError: PEFT has no MiCA for this type of layer.
    """
    if not requests_mica(config):
        return stock(self, config=config, **kwargs)
    config.init_lora_weights = "mica"  # in the saved configuration too, for whatever loads it
    _refuse_other_variants(self, config)
    if ("mica",) not in getattr(self, "lora_variants", {("mica",)}):  # PEFT 0.20 has no such table
        raise UnsuitableLayerError(
            f"MiCA cannot be initialised: {_name_of(self)} is a {type(self.get_base_layer()).__name__}, and "
            "PEFT has MiCA for linear layers and embeddings only. Leave it out of target_modules."
        )
    return stock(self, config=config, **kwargs)


def _refuse_other_variants(layer, config) -> None:
    """ValueError where fields of the configuration, like ``use_dora``, ask for a variant; PEFT marks them."""
    marked = [entry.name for entry in dataclasses.fields(config) if entry.metadata.get("is_lora_variant")]
    others = [name for name in marked if getattr(config, name)]
    if others:
        raise ValueError(
            f"MiCA cannot be combined with another variant of LoRA, but the configuration asks for "
            f"{', '.join(others)} on {_name_of(layer)}."
        )


def _entry() -> _Entry | None:
    """The target module that is getting an adapter now; None outside of an injection."""
    injection = _injection.get()
    if injection is None or not injection.entries:
        return None
    return injection.entries[-1]


def _name_of(layer) -> str:
    """The layer's name in messages."""
    entry = _entry()
    if entry is None:
        return f"this {type(layer.get_base_layer()).__name__} layer"
    return f"layer {entry.key!r}"


@while_enabled
def update_layer(stock, self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
    """An adapter on a quantised base, or of a single parameter: plain LoRA's, then MiCA's A, B and variant.

    Stock has no MiCA on a quantised base: it reads the packed ``weight`` (GPTQ's and HQQ's layers have none),
    and most of these classes resolve no variant for it, so that B would be trained. For a parameter, mostly a
    stack of experts, it refuses every variant. What it refuses for plain LoRA (dropout, ...) stays refused.
    """
    if not requests_mica(config):
        return stock(self, adapter_name, r, lora_alpha, config, **kwargs)
    if isinstance(r, bool) or not isinstance(r, Integral):
        raise TypeError(f"r must be an int, but got {r!r} of type {type(r).__name__} for {_name_of(self)}.")
    refusal = quantised.why_not(self)
    if refusal:
        raise UnsuitableLayerError(f"MiCA cannot be initialised: {_name_of(self)} {refusal}")
    if quantised.kind_of(self) is None and not is_wrapper(self):
        return stock(self, adapter_name, r, lora_alpha, config, **kwargs)

    config.init_lora_weights = "mica"
    _refuse_other_variants(self, config)
    plain = copy.copy(config)
    plain.init_lora_weights = False
    stock(self, adapter_name, r, lora_alpha, plain, **kwargs)
    with gather_params_ctx(NewAdapter("", self, adapter_name).stored):
        _start(self, adapter_name)  # not `self.mica_init`, which another package may have replaced

    # MiCA from here on, by PEFT's own means: B is frozen, and stays so
    self.lora_variant[adapter_name] = MiCALinearVariant()
    MiCALinearVariant.init(self, adapter_name=adapter_name, config=config, **kwargs)
    return None


@while_enabled
def mica_init(stock, self, adapter_name: str) -> None:
    if _start(self, adapter_name):
        return
    stock(self, adapter_name)
    loaded = uninitialised.get()
    adapter = NewAdapter(_name_of(self), self, adapter_name)
    if loaded is not None and adapter.lora_B.is_meta:
        loaded.append(adapter)  # the file may lack its B


def _start(layer, adapter_name: str) -> bool:
    """A = 0, and B from a file, from the solver with all others at the injection's end, or from it now.

    False if stock has to initialise this layer; it leaves weights on the meta device as they are.
    """
    adapter = NewAdapter(_name_of(layer), layer, adapter_name)
    entry = _entry()
    if entry is not None:
        entry.is_initialised = True
    if not _set_to_zero(adapter):
        return False
    loaded = uninitialised.get()
    if loaded is not None:
        loaded.append(adapter)
        return True
    injection = _injection.get()
    solves = injection is None or not injection.is_outline
    check(adapter, needs_values=solves)
    if not solves:
        return True
    if entry is not None:
        entry.adapter = adapter
    else:
        initialise([adapter])
    return True


def _set_to_zero(adapter: NewAdapter) -> bool:
    """A and B, on the weight's device and in its dtype. False if stock has to initialise this layer."""
    layer = adapter.layer
    weight = adapter.stored
    lora_A, lora_B = adapter_weights(layer, adapter.adapter_name)
    if lora_B.is_meta and not (is_wrapper(layer) and weight.is_meta):  # low_cpu_mem_usage: values come later
        return False
    if adapter.is_quantised or is_wrapper(layer):  # as plain LoRA's: a packed weight's dtype means nothing
        lora_A.data.zero_()
        lora_B.data.zero_()
        return True
    if not isinstance(weight, Tensor) or type(layer) not in (lora.Linear, lora.Embedding):
        return False
    device = weight.device
    if weight.is_meta:
        device = lora_A.device
    dtype = None
    if weight.is_floating_point():
        dtype = weight.dtype
    lora_A.data = torch.zeros(lora_A.shape, device=device, dtype=dtype)
    lora_B.data = torch.zeros(lora_B.shape, device=device, dtype=dtype)
    return True


@while_enabled
def cast_adapter_dtype(
    stock, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """PEFT's cast to fp32, then what it loses: the exact basis, and that an embedding's B is frozen."""
    before = []
    for layer in model.modules():
        if is_mica(layer, adapter_name):
            lora_A, lora_B = adapter_weights(layer, adapter_name)
            before.append((layer, lora_A.requires_grad, lora_B.requires_grad))

    stock(model, adapter_name, autocast_adapter_dtype)

    for layer, trains_a, trains_b in before:
        lora_A, lora_B = adapter_weights(layer, adapter_name)
        lora_A.requires_grad_(trains_a)
        lora_B.requires_grad_(trains_b)
        layer._freeze_non_trainable_peft_weights(adapter_name)
        restore_exact(layer, adapter_name, lora_B)


# ---------------------------------------------------------------------------------------------------
# a whole model
# ---------------------------------------------------------------------------------------------------


@around
def create_and_replace(
    stock, self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
):
    injection = _injection.get()
    if injection is not None:
        # A wrapper that has this adapter already is nested in one for another parameter of its module.
        is_nested = is_wrapper(target) and adapter_name in target.lora_A
        is_adapted = isinstance(target, lora.LoraLayer) and not is_nested
        is_parameter = kwargs.get("parameter_name") is not None
        entry = _Entry(current_key, parent, target_name, target, is_adapted, is_parameter)
        injection.entries.append(entry)
    try:
        result = stock(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if settings.enabled:
            tensor_parallel.widen(getattr(parent, target_name), adapter_name)
        return result
    except UnsuitableLayerError as error:
        if injection is None or settings.on_unsuitable != "skip":
            raise
        if entry.is_parameter and entry.is_adapted:
            raise UnsuitableLayerError(
                f"{error} A further adapter cannot skip it (on_unsuitable='skip'): PEFT finds the adapters "
                "of nested parameters by their depth, so each must have all of them."
            ) from error
        injection.entries.pop().undo(adapter_name)
        injection.skipped.append(entry)
        warnings.warn(f"{error} The layer is left without an adapter (on_unsuitable='skip').", stacklevel=3)
        return None


@around
def inject_adapter(stock, self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
    call_counts.clear()  # new layers have been in no forward yet
    config = self.peft_config[adapter_name]
    if not settings.enabled or not requests_mica(config):
        return stock(self, model, adapter_name, *args, **kwargs)

    with _undone_on_error(self, model, adapter_name) as injection:
        stock(self, model, adapter_name, *args, **kwargs)
        _refuse_if_all_are_skipped(injection, config)
        initialise([entry.adapter for entry in injection.entries if entry.adapter is not None])
        _warn_of_another_initialisation(injection, adapter_name)

    if not config.inference_mode:
        quantised.keep_unpacked(model)
    if injection.skipped:
        _forget_skipped(self, injection)
        _exclude(config, injection)
    return None


@contextmanager
def _undone_on_error(tuner, model: nn.Module, adapter_name: str) -> Iterator[_Injection]:
    """An injection, after whose failure the model and the tuner are as they were."""
    injection = _Injection(is_outline(model))
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    targeted = {name: list(getattr(tuner, name)) for name in _TARGETED if hasattr(tuner, name)}
    token = _injection.set(injection)
    try:
        yield injection
    except BaseException:
        for entry in reversed(injection.entries):
            entry.undo(adapter_name)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for name, names in targeted.items():
            setattr(tuner, name, names)
        raise
    finally:
        _injection.reset(token)


def _refuse_if_all_are_skipped(injection: _Injection, config) -> None:
    if injection.entries or not injection.skipped:
        return
    kind = "modules"
    if all(entry.is_parameter for entry in injection.skipped):
        kind = "parameters"
    raise UnsuitableLayerError(
        f"none of the {len(injection.skipped)} target {kind} is suitable for MiCA with r={config.r}; the "
        "warnings above name them."
    )


def _forget_skipped(tuner, injection: _Injection) -> None:
    """Take the skipped targets out of the tuner's records of what it has adapted."""
    skipped = {entry.key for entry in injection.skipped}
    for name in _TARGETED:
        if hasattr(tuner, name):
            setattr(tuner, name, [key for key in getattr(tuner, name) if key not in skipped])


def _warn_of_another_initialisation(injection: _Injection, adapter_name: str) -> None:
    """One warning for the layers that got their basis without a call of this package's `mica_init`.

    Asked after the fact, and not whether `LoraLayer.mica_init` is this package's: Unsloth's replacement
    gives the layers that it does not cover back to the function that was there before.
    """
    if uninitialised.get() is not None or INITIALISATION in known_peft.left:
        return  # B comes from a file; or the import has said that PEFT initialises
    others = {}
    for entry in injection.entries:
        layer = getattr(entry.parent, entry.child_name)
        if not entry.is_initialised and is_mica(layer, adapter_name):
            others[entry.key] = layer
    if not others:
        return

    name, layer = next(iter(others.items()))
    who = owner_of(type(layer).mica_init)
    if len(others) == 1:
        layers = f"layer {name!r}"
    else:
        layers = f"{len(others)} layers (the first is {name!r})"
    warnings.warn(
        f"mica.fast did not initialise {layers}: {who} has replaced PEFT's mica_init, and its B is used, "
        "which is not certified and may be rounded to the dtype of the base. Training works with it. For the "
        f"solver's: {REMEDIES_OF_INITIALISATION.get(who, UNDO)}.",
        stacklevel=3,
    )


def _exclude(config, injection: _Injection) -> None:
    """Make the saved configuration match the layers that have an adapter, for stock PEFT too."""
    if any(entry.is_parameter for entry in injection.skipped):  # PEFT excludes modules only
        config.target_parameters = [entry.key for entry in injection.entries if entry.is_parameter]
    names = [entry.key for entry in injection.skipped if not entry.is_parameter]
    if not names:
        return
    if isinstance(config.exclude_modules, str):
        alternatives = [f"({config.exclude_modules})", *map(re.escape, names)]
        config.exclude_modules = "|".join(alternatives)
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), *names}
