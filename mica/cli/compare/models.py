"""The models that a comparison trains, all on one base."""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import mica.fast
from mica.cli.targets import find_targets


@contextmanager
def built(base: nn.Module, args: argparse.Namespace) -> Iterator[nn.Module]:
    """The model to train with the `options` of a method; afterwards ``base`` is as it was.

    LoRA runs on the same operators as MiCA, so that both are measured alike. ``args.seed`` draws LoRA's A. An
    adapter is put on ``base`` itself; full fine-tuning trains a copy of it, in float32, as small steps are
    lost in 16 bits.

    Raises UsageError where `targets.find_targets` does.
    """
    mica.fast.enable(lora=True)
    torch.manual_seed(args.seed)
    if args.init is None:
        yield copy.deepcopy(base).float().requires_grad_(True)
        return
    targets = find_targets(base, args.target_modules, args.experts).config
    sizes = {"r": args.rank, "lora_alpha": args.alpha, "lora_dropout": args.dropout}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=args.init, **sizes, **targets)
    model = get_peft_model(base, config)
    try:
        yield model
    finally:
        model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config  # PEFT leaves it, and warns of a second adapter
