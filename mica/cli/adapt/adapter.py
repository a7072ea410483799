"""The MiCA adapter of a run: a new one, that of a checkpoint, or that of ``--adapter``."""

import argparse
import json
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn

from mica.cli.arguments import target_names
from mica.cli.loading import find_targets
from mica.errors import UsageError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def start(model, args: argparse.Namespace, checkpoint: Path | None = None) -> PeftModel:
    """Return ``model`` with the adapter that is to be trained: A in float32, B frozen.

    From ``checkpoint`` (``--resume``), else from ``args.adapter``, else a new one; only the last runs the
    solver, and B of the others keeps its bits. ``args.dropout`` counts in all three. All processes
    must call this; they share the work of a new one.

    Raises UsageError as `check`.
    """
    check(model, args, checkpoint)
    if checkpoint is not None or args.adapter is not None:
        return _load(model, args, checkpoint or args.adapter)
    config = LoraConfig(
        init_lora_weights="mica",
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=target_names(args.target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if str(error).startswith("Target module"):  # "... is not supported": PEFT's own list of types
            raise UsageError(f"--target-modules {args.target_modules}: {error}") from error
        raise


def check(model: nn.Module, args: argparse.Namespace, checkpoint: Path | None = None) -> None:
    """What `start` refuses, as far as it needs no weights: those of ``model`` may be on the meta device.

    Raises UsageError if ``--target-modules`` names no layer that can be adapted, if one is too small for the
    rank, or if the adapter of ``checkpoint`` or ``args.adapter`` is none of MiCA, does not fit the model, or
    has another rank, alpha or other layers than ``args`` says.
    """
    targets = find_targets(model, args.target_modules)
    for name, module in targets.items():
        if features(module) is None:  # a norm, an activation
            raise UsageError(
                f"--target-modules {args.target_modules}: {name} is a {type(module).__name__}, which cannot "
                "be adapted"
            )
    smallest = min(targets, key=lambda name: min(features(targets[name])))
    if args.rank > min(features(targets[smallest])):
        out_features, in_features = features(targets[smallest])
        raise UsageError(
            f"--rank {args.rank}: {smallest} has {out_features} x {in_features} weights, so at most "
            f"{min(out_features, in_features)} fits; --target-modules can leave it out"
        )
    if checkpoint is not None:
        _check_saved(model, args, "--resume", checkpoint, targets)
    elif args.adapter is not None:
        _check_saved(model, args, "--adapter", args.adapter, targets)


def _check_saved(model, args, option: str, folder: Path, targets: dict[str, nn.Module]) -> None:
    own = settings(read_adapter_config(folder, option), folder, option)
    for name, given in (("rank", args.rank), ("alpha", args.alpha)):
        if own[name] != given:
            raise UsageError(f"--{name} {given}: the adapter of {option} {folder} has {own[name]}")
    check_fit(model, folder, option)
    adapted = set(adapted_layers(folder, option))
    if adapted != set(targets):
        only = sorted(adapted ^ set(targets))
        where = "only in the adapter" if only[0] in adapted else "not in the adapter"
        raise UsageError(
            f"--target-modules {args.target_modules}: {option} {folder} has adapted other layers: "
            f"{', '.join(only[:3])} {where}"
        )


def _load(model, args, folder: Path) -> PeftModel:
    config = PeftConfig.from_pretrained(folder)
    config.lora_dropout = args.dropout
    config.base_model_name_or_path = model.name_or_path  # this model, wherever the adapter comes from
    return PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)


def read_adapter_config(folder: Path, option: str = "--adapter") -> dict:
    """The contents of a MiCA adapter's ``adapter_config.json``; `settings` turns them into options.

    Raises UsageError, naming ``option``, if ``folder`` is no folder of an adapter, or the adapter not MiCA's.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, start = config["peft_type"], config.get("init_lora_weights")
    except FileNotFoundError as error:
        what = f"has no {CONFIG}" if folder.is_dir() else "no such folder"
        raise UsageError(f"{option} {folder}: {what}, and must be a folder with a PEFT adapter") from error
    except OSError as error:
        raise UsageError(f"{option} {folder}: {CONFIG} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{option} {folder}: {CONFIG} is not that of a PEFT adapter") from error
    if config.get("target_parameters"):
        raise UsageError(
            f"{option} {folder}: adapts single parameters (target_parameters), mostly experts, which these "
            "commands do not support: load and merge it with PEFT"
        )
    if kind != "LORA" or str(start).lower() != "mica":
        found = kind if kind != "LORA" else f"LoRA with init_lora_weights={start!r}"
        raise UsageError(f"{option} {folder}: must be a MiCA adapter, but is {found}")
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{option} {folder}: has no {WEIGHTS}")
    return config


def settings(config: dict, folder: Path, option: str = "--adapter") -> dict:
    """The options that the adapter in ``folder`` fixes, from its ``config`` (see `read_adapter_config`).

    ``rank``, ``alpha``: int. ``target_modules``: names with commas; where PEFT got a pattern, the layers
    themselves. ``dropout``: float, a proposal.

    Raises UsageError if ranks or alphas differ between layers: no option says that.
    """
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UsageError(
            f"{option} {folder}: its layers have different ranks or alphas, which is not supported"
        )
    names = config.get("target_modules")
    if not isinstance(names, list):
        names = adapted_layers(folder, option)
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "target_modules": ",".join(sorted(names)),
        "dropout": config.get("lora_dropout", 0.0),
    }


def adapted_layers(folder: Path, option: str = "--adapter") -> dict[str, tuple[int, int]]:
    """The layers that the adapter in ``folder`` has weights for: name -> (out_features, in_features).

    Only headers are read. For an embedding that is (embedding_dim, num_embeddings).

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
    return {name: (found["lora_B"][0], found["lora_A"][1]) for name, found in whole.items()}


def check_fit(model: nn.Module, folder: Path, option: str, model_option: str = "--model") -> None:
    """Raise UsageError unless each layer of the adapter in ``folder`` is in ``model``, in the same shape."""
    modules = dict(model.named_modules())
    for name, shape in adapted_layers(folder, option).items():
        if name not in modules:
            raise UsageError(f"{option} {folder}: adapts {name}, which {model_option} does not have")
        found = features(modules[name])
        if found != shape:
            raise UsageError(
                f"{option} {folder}: adapts {name} as a layer of {shape[0]} x {shape[1]}, but in "
                + f"{model_option} "
                + (f"it has {found[0]} x {found[1]}" if found else f"it is a {type(modules[name]).__name__}")
            )


def features(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a layer, quantised or not; None for what PEFT cannot adapt.

    The shape of the weight would not do: it may be packed, and Conv1D's is transposed.
    """
    for names in (("out_features", "in_features"), ("nf", "nx"), ("embedding_dim", "num_embeddings")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return tuple(getattr(module, name) for name in names)
    return None
