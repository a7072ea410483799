"""The MiCA adapter of a run: a new one, that of a checkpoint, or that of ``--adapter``."""

import argparse
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

import mica.fast  # noqa: F401 (reads the configuration of an adapter of experts as MiCA's)
from mica.cli.adapt import embeddings
from mica.cli.output import one_line
from mica.cli.targets import Targets, features, find_targets, saved_parameters
from mica.errors import UsageError
from mica.fast.forward.eligibility import requests_mica

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def start(model, args: argparse.Namespace, checkpoint: Path | None = None) -> PeftModel:
    """Return ``model`` with the adapter that is to be trained: A (and embeddings) in float32, B frozen.

    From ``checkpoint`` (``--resume``), else from ``args.adapter``, else a new one; only the last runs the
    solver, and B of the others keeps its bits. ``args.dropout`` counts in all three. All processes
    must call this; they share the work of a new one.

    Raises UsageError as `check`.
    """
    targets = check(model, args, checkpoint)
    with embeddings.in_float32(model) if args.train_embeddings else nullcontext():
        return _start(model, args, checkpoint or args.adapter, targets)


def _start(model, args: argparse.Namespace, folder: Path | None, targets: Targets) -> PeftModel:
    if folder is not None:
        config = PeftConfig.from_pretrained(folder)
        config.lora_dropout = args.dropout
        config.base_model_name_or_path = model.name_or_path  # this model, wherever the adapter comes from
        return PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
    own = {"r": args.rank, "lora_alpha": args.alpha, "lora_dropout": args.dropout, **targets.config}
    own |= embeddings.config(model) if args.train_embeddings else {}
    try:
        return get_peft_model(model, LoraConfig(init_lora_weights="mica", task_type="CAUSAL_LM", **own))
    except ValueError as error:
        if str(error).startswith("Target module"):  # "... is not supported": PEFT's own list of types
            raise UsageError(f"--target-modules {args.target_modules}: {error}") from error
        raise


def check(model: nn.Module, args: argparse.Namespace, checkpoint: Path | None = None) -> Targets:
    """What `start` refuses, as far as it needs no weights: those of ``model`` may be on the meta device.

    Returns what will be adapted.

    Raises UsageError if ``--target-modules`` names no layer that can be adapted, if one is too small for the
    rank, if parameters (experts) are to have dropout, if embeddings cannot be trained, or if the adapter of
    ``checkpoint`` or ``args.adapter`` is none of MiCA, does not fit the model, or has other layers than
    ``args`` says.
    """
    targets = find_targets(model, args.target_modules, args.experts)
    if targets.parameters and args.dropout:
        named = (
            f"--dropout {args.dropout:g}: PEFT has no dropout for parameters, as {min(targets.parameters)}"
        )
        raise UsageError(f"{named}: --dropout 0, or --no-experts")
    sizes = {name: shape[-2:] for name, shape in saved_parameters(model, targets.parameters).values()}
    for name, module in targets.modules.items():
        sizes[name] = features(module)
        if sizes[name] is None:  # a norm, an activation
            what = f"{name} is a {type(module).__name__}, which cannot be adapted"
            raise UsageError(f"--target-modules {args.target_modules}: {what}")
    smallest = min(sizes, key=lambda name: min(sizes[name]))
    if args.rank > (most := min(sizes[smallest])):
        has = f"{smallest} has {_by(sizes[smallest])} weights, so at most {most} fits"
        raise UsageError(f"--rank {args.rank}: {has}; --target-modules can leave it out")
    if args.train_embeddings:
        embeddings.check(model, args, targets)
    folder, option = checkpoint or args.adapter, "--resume" if checkpoint else "--adapter"
    if folder is None:
        return targets
    found = read_adapter_config(folder, option)
    check_fit(model, found, folder, option)
    if args.train_embeddings:
        embeddings.check_adapter(model, found, folder, option)
    adapted = set(adapted_layers(folder, option))
    parameters = saved_parameters(model, targets.parameters)
    expected = set(targets.modules) | set(parameters)
    if args.experts:  # all that the adapter has, be it some stacks only
        adapted, expected = (names - set(_stacks(found, folder, option)) for names in (adapted, expected))
        expected -= {name for name, (_, shape) in parameters.items() if len(shape) == 3}
    if adapted != expected:
        only = sorted(adapted ^ expected)
        where = "only in the adapter" if only[0] in adapted else "not in the adapter"
        others = f"{option} {folder} has adapted other layers: {', '.join(only[:3])} {where}"
        raise UsageError(f"--target-modules {args.target_modules}: {others}")
    return targets


def read_adapter_config(folder: Path, option: str = "--adapter", any_lora: bool = False) -> LoraConfig:
    """The configuration of a MiCA adapter; `settings` turns it into options.

    Raises UsageError, naming ``option``, if ``folder`` is no folder of an adapter, or the adapter not MiCA's
    (with ``any_lora``: not LoRA's).
    """
    if not (folder / CONFIG).is_file():
        what = f"has no {CONFIG}" if folder.is_dir() else "no such folder"
        raise UsageError(f"{option} {folder}: {what}, and must be a folder with a PEFT adapter")
    try:
        config = PeftConfig.from_pretrained(folder)
        kind = config.peft_type.value
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"is not that of a PEFT adapter: {one_line(error)}"
        raise UsageError(f"{option} {folder}: {CONFIG} {what}") from error
    if kind != "LORA" or not (any_lora or requests_mica(config)):
        found = kind if kind != "LORA" else f"LoRA with init_lora_weights={config.init_lora_weights!r}"
        raise UsageError(
            f"{option} {folder}: must be a {'LoRA' if any_lora else 'MiCA'} adapter, but is {found}"
        )
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{option} {folder}: has no {WEIGHTS}")
    _check_values(config, f"{option} {folder}: {CONFIG}")
    _check_ranks(config, folder, option)
    return config


def _check_values(config: LoraConfig, where: str) -> None:
    """Raise UsageError if a value in adapter_config.json is that PEFT cannot use, as it checks none."""
    checks = {  # entry -> whether the value is one, and what it must be
        "r": (_is_rank(config.r), "a whole number above 0"),
        "lora_alpha": (_is_positive(config.lora_alpha), "a number above 0"),
        "lora_dropout": (_is_share(config.lora_dropout), "a number from 0 to below 1"),
        "rank_pattern": (_is_mapping(config.rank_pattern, _is_rank), "a mapping of patterns to ranks"),
        "alpha_pattern": (
            _is_mapping(config.alpha_pattern, _is_positive),
            "a mapping of patterns to numbers",
        ),
        "target_modules": (_is_names(config.target_modules), "names or a pattern"),
        "target_parameters": (_is_names(config.target_parameters), "a list of names"),
        "modules_to_save": (_is_names(config.modules_to_save), "a list of names"),
        "base_model_name_or_path": (isinstance(config.base_model_name_or_path, str | None), "a name"),
    }
    for name, (is_right, wanted) in checks.items():
        if not is_right:
            raise UsageError(f"{where}: {name} must be {wanted}, not {getattr(config, name)!r:.80}")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_share(value: object) -> bool:
    return value == 0 or (_is_positive(value) and value < 1)


def _is_pattern(value: object) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _is_names(value: object) -> bool:
    if value is None or _is_pattern(value):
        return True
    return isinstance(value, list | set | tuple) and all(isinstance(each, str) for each in value)


def _is_mapping(value: object, holds: Callable[[object], bool]) -> bool:
    """Whether it maps patterns of names to values that ``holds`` takes, or is none."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    return all(_is_pattern(key) and holds(each) for key, each in value.items())


def _check_ranks(config: LoraConfig, folder: Path, option: str) -> None:
    """Raise UsageError if the weights are of another rank than adapter_config.json says.

    The rows of a stack's A are those of all experts; which layers are stacks only the model tells.
    """
    ranks = config.rank_pattern or {}
    for name, (_, rows, _) in adapted_layers(folder, option).items():
        rank = ranks.get(get_pattern_key(ranks.keys(), name), config.r)
        is_stack = bool(config.target_parameters) and (bool(ranks) or rows % rank == 0)
        if rows != rank and not is_stack:
            what = f"{CONFIG} has rank {rank} for {name}, and {WEIGHTS} has {rows}"
            raise UsageError(f"{option} {folder}: {what}")


def settings(config: LoraConfig, folder: Path, option: str = "--adapter") -> dict:
    """The options that the adapter in ``folder`` fixes, from its ``config`` (see `read_adapter_config`).

    ``rank``, ``alpha``: int. ``target_modules``: names with commas; where PEFT got a pattern, the layers
    themselves. ``experts``: True if it has stacks of experts, else None; ``train_embeddings``: likewise.
    ``dropout``: float, a proposal.

    Raises UsageError if ranks or alphas differ between layers, or alpha is no whole number: no option says
    that.
    """
    if config.rank_pattern or config.alpha_pattern:
        what = "its layers have different ranks or alphas, which is not supported"
        raise UsageError(f"{option} {folder}: {what}")
    stacks = _stacks(config, folder, option)
    if config.lora_alpha % 1:
        what = f"lora_alpha is {config.lora_alpha:g}, which must be a whole number"
        raise UsageError(f"{option} {folder}: {what}")
    layers = set(adapted_layers(folder, option)) - set(stacks)
    named = []  # parameters that are no stacks
    for parameter in config.target_parameters or ():
        holders = {name for name in layers if f".{name}".endswith(f".{parameter.rpartition('.')[0]}")}
        layers -= holders
        named += [parameter] if holders else []
    names = config.target_modules if isinstance(config.target_modules, set) else layers
    return {
        "rank": config.r,
        "alpha": int(config.lora_alpha),
        "target_modules": ",".join(sorted([*names, *named])),
        "experts": True if stacks else None,
        "train_embeddings": True if config.modules_to_save else None,
        "dropout": config.lora_dropout,
    }


def _stacks(config: LoraConfig, folder: Path, option: str) -> list[str]:
    """Those of `adapted_layers` that are stacks of experts: A has the rows of all of them."""
    return [name for name, (_, rows, _) in adapted_layers(folder, option).items() if rows > config.r]


def adapted_layers(folder: Path, option: str = "--adapter") -> dict[str, tuple[int, int, int]]:
    """Layers that the adapter in ``folder`` has weights for: name -> (out_features, rows of A, in_features).

    Only headers are read. An embedding has (embedding_dim, rows of A, num_embeddings). Several parameters of
    one module have its name, and once or more ".base_layer".

    Raises UsageError if the weights cannot be read, or a layer has only one of its two.
    """
    sizes: dict[str, dict[str, tuple]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                layer, _, factor = key.removesuffix(".weight").rpartition(".")
                factor = factor.replace("lora_embedding_", "lora_")
                if factor in ("lora_A", "lora_B"):
                    shape = tuple(file.get_slice(key).get_shape())
                    sizes.setdefault(layer.removeprefix("base_model.model."), {})[factor] = shape
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{option} {folder}: {WEIGHTS} cannot be read: {error}") from error
    whole = {name: found for name, found in sizes.items() if len(found) == 2}
    if not whole or len(whole) < len(sizes):
        missing = f": {min(sizes.keys() - whole.keys())} has only A or only B" if sizes else ""
        raise UsageError(f"{option} {folder}: {WEIGHTS} is not that of a whole adapter{missing}")
    for name, found in whole.items():
        a, b = found["lora_A"], found["lora_B"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            what = f"{name} has A of {_by(a)} and B of {_by(b)}, which are no two factors of a matrix"
            raise UsageError(f"{option} {folder}: {WEIGHTS}: {what}")
    return {name: (found["lora_B"][0], *found["lora_A"]) for name, found in whole.items()}


def check_fit(
    model: nn.Module, config: LoraConfig, folder: Path, option: str, model_option: str = "--model"
) -> None:
    """Raise UsageError unless ``model`` has, in the same shape, all that the adapter in ``folder`` adapts.

    ``config``: see `read_adapter_config`.
    """
    modules = dict(model.named_modules())
    parameters = saved_parameters(model, config.target_parameters or ())
    ranks = config.rank_pattern or {}
    for name, (out_features, rows, in_features) in adapted_layers(folder, option).items():
        shape, what = (out_features, in_features), "a layer"
        if name in parameters:
            parameter, found = parameters[name]
            experts = rows // ranks.get(get_pattern_key(ranks.keys(), parameter), config.r)
            shape, what = (experts, *shape) if len(found) == 3 or experts > 1 else shape, "a parameter"
        elif name not in modules:
            raise UsageError(f"{option} {folder}: adapts {name}, which {model_option} does not have")
        else:
            found = features(modules[name])
        if found != shape:
            raise UsageError(
                f"{option} {folder}: adapts {name} as {what} of {_by(shape)}, but in {model_option} "
                + (f"it has {_by(found)}" if found else f"it is a {type(modules[name]).__name__}")
            )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
