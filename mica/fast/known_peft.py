"""Which releases of PEFT this backend knows, and which of their functions it computes itself.

A release that is not in `KNOWN` may compute something else in a function whose signature is the old one. So
there the bodies of the functions that this backend repeats are compared, by their hashes, with those of the
known releases. What differs is left to PEFT, part by part, and one sentence says so.

To add a release: install it, append its number to `KNOWN`, and run tests/mica/fast/test_known_peft.py. What
"has another body" there has changed in PEFT. Read the change, follow it in this package, and append the new
hash, ``body_hash(find(name))``. In the test `UNKNOWN` and `BEGIN` must name a release that is still to come
and the new range, and so must the backend's page (mica/fast/README.md). Then all tests, and PEFT's own with
the backend (`make conformance`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable
from itertools import chain

# Tested: 0.20.0 and 0.21.2. Between them the functions below read alike.
KNOWN = ("0.20.0", "0.21.0", "0.21.1", "0.21.2")

# The parts of the backend that can be left to PEFT alone, as they are called in messages.
LINEAR = "the forward of linear layers"
DORA = "DoRA"
EMBEDDING = "the forward of embeddings"
EXPERTS = "the forward of experts"
INITIALISATION = "the initialisation"
MERGING = "merging"
PARTS = (INITIALISATION, LINEAR, DORA, EMBEDDING, EXPERTS, MERGING)

_LAYERS = "peft.tuners.lora.layer"
_VARIANTS = "peft.tuners.lora.variants"
_DORA = "peft.tuners.lora.dora"


def _merging_of(variant: str) -> dict[str, str]:
    return {
        f"{_VARIANTS}:{variant}.merge_safe": "b64fe2ca2dd0",
        f"{_VARIANTS}:{variant}.merge_unsafe": "3b79e81e5c9b",
        f"{_VARIANTS}:{variant}.unmerge": "95cd37ce2f3c",
    }


# Part -> the functions of PEFT whose results it computes itself -> their `body_hash` in the known releases,
# several separated by a space. Functions that are replaced by one that calls them are not here: what they do
# in another release is done.
REPEATED: dict[str, dict[str, str]] = {
    INITIALISATION: {
        f"{_LAYERS}:LoraLayer.mica_init": "06bddcd47e98",
        f"{_LAYERS}:Embedding.mica_init": "3eeb63d64fe4",
    },
    LINEAR: {
        f"{_LAYERS}:Linear.forward": "5cd0508e909e",
        f"{_VARIANTS}:MiCALinearVariant.forward": "e1e338634b72",
        "peft.tuners.tuners_utils:BaseTunerLayer._cast_input_dtype": "f8fd780187a6",
    },
    DORA: {
        f"{_VARIANTS}:DoraLinearVariant.forward": "c2c574803a3d",
        f"{_DORA}:DoraLinearLayer.forward": "0ae419adeea9",
        f"{_DORA}:DoraLinearLayer.get_weight_norm": "5df1653c3671",
        f"{_DORA}:DoraLinearLayer.get_lora_weight": "c5e723904092",
        f"{_VARIANTS}:DoraLinearVariant.merge_safe": "8f8f6b278d75 ad2431ca53a7",
        f"{_VARIANTS}:DoraLinearVariant.merge_unsafe": "5cd760e10814 442f807452c5",
        f"{_VARIANTS}:DoraLinearVariant.unmerge": "f71767eea7b9 d26dde7faab7",
    },
    EMBEDDING: {
        f"{_LAYERS}:Embedding.forward": "8eff94c7871d",
        f"{_LAYERS}:Embedding._embed": "d7a766691d06",
        f"{_VARIANTS}:MiCAEmbeddingVariant.forward": "36616974ea94",
    },
    EXPERTS: {
        f"{_LAYERS}:ParamWrapper.forward": "56195428bc97",
        f"{_LAYERS}:ParamWrapper.get_delta_weight": "fc97b3e61f3d",
        f"{_LAYERS}:ParamWrapper._activate_lora": "0d7e26933547 561eba5e7024",
    },
    MERGING: {
        f"{_LAYERS}:Linear.merge": "52919e1daf19 111a2b7663d7",
        f"{_LAYERS}:Linear.unmerge": "0d38194512f8",
        f"{_LAYERS}:Linear.get_delta_weight": "3fe2e19f59b7",
        f"{_LAYERS}:Embedding.get_delta_weight": "19bc770bacbc",
        f"{_LAYERS}:ParamWrapper.merge": "df08e590cb35",
        f"{_LAYERS}:ParamWrapper.unmerge": "e38d5b246c3a",
        **_merging_of("MiCALinearVariant"),
        **_merging_of("MiCAEmbeddingVariant"),
    },
}
# The same for PEFT's classes over quantised weights, whose modules are imported with the first such layer.
QUANTISED = {
    "peft.tuners.lora.bnb:Linear4bit.forward": "e2fdca4a0ad0",
    "peft.tuners.lora.bnb:Linear8bitLt.forward": "4c5827e76d76",
    "peft.tuners.lora.hqq:HqqLoraLinear.forward": "b7d0bfd3b904",
}
# What `merge.unloading` rests on: PEFT takes each layer out of the model right after its merge.
UNLOADING = {
    "peft.tuners.lora.model:LoraModel._unload_and_optionally_merge": "29f98f2d252b 0a336c534cd2",
    "peft.tuners.lora.model:LoraModel._replace_module": "7cf1c9fc0f01",
    f"{_LAYERS}:ParamWrapper.unload_and_optionally_merge_module": "14676ad4ea2a",
}

# What was left to PEFT when this package was installed: part -> why. Changed by `patching` only.
left: dict[str, list[str]] = {}


def find(name: str):
    """What "module:Class.function", or "module:Class", names.

    Raises:
        ImportError, AttributeError: there is no such thing.
    """
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        found = inspect.getattr_static(found, part)
    return found


def difference(name: str, hashes: str) -> str | None:
    """How the function "module:Class.function" differs from the known ones; None if it does not."""
    try:
        function = find(name)
    except (ImportError, AttributeError):
        return f"{name} is not there"
    found = body_hash(getattr(function, "__func__", function))
    if found is None:
        return f"{name} cannot be read"
    if found not in hashes.split():
        return f"{name} has another body"
    return None


def differences() -> dict[str, list[str]]:
    """The parts whose functions do not read as in the known releases -> how they differ."""
    found = {}
    for part, functions in REPEATED.items():
        for name, hashes in functions.items():
            reason = difference(name, hashes)
            if reason is not None:
                found.setdefault(part, []).append(reason)
    return found


def unloads_as_known() -> bool:
    """Whether the installed release unloads a model as the known ones do."""
    return not any(difference(name, hashes) for name, hashes in UNLOADING.items())


def sentence(version: str) -> str | None:
    """What runs on this backend with this release of PEFT, and what does not; None if all does, as known.

    About the parts that are now in `left`.
    """
    known = version in KNOWN
    if known and not left:
        return None
    begin = f"mica.fast with PEFT {version}"
    if not known:
        begin += f", which it does not know (it was written for {KNOWN[0]} to {KNOWN[-1]})"
    if not left:
        return f"{begin}: all that it replaces is unchanged there, so all of it runs on this backend."
    because = "; ".join(dict.fromkeys(chain.from_iterable(left.values())))  # each reason once
    rest = [part for part in PARTS if part not in left]
    ours = _listed(rest or ["nothing"])
    return f"{begin}: PEFT's own code runs {_listed(left)}, because {because}; this backend runs {ours}."


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return " and ".join(filter(None, [", ".join(first), last]))


# ---------------------------------------------------------------------------------------------------
# what a function computes
# ---------------------------------------------------------------------------------------------------

# Fields of a syntax tree that change no result, or that only some versions of Python have.
_NO_RESULT = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


@functools.lru_cache(maxsize=256)  # it takes milliseconds, and a function does not change
def body_hash(function: Callable) -> str | None:
    """A hash of what the function computes; None if its source cannot be read.

    Comments, docstrings, types and the texts of errors have no part in it, and it is the same in all
    versions of Python. For a function in decorators that say what they wrap, it is the innermost function's.
    """
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    if source[0].isspace():  # a method's, which alone is no program
        source = f"if True:\n{source}"
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    definition = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if definition is None:  # a lambda
        return None
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    return hashlib.sha256(_outline(definition).encode()).hexdigest()[:12]


def _outline(node) -> str:
    if isinstance(node, ast.Raise):
        return "Raise"
    if isinstance(node, list):
        return "[" + ",".join(map(_outline, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={_outline(value)}"
        for name, value in ast.iter_fields(node)
        if name not in _NO_RESULT and value not in (None, [])
    ]
    return f"{type(node).__name__}({','.join(fields)})"
