"""Where PEFT is told: one table of the functions that are replaced, checked before any is touched.

The functions of PEFT's own classes are replaced, not its classes: that reaches models wrapped before the
import, leaves nothing of this package in a pickle, and is undone by putting the old functions back.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import peft

from mica.backend import forget_prepared
from mica.fast import calls, initialisation, layers, loading, merging, quantised, refusals
from mica.fast.eligibility import quantised_layers


class Patch(NamedTuple):
    owner: str  # module, or module:Class
    name: str
    parameters: str  # what stock's signature must begin with
    wrap: Callable  # stock function -> the function that takes its place
    required: bool = True


_LAYER = "peft.tuners.lora.layer"
_VARIANTS = "peft.tuners.lora.variants"

PATCHES = (
    Patch(f"{_LAYER}:Linear", "forward", "self x *args **kwargs", layers.linear_forward),
    Patch(f"{_LAYER}:Embedding", "forward", "self x *args **kwargs", layers.embedding_forward),
    Patch(f"{_LAYER}:LoraLayer", "mica_init", "self adapter_name", initialisation.mica_init),
    Patch(f"{_LAYER}:Embedding", "mica_init", "self adapter_name", initialisation.mica_init),
    Patch(
        f"{_LAYER}:LoraLayer",
        "update_layer",
        "self adapter_name r lora_alpha config **kwargs",
        lambda stock: _covering(initialisation.update_layer(stock)),
    ),
    Patch(
        f"{_LAYER}:LoraLayer",
        "resolve_lora_variant",
        "self config **kwargs",
        initialisation.resolve_lora_variant,
    ),
    Patch(
        "peft.tuners.lora.model:LoraModel",
        "_create_and_replace",
        "self lora_config adapter_name target target_name parent current_key",
        initialisation.create_and_replace,
    ),
    Patch(
        "peft.tuners.lora.model:LoraModel",
        "inject_adapter",
        "self model adapter_name",
        initialisation.inject_adapter,
    ),
    Patch(
        "peft.tuners.lora.model:LoraModel",
        "add_weighted_adapter",
        "self adapters weights adapter_name",
        loading.add_weighted_adapter,
    ),
    *(
        Patch(
            owner,
            "forward",
            "self *args **kwargs",
            layers.whole_forward,
        )
        for owner in ("peft.tuners.tuners_utils:BaseTuner", "peft.peft_model:PeftModel")
    ),
    *(
        Patch(
            module,
            "cast_adapter_dtype",
            "model adapter_name autocast_adapter_dtype",
            initialisation.cast_adapter_dtype,
        )
        for module in ("peft.tuners.tuners_utils", "peft.functional")
    ),
    Patch("peft.peft_model:PeftModel", "from_pretrained", "cls model model_id", loading.load),
    Patch("peft.peft_model:PeftModel", "load_adapter", "self model_id adapter_name", loading.load),
    Patch(
        "peft.utils.hotswap",
        "hotswap_adapter_from_state_dict",
        "model state_dict adapter_name config",
        loading.hotswap_adapter_from_state_dict,
    ),
    Patch(
        "transformers.integrations.peft:PeftAdapterMixin",
        "load_adapter",
        "self peft_model_id adapter_name",
        loading.load,
        required=False,
    ),
    Patch(
        "peft.tuners.lora.model:LoraModel",
        "_add_targets_to_tie",
        "self peft_config tied_weight_keys",
        refusals.add_targets_to_tie,
        required=False,  # a PEFT without it does not tie adapters
    ),
    Patch("peft.tuners.lora.model:LoraModel", "merge_adapter", "self adapter_names", refusals.merge_adapter),
    *(
        Patch(
            f"peft.tuners.{model}",
            "_unload_and_optionally_merge",
            "self merge progressbar safe_merge adapter_names",
            refusals.unload_and_optionally_merge,
        )
        for model in ("lora.model:LoraModel", "mixed.model:MixedModel")
    ),
    *(
        # a script that has imported the function before this package keeps stock's
        Patch(
            module,
            "create_lorafa_optimizer",
            "model r lora_alpha lr",
            refusals.create_lorafa_optimizer,
            required=False,
        )
        for module in ("peft.optimizers.lorafa", "peft.optimizers")
    ),
    *(
        Patch(f"{_VARIANTS}:{variant}", name, "module active_adapter orig_weight", wrap)
        for variant in ("MiCALinearVariant", "MiCAEmbeddingVariant")
        for name, wrap in (
            ("merge_safe", merging.merge_safe),
            ("merge_unsafe", merging.merge_unsafe),
            ("unmerge", merging.unmerge),
        )
    ),
)


def _covering(update_layer):
    """The forward of a class over quantised weights is replaced when its first adapter is MiCA's.

    Not at import: PEFT's modules of these classes would import the quantisation libraries.
    """

    def covering(self, *args, **kwargs) -> None:
        update_layer(self, *args, **kwargs)
        if _installed and quantised.is_covered(type(self)):
            _cover(type(self))

    return covering


def _cover(layer_type: type) -> None:
    if layer_type in quantised_layers:
        return
    patch = Patch(
        f"{layer_type.__module__}:{layer_type.__name__}", "forward", "self x", layers.linear_forward
    )
    mismatch = _mismatch(patch)
    if mismatch:
        warnings.warn(f"{layer_type.__name__} runs PEFT's own forward: {mismatch}.", stacklevel=4)
        return
    if "forward" in vars(layer_type):  # torchao's inherits that of lora.Linear
        _replace(layer_type, patch)
    quantised_layers.add(layer_type)


_ABSENT = object()
_installed: list[tuple[object, str, object]] = []  # owner, name, what its __dict__ held


def _owner(path: str):
    module, _, name = path.partition(":")
    module = importlib.import_module(module)
    return getattr(module, name) if name else module


def _mismatch(patch: Patch) -> str | None:
    try:
        function = inspect.getattr_static(_owner(patch.owner), patch.name)
    except (ImportError, AttributeError):
        return f"{patch.owner}.{patch.name} is not there"
    function = getattr(function, "__func__", function)
    found = " ".join(
        str(p).split(":")[0].split("=")[0].strip() for p in inspect.signature(function).parameters.values()
    )
    if not f"{found} ".startswith(f"{patch.parameters} "):
        return f"{patch.owner}.{patch.name} takes ({found})"
    return None


def is_installed() -> bool:
    return bool(_installed)


def install() -> bool:
    """Replace the functions. False, with a warning and nothing touched, if PEFT is not as expected."""
    if _installed:
        return True
    mismatches = {patch: _mismatch(patch) for patch in PATCHES}
    required = [text for patch, text in mismatches.items() if text and patch.required]
    if required:
        warnings.warn(
            f"mica.fast leaves PEFT {peft.__version__} as it is, because it differs from the versions this "
            f"backend was written for: {'; '.join(required)}.",
            stacklevel=3,
        )
        return False
    for patch, mismatch in mismatches.items():
        if mismatch is None:
            _replace(_owner(patch.owner), patch)
    forget_prepared()  # PEFT may have edited B while nothing here was told
    return True


def _replace(owner, patch: Patch) -> None:
    held = vars(owner).get(patch.name, _ABSENT)
    attribute = inspect.getattr_static(owner, patch.name)
    kind = type(attribute) if isinstance(attribute, (staticmethod, classmethod)) else None
    stock = attribute.__func__ if kind else attribute
    replacement = functools.wraps(stock)(patch.wrap(stock))
    setattr(owner, patch.name, kind(replacement) if kind else replacement)
    _installed.append((owner, patch.name, held))


def uninstall() -> None:
    """Stock PEFT again: every replaced attribute is the very object that was there."""
    quantised_layers.clear()
    calls.forget()  # of what follows nothing is seen
    merging.end_period()
    while _installed:
        owner, name, held = _installed.pop()
        if held is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, held)
