"""The models that a comparison trains, all on one base."""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import mica.fast  # noqa: F401 (MiCA's layers and solver)
from mica.cli.compare.methods import METHODS, RANDOM
from mica.cli.targets import find_targets


def random_basis(layer: LoraLayer, rank: int) -> Tensor:
    """(out, rank) orthonormal columns for an adapted layer, drawn from PyTorch's generator."""
    return torch.linalg.qr(torch.randn(layer.lora_B["default"].out_features, rank))[0]


@contextmanager
def built(method: str, base: nn.Module, args: argparse.Namespace) -> Iterator[nn.Module]:
    """The model that ``method`` trains, by its `options`; afterwards ``base`` is as it was.

    ``args.seed`` draws what is drawn: LoRA's A, a random B. An adapter is put on ``base`` itself; full
    fine-tuning trains a copy of it, in float32, as small steps are lost in 16 bits.

    Raises UsageError where `targets.find_targets` does.
    """
    torch.manual_seed(args.seed)
    if METHODS[method].divisor is None:
        yield copy.deepcopy(base).float().requires_grad_(True)
        return
    targets = find_targets(base, args.target_modules, args.experts).config
    sizes = {"r": args.rank, "lora_alpha": args.alpha, "lora_dropout": args.dropout}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=METHODS[method].init, **sizes, **targets)
    model = get_peft_model(base, config)
    try:
        if method == RANDOM:
            replace_b(model, random_basis)
        yield model
    finally:
        model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config  # PEFT leaves it, and warns of a second adapter


def replace_b(model: nn.Module, basis: Callable[[LoraLayer, int], Tensor]) -> None:
    """Give every adapted layer ``basis(layer, rank)``, (out, rank), for its B; each expert of a stack one."""
    with torch.no_grad():
        for layer in model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            B = layer.lora_B["default"].weight
            rank = layer.r["default"]
            experts = B.shape[1] // rank
            for expert in range(experts):  # PEFT's order: rank first, then expert
                B[:, expert::experts] = basis(layer, rank)
