"""Which layers and stacks of experts of a model are adapted, in PEFT's terms.

In a mixture of experts the experts are stacks of one matrix each, single parameters (``target_parameters``).
Its routers, and the gates of its shared experts, are adapted only if they are named: a training that moves
them changes which expert learns what.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from mica.cli.arguments import similar
from mica.cli.output import size_text
from mica.errors import UsageError

Modules = dict[str, nn.Module]  # by name
ALL_LINEAR = "all-linear"
_IN_AN_EXPERT = re.compile(r"\.experts\.\d+\.")  # that is a module of its own, not a part of a stack


class Targets(NamedTuple):
    """What is adapted.

    ``modules``: the layers, by name. ``parameters``: for the name of each adapted parameter, the module that
    holds it. ``config``: what `LoraConfig` takes for both, as ``target_modules`` and ``target_parameters``.
    """

    modules: Modules
    parameters: Modules
    config: dict[str, object]

    def sizes(self, model: nn.Module) -> dict[str, tuple[int, int] | None]:
        """(out_features, in_features) of each target of ``model``; None for what PEFT cannot adapt."""
        found = {name: features(module) for name, module in self.modules.items()}
        for name, shape in saved_parameters(model, self.parameters).values():
            found[name] = shape[-2:]
        return found

    def check_rank(self, model: nn.Module, names: str, rank: int) -> None:
        """Raise UsageError if a target of ``names`` is no matrix, or too small for the rank."""
        sizes = self.sizes(model)
        for name, size in sizes.items():
            if size is None:  # a norm, an activation
                raise UsageError(
                    f"--target-modules {names}: "
                    f"{name} is a {type(self.modules[name]).__name__}, which cannot be adapted"
                )
        smallest = min(sizes, key=lambda name: min(sizes[name]))
        largest_rank = min(sizes[smallest])
        if rank > largest_rank:
            size = size_text(sizes[smallest])
            raise UsageError(f"--rank {rank}: {smallest} has {size} weights, so at most {largest_rank} fits")


def find_targets(model: nn.Module, names: str, experts: bool | None = None) -> Targets:
    """What is adapted for ``names``: "all-linear", or layers and parameters separated by commas.

    "all-linear" excludes the output layer, routers, the gates of shared experts, and stacks of experts.
    Modules that PEFT or MiCA refuses are among the targets. The model is not changed.

    Args:
        experts: True adds all experts, False leaves all of them out, None adapts those that ``names`` names.

    Raises:
        UsageError: a name matches nothing.
    """
    wanted = ALL_LINEAR
    if names != ALL_LINEAR:
        wanted = [name for name in map(str.strip, names.split(",")) if name]
    matched = _matching_modules(model, wanted)
    parameters = {}
    if wanted == ALL_LINEAR:
        blocks = _expert_blocks(model)
        modules = {name: module for name, module in matched.items() if not _is_router(name, module, blocks)}
    else:
        modules = dict(matched)
        found = _ending(_adaptable_parameters(model), wanted)
        parameters = {name: model.get_submodule(name.rpartition(".")[0]) for name in found}
        unknown = [name for name in wanted if not _ending([*modules, *parameters], [name])]
        if unknown:  # PEFT raises only if all are
            known = {_leaf(name) for name, _ in model.named_modules()}
            raise UsageError(
                f"--target-modules {names}: "
                f"no layer of the model is called '{unknown[0]}'{similar(unknown[0], known)}"
            )

    if experts:
        linear = _matching_modules(model, ALL_LINEAR)
        modules |= {name: module for name, module in linear.items() if _IN_AN_EXPERT.search(name)}
        parameters = stacks_of(model) | parameters
    elif experts is not None:
        stacks = stacks_of(model)
        modules = {name: module for name, module in modules.items() if not _IN_AN_EXPERT.search(name)}
        parameters = {name: module for name, module in parameters.items() if name not in stacks}

    _move_to_parameters(model, modules, parameters)
    if not modules and not parameters:
        raise UsageError(f"--target-modules {names}: no layer of the model has such a name")
    config = {
        "target_modules": _target_modules(model, wanted, matched, modules),
        "target_parameters": _shortened(parameters, _adaptable_parameters(model)) or None,
    }
    return Targets(modules, parameters, config)


def _matching_modules(model: nn.Module, names: str | list[str]) -> Modules:
    """The modules that PEFT would take for ``names``, before its conversions for transformers 5."""
    config = LoraConfig(target_modules=names, task_type="CAUSAL_LM")
    config = _maybe_include_all_linear_layers(config, model)
    named = model.named_modules()
    return {name: module for name, module in named if name and check_target_module_exists(config, name)}


def _adaptable_parameters(model: nn.Module) -> list[str]:
    """The parameters that PEFT can adapt by their names: matrices and stacks of matrices."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() in (2, 3)]


def _move_to_parameters(model: nn.Module, modules: Modules, parameters: Modules) -> None:
    """Move what PEFT can adapt only by the name of its weight from ``modules`` to ``parameters``.

    These are modules with a matrix that are no layers to PEFT, like routers, and in a mixture of experts the
    layers whose names PEFT takes for those of experts.
    """
    renamed = set()
    if has_experts(model):
        renamed = _renamed_by_peft(model, {_leaf(name) for name in modules})
    for name, module in list(modules.items()):
        weight = getattr(module, "weight", None)
        is_matrix = getattr(weight, "ndim", 0) == 2
        if is_matrix and (features(module) is None or _leaf(name) in renamed):
            parameters[f"{name}.weight"] = modules.pop(name)


def _target_modules(
    model: nn.Module, wanted: str | list[str], matched: Modules, modules: Modules
) -> str | list[str]:
    """What makes PEFT adapt ``modules``; ``matched`` is what it would adapt for ``wanted``."""
    is_mixture = has_experts(model)
    if modules != matched or (is_mixture and wanted == ALL_LINEAR):
        return _shortened(modules, [name for name, _ in model.named_modules()])
    if wanted == ALL_LINEAR:
        return ALL_LINEAR
    return [name for name in wanted if _ending(modules, [name])]  # without the names of parameters


def stacks_of(model: nn.Module) -> Modules:
    """The stacks of experts, by the names of the parameters: the module that holds each.

    A stack is a 3-d parameter of a module of experts; biases, and the weights of convolutions, are none.
    """
    stacks = {}
    for name, module in model.named_modules():
        if "expert" not in f"{name} {type(module).__name__}".lower():
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                stacks[f"{name}.{key}"] = module
    return stacks


def has_experts(model: nn.Module) -> bool:
    """Whether the model is a mixture of experts that can be adapted."""
    return bool(_expert_blocks(model))


def _expert_blocks(model: nn.Module) -> dict[str, int]:
    """The modules around experts, and how many experts each has: in stacks, or each a module of its own."""
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
    for block, num_experts in blocks.items():
        if not name.startswith(f"{block}."):
            continue
        child = name.removeprefix(f"{block}.").partition(".")[0]
        if "gate" in child or "router" in child:
            sizes = features(module)
            return sizes is not None and sizes[0] in (1, num_experts)
    return False


def _renamed_by_peft(model: nn.Module, leaves: Iterable[str]) -> set[str]:
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
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def _ending(names: Iterable[str], endings: Iterable[str]) -> list[str]:
    """Those of the dotted ``names`` whose last parts are those of one of ``endings``."""
    dotted = tuple(f".{ending}" for ending in endings)
    return [name for name in names if f".{name}".endswith(dotted)]


def _shortened(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """``names`` without everything up to the number of the layer, if these match no others ``among`` all."""
    short = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in names})
    if set(_ending(among, short)) == set(names):
        return short
    return sorted(names)


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
    """The parameters that an adapter has, by their names in its file: (name of the parameter, its shape).

    The shape is (experts, out_features, in_features), or without the first. PEFT nests the adapters of one
    module's parameters; the first parameter's is the innermost.
    """
    found = {}
    for module_name, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        adapted = [each for each in own if _ending([f"{module_name}.{each[0]}"], target_parameters)]
        for depth, (key, parameter) in enumerate(reversed(adapted)):
            shape = tuple(parameter.shape)
            if len(shape) == 3 and getattr(module, "is_transposed", False):
                shape = (shape[0], shape[2], shape[1])
            name_in_file = module_name + depth * ".base_layer"
            found[name_in_file] = (f"{module_name}.{key}", shape)
    return found
