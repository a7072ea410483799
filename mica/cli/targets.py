"""Which layers and stacks of experts of a model are adapted, in PEFT's terms.

In a mixture of experts the experts are stacks of one matrix each, single parameters (``target_parameters``).
Its routers, and the gates of its shared experts, are adapted only if they are named: a training that moves
them changes which expert learns what.
"""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from mica.errors import UsageError

ALL_LINEAR = "all-linear"


class Targets(NamedTuple):
    """What is adapted. ``modules``: name -> layer. ``parameters``: name -> the module that holds it.

    ``config``: what `LoraConfig` takes for both, ``target_modules`` and ``target_parameters``.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Module]
    config: dict[str, object]


def find_targets(model: nn.Module, names: str, experts: bool | None = None) -> Targets:
    """What is adapted for ``names``: "all-linear" or a list with commas, of layers and of parameters.

    ``experts``: all of them too, or none; None: those that ``names`` names. "all-linear" is without the
    output layer, routers, the gates of shared experts, and stacks of experts. The model is not changed.
    Modules that PEFT or MiCA refuses are among the targets.

    Raises UsageError if a name matches nothing.
    """
    modules, stacks, blocks = dict(model.named_modules()), stacks_of(model), _blocks(model)
    wanted = ALL_LINEAR
    if names != ALL_LINEAR:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
    every = [name for name, parameter in model.named_parameters() if parameter.dim() in (2, 3)]
    matched, parameters = dict(found := _matched(model, wanted)), dict(stacks) if experts else {}
    if wanted == ALL_LINEAR:
        matched = {name: module for name, module in found.items() if not _is_router(name, module, blocks)}
    else:
        for name in wanted:  # PEFT raises only if none matches
            ending = {key for key in every if _ends(key, [name])}
            parameters |= {key: modules[key.rpartition(".")[0]] for key in ending}
            if not ending and not any(_ends(key, [name]) for key in found):
                near = difflib.get_close_matches(name, {_leaf(key) for key in modules}, n=1)
                meant = "".join(f", did you mean '{one}'?" for one in near)
                raise UsageError(f"--target-modules {names}: no layer of the model is called '{name}'{meant}")
    own = re.compile(r"\.experts\.\d+\.")  # within an expert that is a module of its own
    if experts:
        linear = _matched(model, ALL_LINEAR)
        matched |= {name: module for name, module in linear.items() if own.search(name)}
    elif experts is not None:
        matched = {name: module for name, module in matched.items() if not own.search(name)}
        parameters = {name: module for name, module in parameters.items() if name not in stacks}
    renamed = _renamed(model, {_leaf(name) for name in matched}) if blocks else ()
    for name, module in list(matched.items()):
        is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2
        if is_matrix and (features(module) is None or _leaf(name) in renamed):
            parameters[f"{name}.weight"] = matched.pop(name)
    if not matched and not parameters:
        raise UsageError(f"--target-modules {names}: no layer of the model has such a name")
    if matched != found or (blocks and wanted == ALL_LINEAR):
        wanted = _shortened(matched, modules)
    elif wanted != ALL_LINEAR:
        wanted = [name for name in wanted if any(_ends(key, [name]) for key in matched)]
    stacked = _shortened(parameters, every) or None
    return Targets(matched, parameters, {"target_modules": wanted, "target_parameters": stacked})


def _matched(model: nn.Module, names: str | list[str]) -> dict[str, nn.Module]:
    """The modules that PEFT would take for ``names``, before its conversions for transformers 5."""
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules=names, task_type="CAUSAL_LM"), model)
    named = model.named_modules()
    return {name: module for name, module in named if name and check_target_module_exists(config, name)}


def stacks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The stacks of experts, by the names of the parameters: the module that holds each.

    A stack is a 3-d parameter of a module of experts; biases, and the weights of convolutions, are none.
    """
    return {
        f"{name}.{key}": module
        for name, module in model.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def has_experts(model: nn.Module) -> bool:
    """Whether the model is a mixture of experts that can be adapted."""
    return bool(_blocks(model))


def _blocks(model: nn.Module) -> dict[str, int]:
    """The modules around experts, and how many these are: as stacks, or each a module of its own."""
    blocks = {}
    for name, module in stacks_of(model).items():
        experts, _, key = name.rpartition(".")
        blocks[experts.rpartition(".")[0]] = getattr(module, key).shape[0]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _leaf(name) == "experts":
            blocks[name.rpartition(".")[0]] = len(module)
    return blocks


def _is_router(name: str, module: nn.Module, blocks: dict[str, int]) -> bool:
    """Whether a layer chooses experts, or weights shared ones, by its place and its number of outputs."""
    for block, count in blocks.items():
        first = name.removeprefix(f"{block}.").partition(".")[0]
        if name.startswith(f"{block}.") and ("gate" in first or "router" in first):
            return (features(module) or (0,))[0] in (1, count)
    return False


def _renamed(model: nn.Module, leaves: Iterable[str]) -> set[str]:
    """Those of the last parts of layers' names that PEFT takes for names of experts.

    It does so for models whose experts were layers before transformers 5, also where the layer is a shared
    expert's, when an adapter is created and when it is loaded. Named by its weight it is left alone.
    """
    renamed = set()
    for leaf in leaves:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # gate_proj without up_proj
            renamed.add(leaf)
        if not config.target_modules:
            renamed.add(leaf)
    return renamed


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _shortened(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Without what is before the number of the layer, where that matches no others ``among`` them."""
    short = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in names})
    return short if {name for name in among if _ends(name, short)} == set(names) else sorted(names)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a layer, quantised or not; None for what PEFT cannot adapt.

    The shape of the weight would not do: it may be packed, and Conv1D's is transposed.
    """
    for names in (("out_features", "in_features"), ("nf", "nx"), ("embedding_dim", "num_embeddings")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes
    return None


def saved_parameters(model: nn.Module, target_parameters: Iterable[str]) -> dict[str, tuple[str, tuple]]:
    """Name in an adapter's file -> (name of the parameter, its shape).

    The shape is (experts, out_features, in_features), or without the first. PEFT nests the adapters of one
    module's parameters; the first parameter's is the innermost.
    """
    found = {}
    for module_name, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        adapted = [item for item in own if _ends(f"{module_name}.{item[0]}", target_parameters)]
        for depth, (key, parameter) in enumerate(reversed(adapted)):
            shape = tuple(parameter.shape)
            if len(shape) == 3 and getattr(module, "is_transposed", False):
                shape = (shape[0], shape[2], shape[1])
            found[module_name + depth * ".base_layer"] = f"{module_name}.{key}", shape
    return found
