"""The adapter of a run: a new one, that of a checkpoint, or that of ``--adapter``."""

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import mica.fast
from mica.cli.adapt import embeddings, saved_adapter
from mica.cli.adapt.methods import METHODS
from mica.cli.adapt.saved_adapter import SavedAdapter
from mica.cli.targets import Targets, find_targets, saved_parameters
from mica.errors import UsageError


def start(model, args: Namespace, checkpoint: Path | None = None) -> PeftModel:
    """Return ``model`` with the adapter that is to be trained, in float32; MiCA's B is frozen.

    From ``checkpoint`` (``--resume``), else from ``args.adapter``, else a new one of ``args.method``; only
    the last runs MiCA's solver, and B of the others keeps its bits. ``args.dropout`` counts in all three. All
    processes must call this; they share the work of a new one. LoRA and DoRA run on this backend, too.

    Raises UsageError as `check`.
    """
    targets = check(model, args, checkpoint)
    mica.fast.enable(lora=True, memory=args.memory)
    with embeddings.in_float32(model) if args.train_embeddings else nullcontext():
        folder = checkpoint or args.adapter
        if folder is None:
            return _new(model, args, targets)
        saved = saved_adapter.read(folder)
        saved.config.lora_dropout = args.dropout
        # this model, wherever the adapter comes from
        saved.config.base_model_name_or_path = model.name_or_path
        return saved.load(model, is_trainable=True)


def _new(model, args: Namespace, targets: Targets) -> PeftModel:
    """``model`` with a new adapter; ``args.seed`` draws A of LoRA."""
    torch.manual_seed(args.seed)
    config = {
        **METHODS[args.method].config,
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
    rank, if parameters (experts) are to have dropout or DoRA, if embeddings cannot be trained, or if the
    adapter of ``checkpoint`` or ``args.adapter`` is of no method here, does not fit the model, or has other
    layers than ``args`` says.
    """
    targets = find_targets(model, args.target_modules, args.experts)
    if targets.parameters:
        such = f"for parameters such as {min(targets.parameters)}: use --no-experts"
        if args.dropout:
            raise UsageError(f"--dropout {args.dropout:g}: PEFT has no dropout {such} or --dropout 0")
        if args.method == "dora":
            raise UsageError(f"--method dora: PEFT has no DoRA {such} or --method lora")
    targets.check_rank(model, args.target_modules, args.rank)
    if args.train_embeddings:
        embeddings.check(model, args, targets)
    if checkpoint is not None:
        _check_saved(model, args, targets, saved_adapter.read(checkpoint, "--resume"))
    elif args.adapter is not None:
        _check_saved(model, args, targets, saved_adapter.read(args.adapter))
    return targets


def _check_saved(model: nn.Module, args: Namespace, targets: Targets, saved: SavedAdapter) -> None:
    """Raise UsageError unless the ``saved`` adapter fits ``model`` and has adapted the ``targets``."""
    saved.check_fit(model)
    if args.train_embeddings:
        embeddings.check_adapter(model, saved)

    adapted = set(saved.layers)
    parameters = saved_parameters(model, targets.parameters)
    expected = set(targets.modules) | set(parameters)
    if args.experts:  # whichever stacks the adapter has, all of them or some
        adapted -= saved.stacks
        expected -= saved.stacks
        expected -= {name for name, (_, shape) in parameters.items() if len(shape) == 3}
    differing = sorted(adapted ^ expected)
    if differing:
        where = "only in the adapter" if differing[0] in adapted else "not in the adapter"
        raise UsageError(
            f"--target-modules {args.target_modules}: {saved.option} {saved.folder} "
            f"has adapted other layers: {', '.join(differing[:3])} {where}"
        )
