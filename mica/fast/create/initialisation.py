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

import dataclasses
import re

import torch
from peft.tuners import lora
from peft.utils.integrations import gather_params_ctx
from torch import nn

from mica.errors import UnsuitableLayerError
from mica.fast import checkpointing, known_peft
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
from mica.ops import norms

# The tuner's records of what it has adapted; older versions of PEFT have the first only.
_TARGETED = ("targeted_module_names", "targeted_parameter_names")


@around
def inject_adapter(stock, self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
    """In place of the tuner's function: where the configuration requests MiCA, in any spelling, it gets it.

    Stock initialises for "MICA" too, but then silently trains B. PEFT makes the layers while the
    configuration requests plain LoRA without an initialisation: it has no MiCA on quantised layers and on
    parameters, and would solve each layer alone. What it refuses for plain LoRA stays refused.

    Raises:
        ValueError: another variant of LoRA is requested as well, or tied adapters.
        TypeError: a weight is not of a floating dtype with 16 bits or more.
        UnsuitableLayerError: MiCA cannot start from a layer.
    """
    layer_calls.clear()  # new layers have been in no forward yet
    checkpointing.forget()
    norms.note(model)
    config = self.peft_config[adapter_name]
    if not settings.enabled or not requests_mica(config):
        return stock(self, model, adapter_name, *args, **kwargs)
    if INITIALISATION in known_peft.left:
        config.init_lora_weights = "mica"
        return stock(self, model, adapter_name, *args, **kwargs)

    _check_config(config)
    before = _Before(self, model)
    requested = dict(vars(config))
    config.init_lora_weights = False
    try:
        stock(self, model, adapter_name, *args, **kwargs)
        _initialise(before.new_adapters(adapter_name), before, config)
    except BaseException:
        before.restore(adapter_name)
        vars(config).update(requested)
        raise

    config.init_lora_weights = "mica"  # in the saved configuration too, for whatever loads it
    if not config.inference_mode:
        quantised.keep_unpacked(model)
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

    def restore(self, adapter_name: str) -> None:
        """Make the model and the tuner what they were."""
        for adapter in self.new_adapters(adapter_name).values():
            if adapter.layer in self._children:  # else PEFT has wrapped a module
                adapter.layer.delete_adapter(adapter_name)
        for module, children in self._children.items():
            module._modules.update(children)
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        for name, names in self._targeted.items():
            setattr(self._tuner, name, names)


def _initialise(adapters: dict[str, NewAdapter], before: _Before, config) -> None:
    """A = 0 and B = the minor subspaces, or B = 0 where it comes from a file."""
    _refuse_ties(before, config)
    loaded = uninitialised.get()
    if loaded is not None:
        for adapter in adapters.values():
            _make_mica(adapter, config)
        loaded.extend(adapters.values())
        return

    errors = {}
    for name, adapter in adapters.items():
        try:
            _make_mica(adapter, config)
            if _gets_basis(adapter):
                with gather_params_ctx(adapter.stored):
                    check(adapter, needs_values=not before.is_outline)
        except UnsuitableLayerError as error:
            errors[name] = error
    if errors:
        _refuse(errors, adapters)
    if not before.is_outline:
        initialise([adapter for adapter in adapters.values() if _gets_basis(adapter)])


def _refuse(errors: dict[str, UnsuitableLayerError], adapters: dict[str, NewAdapter]) -> None:
    """Raise the first error, with the names of all layers from which MiCA cannot start."""
    first, *_ = errors.values()
    message = str(first)
    parameters = [name for name in errors if is_wrapper(adapters[name].layer)]
    modules = [name for name in errors if name not in parameters]
    if modules and len(errors) < len(adapters):
        message += f" To adapt all other layers, add {modules} to exclude_modules of the LoraConfig."
    if parameters and len(errors) < len(adapters):
        message += f" To adapt all others, leave {parameters} out of target_parameters."
    raise UnsuitableLayerError(message) from first


def _make_mica(adapter: NewAdapter, config) -> None:
    """Turn a plain LoRA adapter into a MiCA one with A = B = 0, by PEFT's own means: B is frozen for good.

    Raises:
        UnsuitableLayerError: there is no MiCA for this type of layer.
    """
    check_type(adapter)
    layer = adapter.layer
    variant = MiCAEmbeddingVariant if isinstance(layer, lora.Embedding) else MiCALinearVariant
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
# the cast to fp32
# ---------------------------------------------------------------------------------------------------


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
