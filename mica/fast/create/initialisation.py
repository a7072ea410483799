"""How an adapter is created: its layers are PEFT's, and every B comes from the subspace solver, all at once.

The way of a weight to its lora_B:

    inject_adapter        has PEFT make plain LoRA layers, makes them MiCA's, and has `solving.check` look at
                          each, so that a hopeless configuration fails before any work
    solving.initialise    reads the weights, a chunk at a time
    distributed.run_shared, many.run_tasks, solver.solve_stack, solver.solve_matrix
                          who solves it: which process, device or thread; then by which method
    solving.assign        writes the basis into lora_B

PEFT's own MiCA (`mica_init`) does not run, nor does anything that has replaced it. If anything fails the
model is restored: no layer stays half adapted.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings

import torch
from peft.tuners import lora
from peft.utils.integrations import gather_params_ctx
from torch import nn

from mica.errors import UnsuitableLayerError
from mica.fast import known_peft
from mica.fast.create import quantised
from mica.fast.create.solving import NewAdapter, check, check_type, initialise, is_outline, restore_exact
from mica.fast.forward import layer_calls, tensor_parallel
from mica.fast.forward.eligibility import (
    MiCAEmbeddingVariant,
    MiCALinearVariant,
    adapter_weights,
    is_mica,
    requests_mica,
)
from mica.fast.forward.expert_params import is_wrapper
from mica.fast.known_peft import INITIALISATION
from mica.fast.loading import uninitialised
from mica.fast.settings import around, settings, while_enabled

# The tuner's records of what it has adapted; older versions of PEFT have the first only.
_TARGETED = ("targeted_module_names", "targeted_parameter_names")


@around
def inject_adapter(stock, self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
    """In place of the tuner's function: where the configuration requests MiCA, in any spelling, it gets it.

    Stock initialises for "MICA" too, but then silently trains B. PEFT makes the layers with a copy of the
    configuration that requests plain LoRA without an initialisation: it has no MiCA on quantised layers and
    on parameters, and would solve each layer alone. What it refuses for plain LoRA stays refused.

    Raises:
        ValueError: another variant of LoRA is requested as well, or tied adapters.
        TypeError: a weight is not of a floating dtype with 16 bits or more.
        UnsuitableLayerError: MiCA cannot start from a layer, and ``on_unsuitable`` is "raise"; or from none.
    """
    layer_calls.clear()  # new layers have been in no forward yet
    config = self.peft_config[adapter_name]
    if not settings.enabled or not requests_mica(config):
        return stock(self, model, adapter_name, *args, **kwargs)
    if INITIALISATION in known_peft.left:
        config.init_lora_weights = "mica"
        return stock(self, model, adapter_name, *args, **kwargs)

    _check_config(config)
    before = _Before(self, model)
    plain = copy.copy(config)
    plain.init_lora_weights = False
    self.peft_config[adapter_name] = plain
    try:
        stock(self, model, adapter_name, *args, **kwargs)
        adapters = before.new_adapters(adapter_name)
        skipped = _initialise(adapters, before, plain)
    except BaseException:
        before.restore(adapter_name)
        raise
    finally:
        self.peft_config[adapter_name] = config

    plain.init_lora_weights = "mica"  # in the saved configuration too, for whatever loads it
    vars(config).update(vars(plain))  # with what PEFT has found out
    if not config.inference_mode:
        quantised.keep_unpacked(model)
    if skipped:
        _forget(self, skipped)
        _exclude(config, skipped, adapters)
    return None


def _check_config(config) -> None:
    """Refuse what can be seen without a layer."""
    marked = [entry.name for entry in dataclasses.fields(config) if entry.metadata.get("is_lora_variant")]
    others = [name for name in marked if getattr(config, name)]
    if others:
        raise ValueError(
            "MiCA cannot be combined with another variant of LoRA, but the configuration asks for "
            f"{', '.join(others)}."
        )


class _Before:
    """A model and its tuner before an adapter is injected."""

    def __init__(self, tuner, model: nn.Module) -> None:
        self.model = model
        self.is_outline = is_outline(model)
        self._tuner = tuner
        self._children = {module: dict(module._modules) for module in model.modules()}
        self._requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._targeted = {name: list(getattr(tuner, name)) for name in _TARGETED if hasattr(tuner, name)}

    def has(self, adapter: NewAdapter) -> bool:
        """Whether PEFT has added the adapter to a layer that was there; else it has wrapped a module."""
        return adapter.layer in self._children

    def new_adapters(self, adapter_name: str) -> dict[str, NewAdapter]:
        """What PEFT has made since, by the name of the layer or of the parameter."""
        found = {}
        for name, layer in self.model.named_modules():
            if not isinstance(layer, lora.LoraLayer):
                continue
            if adapter_name not in layer.lora_A and adapter_name not in layer.lora_embedding_A:
                continue
            if adapter_weights(layer, adapter_name)[0] in self._requires_grad:
                continue
            if is_wrapper(layer):  # those of parameters of one module are nested
                name = f"{re.sub('([.]base_layer)+$', '', name)}.{layer.parameter_name}"
            found[name] = NewAdapter(f"layer {name!r}", layer, adapter_name)
        return found

    def remove(self, adapter: NewAdapter) -> None:
        """Take one new adapter out of the model."""
        if self.has(adapter):
            adapter.layer.delete_adapter(adapter.adapter_name)
            return
        for parent in self.model.modules():
            for name, child in parent._modules.items():
                if child is adapter.layer:
                    setattr(parent, name, adapter.layer.base_layer)

    def restore(self, adapter_name: str) -> None:
        """Make the model and the tuner what they were."""
        for adapter in self.new_adapters(adapter_name).values():
            if self.has(adapter):
                self.remove(adapter)
        for module, children in self._children.items():
            module._modules.update(children)
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        for name, names in self._targeted.items():
            setattr(self._tuner, name, names)


def _initialise(adapters: dict[str, NewAdapter], before: _Before, config) -> dict[str, NewAdapter]:
    """A = 0 and B = the minor subspaces, or B = 0 where it comes from a file; returns the skipped ones."""
    _refuse_ties(before, config)
    loaded = uninitialised.get()
    if loaded is not None:
        for adapter in adapters.values():
            _make_mica(adapter, config)
        loaded.extend(adapters.values())
        return {}

    skipped = {}
    for name, adapter in adapters.items():
        try:
            _make_mica(adapter, config)
            if _gets_basis(adapter):
                with gather_params_ctx(adapter.stored):
                    check(adapter, needs_values=not before.is_outline)
        except UnsuitableLayerError as error:
            if settings.on_unsuitable != "skip":
                raise
            if is_wrapper(adapter.layer) and before.has(adapter):
                raise UnsuitableLayerError(
                    f"{error} A further adapter cannot skip it (on_unsuitable='skip'): PEFT finds the "
                    "adapters of nested parameters by their depth, so each must have all of them."
                ) from error
            before.remove(adapter)
            skipped[name] = adapter
            warnings.warn(
                f"{error} The layer is left without an adapter (on_unsuitable='skip').", stacklevel=4
            )
    kept = [adapter for name, adapter in adapters.items() if name not in skipped]
    if skipped and not kept:
        kind = "parameters" if all(is_wrapper(adapter.layer) for adapter in skipped.values()) else "modules"
        raise UnsuitableLayerError(
            f"none of the {len(skipped)} target {kind} is suitable for MiCA with r={config.r}; the warnings "
            "above name them."
        )
    if not before.is_outline:
        initialise([adapter for adapter in kept if _gets_basis(adapter)])
    return skipped


def _make_mica(adapter: NewAdapter, config) -> None:
    """Turn a plain LoRA adapter into a MiCA one with A = B = 0, by PEFT's own means: B is frozen for good.

    Raises:
        UnsuitableLayerError: there is no MiCA for this type of layer.
    """
    check_type(adapter)
    layer = adapter.layer
    variant = MiCALinearVariant
    if isinstance(layer, lora.Embedding):
        variant = MiCAEmbeddingVariant
    layer.lora_variant[adapter.adapter_name] = variant()
    variant.init(layer, adapter_name=adapter.adapter_name, config=config)
    with torch.no_grad():
        adapter.lora_A.zero_()
        adapter.lora_B.zero_()
    tensor_parallel.widen(layer, adapter.adapter_name)


def _gets_basis(adapter: NewAdapter) -> bool:
    """Whether B is to be computed: with ``low_cpu_mem_usage`` values come later, and B is a shape alone.

    So it is in a process without the weights, which takes part in the work nevertheless.
    """
    return not adapter.lora_B.is_meta or adapter.is_absent


# ---------------------------------------------------------------------------------------------------
# tied embeddings
# ---------------------------------------------------------------------------------------------------


def _refuse_ties(before: _Before, config) -> None:
    """PEFT has tied adapters on tied embeddings (``ensure_weight_tying``). MiCA has none.

    One update of the shared weight E (num_embeddings x embedding_dim) is s·AᵀBᵀ, with the embedding's A
    and frozen B. At the head, whose update is s·B'·A', that requires B' = Aᵀ and A' = Bᵀ: B' trained and A'
    frozen, whereas MiCA freezes B' and takes it from the other side of E. Nor would PEFT keep the tie: it
    creates two parameters on one memory, each with its own gradient and optimiser state, and plain LoRA's
    (0.21.2) separate at the fp32 cast over a 16-bit base, or at `model.to(dtype)`.
    """
    tied = getattr(config, "target_modules_to_tie", None)
    if not tied:
        return
    source = before.model.get_input_embeddings()
    embedding = next(name for name, module in before.model.named_modules() if module is source)
    names = " and ".join(map(repr, [embedding, *sorted(tied)]))
    raise ValueError(
        f"MiCA adapters of {names} cannot be tied (ensure_weight_tying=True), because each freezes the minor "
        "vectors of its own side of the shared weight: leave ensure_weight_tying off for independent "
        f"adapters, or name {embedding!r} in modules_to_save, and neither in target_modules, to train the "
        "shared weight itself."
    )


# ---------------------------------------------------------------------------------------------------
# records of skipped layers, and the cast to fp32
# ---------------------------------------------------------------------------------------------------


def _forget(tuner, skipped: dict[str, NewAdapter]) -> None:
    """Take the skipped targets out of the tuner's records of what it has adapted."""
    for name in _TARGETED:
        if hasattr(tuner, name):
            setattr(tuner, name, [key for key in getattr(tuner, name) if key not in skipped])


def _exclude(config, skipped: dict[str, NewAdapter], adapters: dict[str, NewAdapter]) -> None:
    """Make the saved configuration match the layers that have an adapter, for stock PEFT too."""
    if any(is_wrapper(adapter.layer) for adapter in skipped.values()):  # PEFT excludes modules only
        parameters = [name for name, adapter in adapters.items() if is_wrapper(adapter.layer)]
        config.target_parameters = [name for name in parameters if name not in skipped]
    names = [name for name, adapter in skipped.items() if not is_wrapper(adapter.layer)]
    if not names:
        return
    if isinstance(config.exclude_modules, str):
        alternatives = [f"({config.exclude_modules})", *map(re.escape, names)]
        config.exclude_modules = "|".join(alternatives)
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), *names}


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
