"""The table of PEFT's functions that are replaced, all of them checked before the first is touched.

Functions of PEFT's own classes are replaced, not the classes: that reaches models wrapped before the import,
leaves nothing of this package in a pickle, and is undone by putting the old functions back.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import peft

from mica.fast import loading, refusals, saving
from mica.fast.caches import clear_caches
from mica.fast.create import initialisation, quantised
from mica.fast.forward import call_counts, decide, experts
from mica.fast.forward.eligibility import quantised_layers
from mica.fast.merge import experts as merging_of_experts
from mica.fast.merge import merging


class Patch(NamedTuple):
    owner: str  # module, or module:Class
    name: str
    parameters: str  # what stock's signature must begin with; "a|b": either name
    wrap: Callable  # stock function -> the function that takes its place
    required: bool = True


_LAYERS, _VARIANTS = "peft.tuners.lora.layer", "peft.tuners.lora.variants"
_LAYER, _LINEAR, _EMBEDDING = f"{_LAYERS}:LoraLayer", f"{_LAYERS}:Linear", f"{_LAYERS}:Embedding"
_PARAMETER = f"{_LAYERS}:ParamWrapper"  # in a PEFT without it there is no MiCA on `target_parameters`
_MODEL, _PEFT_MODEL = "peft.tuners.lora.model:LoraModel", "peft.peft_model:PeftModel"
_CONFIG, _HUGGING_FACE = "peft.config:PeftConfigMixin", "transformers.integrations.peft:PeftAdapterMixin"

_FORWARD, _UPDATE = "self x *args **kwargs", "self adapter_name r lora_alpha config **kwargs"
# the other name is that of axolotl's wrapper for Gemma 4, which may be there first
_CREATE = "self lora_config|peft_config adapter_name target target_name parent current_key"
_WHOLE = ("forward", "self *args **kwargs", call_counts.whole_forward)
_CAST = ("cast_adapter_dtype", "model adapter_name autocast_adapter_dtype", initialisation.cast_adapter_dtype)
_UNLOAD, _UNLOADED = "_unload_and_optionally_merge", "self merge progressbar safe_merge adapter_names"
_LORAFA = ("create_lorafa_optimizer", "model r lora_alpha lr", refusals.create_lorafa_optimizer, False)
_PRETRAINED = "cls pretrained_model_name_or_path subfolder **kwargs"
_TIE = ("_add_targets_to_tie", "self peft_config tied_weight_keys")  # a PEFT without it ties no adapters
_SET = ("set_peft_model_state_dict", "model peft_model_state_dict adapter_name", loading.set_state_dict)
_SETTERS = ("peft.utils.save_and_load", "peft.utils", "peft.peft_model", "peft.functional", "peft")
_SWAP = ("hotswap_adapter_from_state_dict", "model state_dict adapter_name config")

PATCHES = (
    Patch(_LINEAR, "forward", _FORWARD, decide.linear_forward),
    Patch(_EMBEDDING, "forward", _FORWARD, decide.embedding_forward),
    Patch(_PARAMETER, "forward", _FORWARD, experts.experts_forward, required=False),
    Patch("peft.tuners.tuners_utils:BaseTuner", *_WHOLE),
    Patch(_PEFT_MODEL, *_WHOLE),
    Patch(_LAYER, "mica_init", "self adapter_name", initialisation.mica_init),
    Patch(_EMBEDDING, "mica_init", "self adapter_name", initialisation.mica_init),
    Patch(_LAYER, "update_layer", _UPDATE, lambda stock: _covering(initialisation.update_layer(stock))),
    Patch(_PARAMETER, "update_layer", _UPDATE, initialisation.update_layer, required=False),
    Patch(_PARAMETER, "merge", "self safe_merge adapter_names", merging_of_experts.merge, required=False),
    Patch(_PARAMETER, "unmerge", "self", merging_of_experts.unmerge, required=False),
    Patch(_LAYER, "resolve_lora_variant", "self config **kwargs", initialisation.resolve_lora_variant),
    Patch(_MODEL, "_create_and_replace", _CREATE, initialisation.create_and_replace),
    Patch(_MODEL, "inject_adapter", "self model adapter_name", initialisation.inject_adapter),
    Patch("peft.tuners.tuners_utils", *_CAST),
    Patch("peft.functional", *_CAST),
    Patch(_PEFT_MODEL, "from_pretrained", "cls model model_id", loading.load),
    Patch(_CONFIG, "save_pretrained", "self save_directory **kwargs", saving.save_config),
    Patch(_CONFIG, "from_pretrained", _PRETRAINED, loading.find_base, required=False),
    Patch("peft.tuners.lora.config:LoraConfig", "__post_init__", "self", saving.read_config),
    Patch(_PEFT_MODEL, "load_adapter", "self model_id adapter_name", loading.load),
    Patch(_HUGGING_FACE, "load_adapter", "self peft_model_id adapter_name", loading.load, required=False),
    Patch(_MODEL, "add_weighted_adapter", "self adapters weights adapter_name", loading.add_weighted_adapter),
    # a script that imported the function before this package keeps stock's
    *(Patch(module, *_SET, required=False) for module in _SETTERS),
    Patch("peft.utils.hotswap", *_SWAP, loading.hotswap_adapter_from_state_dict),
    Patch(_MODEL, *_TIE, refusals.add_targets_to_tie, required=False),
    Patch(_MODEL, "merge_adapter", "self adapter_names", refusals.merge_adapter),
    Patch(_MODEL, _UNLOAD, _UNLOADED, refusals.unload_and_optionally_merge),
    Patch("peft.tuners.mixed.model:MixedModel", _UNLOAD, _UNLOADED, refusals.unload_and_optionally_merge),
    # a script that imported the function before this package keeps stock's
    Patch("peft.optimizers.lorafa", *_LORAFA),
    Patch("peft.optimizers", *_LORAFA),
    *(
        Patch(f"{_VARIANTS}:{variant}", name, "module active_adapter orig_weight", getattr(merging, name))
        for variant in ("MiCALinearVariant", "MiCAEmbeddingVariant")
        for name in ("merge_safe", "merge_unsafe", "unmerge")
    ),
)


def _covering(update_layer):
    """Replaces the forward of a class over quantised weights when it gets its first adapter.

    Not at import: PEFT's modules of these classes would import the quantisation libraries.
    """

    def covering(self, *args, **kwargs) -> None:
        update_layer(self, *args, **kwargs)
        cls = type(self)
        if not _installed or cls in quantised_layers or not quantised.is_covered(cls):
            return
        patch = Patch(f"{cls.__module__}:{cls.__name__}", "forward", "self x", decide.linear_forward)
        if text := mismatch(patch):
            warnings.warn(f"{cls.__name__} runs PEFT's own forward: {text}.", stacklevel=3)
            return
        if "forward" in vars(cls):  # torchao's inherits that of lora.Linear
            _replace(cls, patch)
        quantised_layers.add(cls)

    return covering


_ABSENT = object()
_installed: list[tuple[object, str, object]] = []  # owner, name, what its __dict__ held


def owner_of(patch: Patch):
    module, _, name = patch.owner.partition(":")
    module = importlib.import_module(module)
    return getattr(module, name) if name else module


def mismatch(patch: Patch) -> str | None:
    """How the function differs from what the patch was written for; None if it does not."""
    try:
        function = inspect.getattr_static(owner_of(patch), patch.name)
    except (ImportError, AttributeError):
        return f"{patch.owner}.{patch.name} is not there"
    function = getattr(function, "__func__", function)
    signature = inspect.signature(function).parameters.values()
    parameters = [str(parameter).split(":")[0].split("=")[0].strip() for parameter in signature]
    expected = [names.split("|") for names in patch.parameters.split()]
    fits = all(name in names for name, names in zip(parameters, expected, strict=False))
    if fits and len(parameters) >= len(expected):
        return None
    return f"{patch.owner}.{patch.name} takes ({' '.join(parameters)})"


def is_installed() -> bool:
    return bool(_installed)


def install() -> bool:
    """Replace the functions. False, with a warning and nothing touched, if PEFT is not as expected."""
    if _installed:
        return True
    mismatches = {patch: mismatch(patch) for patch in PATCHES}
    required = [text for patch, text in mismatches.items() if text and patch.required]
    if required:
        warnings.warn(
            f"mica.fast leaves PEFT {peft.__version__} as it is, because it differs from the versions this "
            f"backend was written for: {'; '.join(required)}.",
            stacklevel=3,
        )
        return False
    for patch, text in mismatches.items():
        if text is None:
            _replace(owner_of(patch), patch)
    clear_caches()  # stock PEFT may have edited B unnoticed
    return True


def _replace(owner, patch: Patch) -> None:
    before = vars(owner).get(patch.name, _ABSENT)
    attribute = inspect.getattr_static(owner, patch.name)
    kind = type(attribute) if isinstance(attribute, (staticmethod, classmethod)) else None
    stock = attribute.__func__ if kind else attribute
    replacement = functools.wraps(stock)(patch.wrap(stock))
    setattr(owner, patch.name, kind(replacement) if kind else replacement)
    _installed.append((owner, patch.name, before))


def uninstall() -> None:
    """Stock PEFT again: every replaced attribute is the very object that was there."""
    quantised_layers.clear()
    call_counts.clear()  # from here on nothing is counted
    merging.end_period()
    while _installed:
        owner, name, before = _installed.pop()
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
