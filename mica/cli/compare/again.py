"""How a training of a comparison is done again: a script for each method, and `mica adapt` for MiCA."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import Dataset

from mica.cli.adapt.options import OPTIONS as OF_ADAPT
from mica.cli.compare import methods, settings

Report = dict[str, Any]


class Loaded(NamedTuple):
    """What all trainings of a comparison begin with: see `load`."""

    model: nn.Module
    blocks: Dataset
    collate: Callable


def load(comparison: Path, dtype: str, packing: str) -> Loaded:
    """The base model, the training blocks and what joins them to batches, for a script that `script` wrote.

    ``comparison``: the folder of the comparison. ``dtype``: of the model's weights, by PyTorch's name.
    Held-out documents are not in the blocks. Raises UsageError if model or texts cannot be read.
    """
    from mica.cli.adapt import corpus, evaluation
    from mica.cli.loading import find_source, load_model, load_tokenizer

    args = settings.of_mica_adapt(settings.stored(comparison), comparison).args
    args.packing = packing
    source = find_source(args.model, args.trust_remote_code)
    blocks = corpus.gather(args, load_tokenizer(source)).train
    model = load_model(source, dtype).requires_grad_(False)
    model.config.use_cache = False  # a cache hides where documents begin
    return Loaded(model, blocks, evaluation.collate)


_SCRIPT = '''\
"""{title} on {texts}, trained with seed 0 as for the page beside this file.

Writes {result} to the folder {output}, where it is started. Needs mica-fast[cli], and one GPU or none:
with several, CUDA_VISIBLE_DEVICES=0 python {name}
"""

from pathlib import Path

import torch
{peft}from transformers import Trainer, TrainingArguments

import mica.fast  # PEFT's MiCA runs on this backend
{ours}

# Base model, and blocks of {sequence_length} tokens without the held-out documents
model, blocks, collate = load(Path(__file__).parent, dtype={dtype!r}, packing={packing!r})
torch.manual_seed(0)
{prepared}
trainer = Trainer(
    model=model,
    args=TrainingArguments(
{training}
    ),
    train_dataset=blocks,
    data_collator=collate,
)
trainer.train()
{scaled}model.save_pretrained({output!r})
'''

_SHARE = "# This training forgets more than the limit: what was compared is {share:.4g} of its update\n"
_SCALED_ADAPTER = _SHARE + 'model.peft_config["default"].lora_alpha *= {share:.4g}\n'
_SCALED_WEIGHTS = (
    _SHARE
    + """\
with torch.no_grad():
    for parameter, old in zip(model.parameters(), before, strict=True):
        parameter.copy_(torch.lerp(old, parameter, {share:.4g}))
"""
)


def script(report: Report, row: Report) -> str:
    """A Python script of the training in ``row`` of ``report``, for the folder of the comparison."""
    method = row["method"]
    is_full = methods.METHODS[method].divisor is None
    args = _options(report, row)
    ours = ["from mica.cli.compare.again import load"]
    if is_full:
        prepared = ["model = model.float().requires_grad_(True)  # small steps are lost in 16 bits"]
    else:
        prepared = [_adapter(report, args)]
    if method == methods.RANDOM:
        ours.append("from mica.cli.compare.models import random_basis, replace_b")
        prepared.append("replace_b(model, random_basis)  # orthonormal columns")
    scaled = ""
    if row["share"] < 1:
        scaled = (_SCALED_WEIGHTS if is_full else _SCALED_ADAPTER).format(share=row["share"])
    if scaled and is_full:
        prepared.append("before = [parameter.detach().clone() for parameter in model.parameters()]")
    facts = report["facts"]
    return _SCRIPT.format(
        title=methods.METHODS[method].title,
        texts=", ".join(Path(text).name for text in args.text),
        result="the model" if is_full else "the adapter",
        output=method,
        name=settings.SCRIPTS[method],
        peft="" if is_full else "from peft import LoraConfig, get_peft_model\n",
        ours="\n".join(sorted(ours)),
        sequence_length=args.sequence_length,
        dtype=facts["dtype"],
        packing=facts["packing"],
        prepared="\n".join(prepared),
        training=_keywords(_training(args, facts["blocks"]), 8),
        scaled=scaled,
    )


def _options(report: Report, row: Report) -> argparse.Namespace:
    resolved = settings.of_mica_adapt(report["settings"], Path("run"))
    return methods.options(row["method"], resolved.args, learning_rate=row["rate"], steps=row["steps"])


def _adapter(report: Report, args: argparse.Namespace) -> str:
    config = {
        "task_type": "CAUSAL_LM",
        "init_lora_weights": args.init,
        "r": args.rank,
        "lora_alpha": args.alpha,
        "lora_dropout": args.dropout,
        **report["facts"]["targets"],
    }
    return f"config = LoraConfig(\n{_keywords(config, 4)}\n)\nmodel = get_peft_model(model, config)"


def _training(args: argparse.Namespace, blocks: int) -> dict[str, object]:
    return {
        "output_dir": "checkpoints",
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.scheduler,
        "warmup_steps": args.warmup_ratio,  # below 1: the share of all steps
        "optim": args.optimizer,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "dataloader_drop_last": blocks >= args.batch_size,
        "remove_unused_columns": False,
        "seed": 0,
        "data_seed": 0,
        "save_strategy": "no",
        "report_to": "none",
    }


def _keywords(values: dict[str, object], indent: int) -> str:
    return "\n".join(f"{' ' * indent}{name}={value!r}," for name, value in values.items())


def command(report: Report, row: Report) -> str:
    """The `mica adapt` command of the training of MiCA in ``row``: the same blocks in the same order."""
    words = ["mica", "adapt"]
    for name, value in settings.shared(report["settings"]).items():
        values = value if isinstance(value, list) else [value]
        words += [OF_ADAPT[name].flag, *map(str, values)]
    words += ["--learning-rate", f"{row['rate']:g}", "--steps", str(row["steps"]), "--output", "run"]
    return shlex.join(words)
