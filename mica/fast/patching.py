"""The table of PEFT's functions that are replaced, all of them checked before the first is touched.

Functions of PEFT's own classes are replaced, not the classes: that reaches models wrapped before the import,
leaves nothing of this package in a pickle, and is undone by putting the old functions back.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import peft

from mica.fast import known_peft, loading, refusals, saving
from mica.fast.caches import clear_caches
from mica.fast.create import initialisation, quantised
from mica.fast.forward import decide, experts, layer_calls
from mica.fast.forward.eligibility import quantised_layers
from mica.fast.known_peft import EMBEDDING, EXPERTS, LINEAR, MERGING
from mica.fast.merge import experts as merging_of_experts
from mica.fast.merge import merging, plain_lora, reporting


class Patch(NamedTuple):
    """One function of PEFT, and what takes its place.

    Attributes:
        owner: Where the function is: "module" or "module:Class".
        name: The name of the function.
        parameters: The names with which the signature of PEFT's function must begin.
        wrap: A function from PEFT's function to the one that takes its place.
        required: Whether PEFT is left as it is where it has no such function.
        part: A part in `known_peft`, which alone is left to PEFT where the function differs; None for none.
    """

    owner: str
    name: str
    parameters: str
    wrap: Callable
    required: bool = True
    part: str | None = None


_LAYERS = "peft.tuners.lora.layer"
_LINEAR = f"{_LAYERS}:Linear"
_EMBEDDING = f"{_LAYERS}:Embedding"
_MODEL = "peft.tuners.lora.model:LoraModel"
_MIXED = "peft.tuners.mixed.model:MixedModel"
_PEFT_MODEL = "peft.peft_model:PeftModel"
_CONFIG = "peft.config:PeftConfigMixin"
_HUGGING_FACE = "transformers.integrations.peft:PeftAdapterMixin"

_FORWARD = "self x *args **kwargs"
_WHOLE = ("forward", "self *args **kwargs", layer_calls.whole_forward)
_CAST = ("cast_adapter_dtype", "model adapter_name autocast_adapter_dtype", initialisation.cast_adapter_dtype)
_UNLOAD = (
    "_unload_and_optionally_merge",
    "self merge progressbar safe_merge adapter_names",
    reporting.unload_and_optionally_merge,
)
_INJECT = (
    "inject_adapter",
    "self model adapter_name",
    lambda stock: _cover_classes_after(initialisation.inject_adapter(stock)),
)
_LORAFA = ("create_lorafa_optimizer", "model r lora_alpha lr", refusals.create_lorafa_optimizer, False)
_SET = (
    "set_peft_model_state_dict",
    "model peft_model_state_dict adapter_name",
    loading.set_state_dict,
    False,
)
_SETTERS = ("peft.utils.save_and_load", "peft.utils", "peft.peft_model", "peft.functional", "peft")
_MERGES = {"merge_safe": merging.merge_safe, "merge_unsafe": merging.merge_unsafe, "unmerge": merging.unmerge}


def _optional_part(name: str, parameters: str, wrap: Callable, part: str) -> Patch:
    """For `target_parameters`, on which a PEFT without this class has no MiCA."""
    return Patch(f"{_LAYERS}:ParamWrapper", name, parameters, wrap, required=False, part=part)


PATCHES = (
    Patch(_LINEAR, "forward", _FORWARD, decide.linear_forward, part=LINEAR),
    Patch(_EMBEDDING, "forward", _FORWARD, decide.embedding_forward, part=EMBEDDING),
    _optional_part("forward", _FORWARD, experts.experts_forward, EXPERTS),
    Patch("peft.tuners.tuners_utils:BaseTuner", *_WHOLE),
    Patch(_PEFT_MODEL, *_WHOLE),
    Patch(_LINEAR, "merge", "self safe_merge adapter_names", plain_lora.merge, part=MERGING),
    Patch(_LINEAR, "unmerge", "self", plain_lora.unmerge, part=MERGING),
    _optional_part("merge", "self safe_merge adapter_names", merging_of_experts.merge, MERGING),
    _optional_part("unmerge", "self", merging_of_experts.unmerge, MERGING),
    Patch(_MODEL, *_INJECT),
    Patch(_MIXED, *_INJECT),
    Patch("peft.tuners.tuners_utils", *_CAST),
    Patch("peft.functional", *_CAST),
    Patch(_PEFT_MODEL, "from_pretrained", "cls model model_id", loading.load),
    Patch(_CONFIG, "save_pretrained", "self save_directory **kwargs", saving.save_config),
    Patch(
        _CONFIG,
        "from_pretrained",
        "cls pretrained_model_name_or_path subfolder **kwargs",
        loading.find_base,
        required=False,
    ),
    Patch("peft.tuners.lora.config:LoraConfig", "__post_init__", "self", saving.read_config),
    Patch(_PEFT_MODEL, "load_adapter", "self model_id adapter_name", loading.load),
    Patch(_HUGGING_FACE, "load_adapter", "self peft_model_id adapter_name", loading.load, required=False),
    Patch(_MODEL, "add_weighted_adapter", "self adapters weights adapter_name", loading.add_weighted_adapter),
    # a script that imported the function before this package keeps stock's
    *(Patch(module, *_SET) for module in _SETTERS),
    Patch(
        "peft.utils.hotswap",
        "hotswap_adapter_from_state_dict",
        "model state_dict adapter_name config",
        loading.hotswap_adapter_from_state_dict,
    ),
    Patch(_MODEL, "merge_adapter", "self adapter_names", refusals.merge_adapter),
    Patch(_MODEL, *_UNLOAD),
    Patch(_MIXED, *_UNLOAD),
    # a script that imported the function before this package keeps stock's
    Patch("peft.optimizers.lorafa", *_LORAFA),
    Patch("peft.optimizers", *_LORAFA),
    *(
        Patch(
            f"peft.tuners.lora.variants:{variant}",
            name,
            "module active_adapter orig_weight",
            wrap,
            part=MERGING,
        )
        for variant in ("MiCALinearVariant", "MiCAEmbeddingVariant")
        for name, wrap in _MERGES.items()
    ),
)


def _cover_classes_after(inject_adapter):
    """Replace the forward of each class over quantised weights that gets its first adapter.

    Not at import: PEFT's modules of these classes would import the quantisation libraries.
    """

    def inject_and_cover(self, model, *args, **kwargs) -> None:
        inject_adapter(self, model, *args, **kwargs)
        for cls in {type(module) for module in model.modules()}:
            if _installed and cls not in quantised_layers and quantised.is_covered(cls):
                _cover(cls)

    return inject_and_cover


def _cover(cls: type) -> None:
    has_own_forward = "forward" in vars(cls)  # torchao's inherits that of lora.Linear
    if not has_own_forward and LINEAR in known_peft.left:
        return
    patch = Patch(f"{cls.__module__}:{cls.__name__}", "forward", "self x", decide.linear_forward)
    why_not = mismatch(patch)
    if why_not is None and has_own_forward:
        why_not = _other_body(patch)
    if why_not is not None:
        warnings.warn(f"{cls.__name__} runs PEFT's own forward: {why_not}.", stacklevel=4)
        return
    if has_own_forward:
        _replace(cls, patch)
    quantised_layers.add(cls)


def _other_body(patch: Patch) -> str | None:
    """How the forward of a quantised class differs in a PEFT that is not known; None if it does not."""
    name = f"{patch.owner}.{patch.name}"
    if peft.__version__ in known_peft.KNOWN or name not in known_peft.QUANTISED:
        return None
    return known_peft.difference(name, known_peft.QUANTISED[name])


_ABSENT = object()
# The owner of each replaced function, its name, and what the owner's __dict__ held
_installed: list[tuple[object, str, object]] = []


def _attribute(patch: Patch) -> object | None:
    """What the patch replaces, perhaps a static or class method; None where there is no such thing."""
    try:
        return inspect.getattr_static(known_peft.find(patch.owner), patch.name)
    except (ImportError, AttributeError):
        return None


def mismatch(patch: Patch) -> str | None:
    """How the function differs from what the patch was written for; None if it does not."""
    attribute = _attribute(patch)
    if attribute is None:
        return f"{patch.owner}.{patch.name} is not there"
    signature = inspect.signature(getattr(attribute, "__func__", attribute))
    parameters = [re.match(r"\**\w+", str(parameter))[0] for parameter in signature.parameters.values()]
    expected = patch.parameters.split()
    if parameters[: len(expected)] == expected:
        return None
    return f"{patch.owner}.{patch.name} takes ({' '.join(parameters)})"


class Comparison(NamedTuple):
    """How the installed PEFT differs from what `PATCHES` was written for.

    Attributes:
        refused: Why PEFT is left as it is.
        left: Why PEFT's own code runs a part of the backend, by the name of the part.
        patches: Those that are made: none of these parts, nor of functions that need not be there and differ.
    """

    refused: list[str]
    left: dict[str, list[str]]
    patches: list[Patch]


def compare() -> Comparison:
    refused = []
    matching = []
    left = {}
    if peft.__version__ not in known_peft.KNOWN:
        left = known_peft.differences()
    for patch in PATCHES:
        text = mismatch(patch)
        if text is None:
            matching.append(patch)
        elif patch.part is not None and _attribute(patch) is not None:
            left.setdefault(patch.part, []).append(text)
        elif patch.required:
            refused.append(text)
    return Comparison(refused, left, [patch for patch in matching if patch.part not in left])


def is_installed() -> bool:
    return bool(_installed)


def install() -> bool:
    """Replace the functions. False, with a warning and nothing touched, if PEFT is not as expected.

    A warning says so, too, where a part of them is left to PEFT, or PEFT is of a release that is not known.
    """
    if _installed:
        return True
    found = compare()
    known_peft.left.clear()
    if found.refused:
        warnings.warn(
            f"mica.fast leaves PEFT {peft.__version__} as it is, because it differs from the versions this "
            f"backend was written for: {'; '.join(found.refused)}.",
            stacklevel=3,
        )
        return False
    known_peft.left.update(found.left)
    for patch in found.patches:
        _replace(known_peft.find(patch.owner), patch)
    sentence = known_peft.sentence(peft.__version__)
    if sentence is not None:
        warnings.warn(sentence, stacklevel=3)
    clear_caches()  # stock PEFT may have edited B unnoticed
    return True


def _replace(owner, patch: Patch) -> None:
    before = vars(owner).get(patch.name, _ABSENT)
    attribute = inspect.getattr_static(owner, patch.name)
    stock = getattr(attribute, "__func__", attribute)
    replacement = functools.wraps(stock)(patch.wrap(stock))
    if stock is attribute:
        setattr(owner, patch.name, replacement)
    else:  # a static or class method
        setattr(owner, patch.name, type(attribute)(replacement))
    _installed.append((owner, patch.name, before))


def uninstall() -> None:
    """Stock PEFT again: every replaced attribute is the very object that was there."""
    quantised_layers.clear()
    layer_calls.clear()  # from here on nothing is counted
    merging.end_period()
    while _installed:
        owner, name, before = _installed.pop()
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
