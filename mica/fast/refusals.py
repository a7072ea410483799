"""What cannot be done with MiCA is refused before anything has changed; stock PEFT is silently wrong."""

from __future__ import annotations

from collections import defaultdict

from peft.tuners import lora
from torch import nn
from torch.nn.utils import parametrize

from mica.fast.forward import tensor_parallel
from mica.fast.forward.eligibility import is_mica
from mica.fast.forward.expert_params import weight_name
from mica.fast.merge.unloading import lora_layers, requested
from mica.fast.settings import while_enabled
from mica.memory import TENSOR_TYPES


def check_model(model, call: str) -> None:
    """Raise TypeError if the argument of this public call is not a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"mica.fast.{call}(model) needs a torch.nn.Module, for instance what get_peft_model returned, "
            f"but model is a {type(model).__name__}."
        )


# ---------------------------------------------------------------------------------------------------
# merging into a weight that is computed
# ---------------------------------------------------------------------------------------------------


def check_weight(layer: nn.Module, name: str | None = None, verb: str = "merged into") -> None:
    """Refuse a merge into, or an unmerge from, a weight that cannot be changed.

    Raises:
        ValueError: the base layer's weight is computed from other parameters, so a change of it would be
            lost; or it is split among processes, where PEFT multiplies parts with whole tensors.
    """
    base_layer = layer.get_base_layer()
    called = f"layer {name!r}" if name else f"this {type(base_layer).__name__} layer"
    if tensor_parallel.plan_of(base_layer) is not None:
        raise ValueError(
            f"MiCA cannot be {verb} {called} under tensor parallelism: save the adapter, and merge it in a "
            "process that holds the whole model."
        )
    weight = weight_name(layer)
    is_set_by_hook = weight in vars(base_layer)  # before every forward, where it was a parameter
    if parametrize.is_parametrized(base_layer, weight) or is_set_by_hook:
        raise ValueError(
            f"MiCA cannot be {verb} {called}, because its weight is computed from other parameters "
            "(weight_norm, parametrization, pruning) and the change would be lost: make it a parameter "
            "first, by remove_parametrizations, remove_weight_norm or prune.remove of torch.nn.utils."
        )


def check_weights(layers: dict[lora.LoraLayer, list[str]], adapter_names) -> None:
    """Refuse what cannot be merged of MiCA adapters with these names, or of the active ones.

    layers: `lora_layers` of a model.

    Raises:
        ValueError: see `check_weight`; or several adapted layers have the same weight.
    """
    layers_of = defaultdict(dict)  # address of a weight -> name of a layer -> whether it has MiCA
    for layer, (name, *_) in layers.items():
        names = set(requested(layer, adapter_names))
        if any(is_mica(layer, adapter) for adapter in names - set(layer.merged_adapters)):
            check_weight(layer, name)
        adapters = names.union(layer.merged_adapters).intersection({*layer.lora_A, *layer.lora_embedding_A})
        if adapters:
            has_mica = any(is_mica(layer, adapter) for adapter in adapters)
            layers_of[_address_of_weight(layer)][name] = has_mica
    for sharing in layers_of.values():
        if len(sharing) > 1 and any(sharing.values()):
            raise ValueError(
                f"MiCA cannot be merged into layers {' and '.join(map(repr, sharing))}, because they share "
                "one base weight, and each would get the updates of all: give all but one a weight of its "
                "own first (layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.clone()); "
                "for tied embeddings also model.config.tie_word_embeddings = False)."
            )


def _address_of_weight(layer: lora.LoraLayer) -> int:
    # not its attribute: transformers 5.20 gives HQQ's layers a property, which makes a tensor at each look
    weight = layer.get_base_layer()._parameters.get(weight_name(layer))
    if type(weight) in TENSOR_TYPES and weight.data_ptr():
        return weight.data_ptr()
    return id(layer) if weight is None else id(weight)  # offloaded, quantised or sharded


@while_enabled
def merge_adapter(stock, self, adapter_names=None, *args, **kwargs) -> None:
    """All layers are checked before the first is merged: no model is left half merged."""
    check_weights(lora_layers(self.model), adapter_names)
    return stock(self, adapter_names, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------
# optimisers
# ---------------------------------------------------------------------------------------------------


@while_enabled
def create_lorafa_optimizer(stock, model, *args, **kwargs):
    """LoRA-FA freezes A and trains B; with MiCA's frozen B nothing is left."""
    for layer, (name, *_) in lora_layers(model).items():
        for adapter in layer.active_adapters:
            if is_mica(layer, adapter):
                raise ValueError(
                    f"create_lorafa_optimizer trains only B, but adapter {adapter!r} is MiCA on layer "
                    f"{name!r}, which trains only A: use an ordinary optimizer, for instance "
                    "torch.optim.AdamW."
                )
    return stock(model, *args, **kwargs)
