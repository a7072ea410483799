"""The MiCA adapter of a run: a new one, that of a checkpoint, or that of ``--adapter``."""

import re
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

import mica.fast  # noqa: F401 (reads the configuration of an adapter of experts as MiCA's)
from mica.cli.adapt import embeddings
from mica.cli.output import explained, size_text
from mica.cli.targets import Targets, features, find_targets, saved_parameters
from mica.errors import UsageError
from mica.fast.forward.eligibility import requests_mica

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_KINDS = {  # of what is read of it before PEFT loads the adapter
    "base_model_name_or_path": (str, "a name"),
    "target_modules": (str | set, "a list of names or a pattern"),
    "target_parameters": (list, "a list of names"),
    "modules_to_save": (list, "a list of names"),
    "rank_pattern": (dict, "an object"),
    "alpha_pattern": (dict, "an object"),
}


def start(model, args: Namespace, checkpoint: Path | None = None) -> PeftModel:
    """Return ``model`` with the adapter that is to be trained: A (and embeddings) in float32, B frozen.

    From ``checkpoint`` (``--resume``), else from ``args.adapter``, else a new one; only the last runs the
    solver, and B of the others keeps its bits. ``args.dropout`` counts in all three. All processes
    must call this; they share the work of a new one.

    Raises UsageError as `check`.
    """
    targets = check(model, args, checkpoint)
    precision = nullcontext()
    if args.train_embeddings:
        precision = embeddings.in_float32(model)
    with precision:
        folder = checkpoint or args.adapter
        if folder is None:
            return _new(model, args, targets)
        return _continued(model, args, folder)


def _continued(model, args: Namespace, folder: Path) -> PeftModel:
    """``model`` with the adapter in ``folder``."""
    config = PeftConfig.from_pretrained(folder)
    config.lora_dropout = args.dropout
    config.base_model_name_or_path = model.name_or_path  # this model, wherever the adapter comes from
    return load(model, folder, config, is_trainable=True)


def load(model, folder: Path, config: LoraConfig, is_trainable: bool = False) -> PeftModel:
    """``model`` with the adapter in ``folder``, with ``config`` for its configuration.

    Raises UsageError if PEFT cannot load it: its files may have been edited.
    """
    edited = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, re.error)
    with explained(f"PEFT cannot load the adapter in {folder}", edited):
        return PeftModel.from_pretrained(model, folder, config=config, is_trainable=is_trainable)


def _new(model, args: Namespace, targets: Targets) -> PeftModel:
    """``model`` with a new adapter."""
    config = {
        "init_lora_weights": "mica",
        "task_type": "CAUSAL_LM",
        "r": args.rank,
        "lora_alpha": args.alpha,
        "lora_dropout": args.dropout,
        **targets.config,
    }
    if args.train_embeddings:
        config |= embeddings.config(model)
    try:
        return get_peft_model(model, LoraConfig(**config))
    except ValueError as error:
        if str(error).startswith("Target module"):  # "... is not supported": PEFT's own list of types
            raise UsageError(f"--target-modules {args.target_modules}: {error}") from error
        raise


def check(model: nn.Module, args: Namespace, checkpoint: Path | None = None) -> Targets:
    """What `start` refuses, as far as it needs no weights: those of ``model`` may be on the meta device.

    Returns what will be adapted.

    Raises UsageError if ``--target-modules`` names no layer that can be adapted, if one is too small for the
    rank, if parameters (experts) are to have dropout, if embeddings cannot be trained, or if the adapter of
    ``checkpoint`` or ``args.adapter`` is not a MiCA adapter, does not fit the model, or has other layers than
    ``args`` says.
    """
    targets = find_targets(model, args.target_modules, args.experts)
    if targets.parameters and args.dropout:
        raise UsageError(
            f"--dropout {args.dropout:g}: PEFT has no dropout for parameters such as "
            f"{min(targets.parameters)}: use --dropout 0 or --no-experts"
        )
    _check_rank(model, args, targets)
    if args.train_embeddings:
        embeddings.check(model, args, targets)
    if checkpoint is not None:
        _check_saved(model, args, targets, checkpoint, "--resume")
    elif args.adapter is not None:
        _check_saved(model, args, targets, args.adapter, "--adapter")
    return targets


def _check_rank(model: nn.Module, args: Namespace, targets: Targets) -> None:
    """Raise UsageError if a target is no matrix, or too small for the rank."""
    sizes = targets.sizes(model)
    for name, size in sizes.items():
        if size is None:  # a norm, an activation
            what = f"{name} is a {type(targets.modules[name]).__name__}, which cannot be adapted"
            raise UsageError(f"--target-modules {args.target_modules}: {what}")
    smallest = min(sizes, key=lambda name: min(sizes[name]))
    largest_rank = min(sizes[smallest])
    if args.rank > largest_rank:
        has = f"{smallest} has {size_text(sizes[smallest])} weights, so at most {largest_rank} fits"
        raise UsageError(f"--rank {args.rank}: {has}; --target-modules can leave it out")


def _check_saved(model: nn.Module, args: Namespace, targets: Targets, folder: Path, option: str) -> None:
    """Raise UsageError unless the adapter in ``folder`` fits ``model`` and has adapted the ``targets``."""
    config = read_adapter_config(folder, option)
    check_fit(model, config, folder, option)
    if args.train_embeddings:
        embeddings.check_adapter(model, config, folder, option)

    adapted = set(adapted_layers(folder, option))
    parameters = saved_parameters(model, targets.parameters)
    expected = set(targets.modules) | set(parameters)
    if args.experts:  # whichever stacks the adapter has, all of them or some
        stacks = set(_stacks(config, folder, option))
        adapted -= stacks
        expected -= stacks
        expected -= {name for name, (_, shape) in parameters.items() if len(shape) == 3}
    differing = sorted(adapted ^ expected)
    if differing:
        where = "not in the adapter"
        if differing[0] in adapted:
            where = "only in the adapter"
        others = f"{option} {folder} has adapted other layers: {', '.join(differing[:3])} {where}"
        raise UsageError(f"--target-modules {args.target_modules}: {others}")


def read_adapter_config(folder: Path, option: str = "--adapter") -> LoraConfig:
    """The configuration of a MiCA adapter; `settings` turns it into options.

    Raises UsageError, naming ``option``, if ``folder`` is not the folder of an adapter, or the adapter not
    MiCA's.
    """
    where = f"{option} {folder}"
    if folder.is_file():
        raise UsageError(f"{where}: is a file; give the folder of the adapter")
    if not folder.is_dir():
        raise UsageError(f"{where}: no such folder")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{where}: is not a PEFT adapter folder (no {CONFIG})")
    with explained(f"{where}: {CONFIG} is not the configuration of a PEFT adapter"):
        config = PeftConfig.from_pretrained(folder)
        kind = config.peft_type.value

    found = None
    if kind != "LORA":
        found = kind
    elif not requests_mica(config):
        found = f"LoRA with init_lora_weights={config.init_lora_weights!r}"
    if found is not None:
        raise UsageError(f"{where}: must be a MiCA adapter, but is {found}")
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{where}: has no {WEIGHTS}")
    for name in ("r", "lora_alpha"):
        value = getattr(config, name)
        if not isinstance(value, int | float) or value <= 0:
            raise UsageError(f"{where}: {CONFIG}: {name} must be a number above 0, not {value!r:.80}")
    for name, (kind, what) in _KINDS.items():
        value = getattr(config, name)
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"{where}: {CONFIG}: {name} must be {what}, not {value!r:.80}")
    return config


def _rank_of(config: LoraConfig, name: str) -> int:
    """The rank that ``config`` gives to the layer or parameter ``name``."""
    ranks = config.rank_pattern or {}
    return ranks.get(get_pattern_key(ranks.keys(), name), config.r)


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
    if config.lora_alpha % 1:
        what = f"lora_alpha is {config.lora_alpha:g}, which must be a whole number"
        raise UsageError(f"{option} {folder}: {what}")

    stacks = _stacks(config, folder, option)
    layers = set(adapted_layers(folder, option)) - set(stacks)
    parameters = []  # those that are no stacks
    for parameter in config.target_parameters or ():
        module = parameter.rpartition(".")[0]
        holders = {name for name in layers if f".{name}".endswith(f".{module}")}
        if holders:
            parameters.append(parameter)
            layers -= holders
    modules = layers
    if isinstance(config.target_modules, set):
        modules = config.target_modules
    return {
        "rank": config.r,
        "alpha": int(config.lora_alpha),
        "target_modules": ",".join(sorted([*modules, *parameters])),
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
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # layer -> "lora_A", "lora_B" -> shape
    reading = explained(f"{option} {folder}: {WEIGHTS} cannot be read", (OSError, SafetensorError))
    with reading, safe_open(folder / WEIGHTS, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
            layer, _, factor = key.removesuffix(".weight").rpartition(".")
            layer = layer.removeprefix("base_model.model.")
            factor = factor.replace("lora_embedding_", "lora_")
            if factor in ("lora_A", "lora_B"):
                shapes.setdefault(layer, {})[factor] = tuple(weights.get_slice(key).get_shape())
    if not shapes:
        raise UsageError(f"{option} {folder}: {WEIGHTS} is incomplete: it has no layer of an adapter")
    for name in sorted(shapes):
        if len(shapes[name]) < 2:
            raise UsageError(f"{option} {folder}: {WEIGHTS} is incomplete: {name} has only A or only B")
    return {name: (found["lora_B"][0], *found["lora_A"]) for name, found in shapes.items()}


def check_fit(
    model: nn.Module, config: LoraConfig, folder: Path, option: str, model_option: str = "--model"
) -> None:
    """Raise UsageError unless ``model`` has, in the same shape, all that the adapter in ``folder`` adapts.

    ``config``: see `read_adapter_config`.
    """
    modules = dict(model.named_modules())
    parameters = saved_parameters(model, config.target_parameters or ())
    for name, (out_features, rows, in_features) in adapted_layers(folder, option).items():
        shape = (out_features, in_features)
        what = "a layer"
        if name in parameters:
            parameter, found = parameters[name]
            what = "a parameter"
            experts = rows // _rank_of(config, parameter)
            if len(found) == 3 or experts > 1:
                shape = (experts, *shape)
        elif name in modules:
            found = features(modules[name])
        else:
            raise UsageError(f"{option} {folder}: adapts {name}, which {model_option} does not have")
        if found != shape:
            if found:
                has = f"it has {size_text(found)}"
            else:
                has = f"it is a {type(modules[name]).__name__}"
            adapts = f"adapts {name} as {what} of {size_text(shape)}"
            raise UsageError(f"{option} {folder}: {adapts}, but in {model_option} {has}")
