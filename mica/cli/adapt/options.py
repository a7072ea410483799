"""The options of ``mica adapt`` as one table, from which --help, YAML and run.yaml follow, and recipes."""

import argparse
import shutil
from collections.abc import Callable
from typing import NamedTuple

from mica.cli.arguments import COUNT_LIMIT, DTYPES, a_name, a_path, a_source, count, number

# By the Trainer's names; its other schedules need parameters of their own.
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
HELP_WIDTH = 110
_NAMES = ("paper", "all-linear")
_ROWS = {
    # Continued pretraining in the paper: q_proj and v_proj, r 16 or 32, learning rates from 5e-4 to 2e-3,
    # 4 to 8 epochs. alpha = 2r is not in its text but in the author's example. all-linear is what mica adapt
    # has done from its first version.
    "source": ("arXiv 2604.01694", "ours"),
    "epochs": (4.0, None),
    "steps": (None, 100),
    "rank": (16, 16),
    "alpha_per_rank": (2, 1),
    "target_modules": ("q_proj,v_proj", "all-linear"),
    "experts": (None, True),  # of a mixture
    "dropout": (0.05, 0.0),
    "learning_rate": (5e-4, 1e-3),
    "scheduler": ("cosine", "linear"),
    "warmup_ratio": (0.1, 0.05),
    "weight_decay": (0.01, 0.0),
    "max_grad_norm": (0.3, 1.0),
}
# recipe -> option -> value, with the source and what lora_alpha is of the rank
RECIPES = {
    name: {row: cells[column] for row, cells in _ROWS.items() if cells[column] is not None}
    for column, name in enumerate(_NAMES)
}


class Option(NamedTuple):
    """``--name-with-dashes``; ``name`` is the attribute and the key in YAML.

    ``default``: None where a recipe or nothing gives the value; ``parse``: from a string, or bool for a
    switch; ``many``: a list of one or more. ``by_run``: belongs to one start of the command, not to the run,
    so it is neither read from YAML nor written to it.
    """

    name: str
    help: str
    metavar: str | None = None
    default: object = None
    parse: Callable | type = a_name
    choices: tuple[str, ...] | None = None
    many: bool = False
    required: bool = False
    by_run: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _switch(name: str, text: str, **more) -> Option:
    return Option(name, text, None, False, bool, **more)


_COUNT = count()
_THREADS = count(1, 1025)  # rayon starts as many as it is told, and panics where the system has no more
_POSITIVE, _NOT_NEGATIVE = number(float, 0), number(float, 0, low_allowed=True)
_SHARE, _SHARE_OR_0 = number(float, 0, 1), number(float, 0, 1, low_allowed=True)
_FROZEN = "of the frozen weights: auto, float32, bfloat16 or float16"
_PACKING = ("documents", "stream")

TABLE = (  # a string: the title of the group that begins there
    "model",
    Option("model", "Hub id, checkpoint folder or GGUF file", "MODEL", parse=a_source, required=True),
    Option("adapter", "continue from this MiCA adapter: its rank, alpha and layers", "DIR", None, a_path),
    Option("dtype", _FROZEN, "NAME", "auto", choices=DTYPES),
    Option("quantize", "quantise the frozen weights: 4 or 8 bits, by bitsandbytes", choices=("nf4", "int8")),
    _switch("trust_remote_code", "run Python code that comes with the model"),
    "data",
    Option(
        "text",
        "text, JSONL, CSV, Parquet: files, folders, datasets",
        "SOURCE",
        parse=a_source,
        many=True,
        required=True,
    ),
    Option("text_field", "column with the text; without it: text, content or the only one", "NAME"),
    Option("text_weights", "share of each SOURCE; without it: by length", "N", None, _POSITIVE, many=True),
    Option("dataset_config", "configuration of a dataset from the Hub", "NAME"),
    Option("held_out", "share of the documents that is never trained on", "SHARE", 0.05, _SHARE),
    Option(
        "held_out_text", "measure on these instead of a share of SOURCE", "SOURCE", parse=a_source, many=True
    ),
    Option(
        "retain",
        "text that must not be forgotten: perplexity before and after",
        "SOURCE",
        parse=a_source,
        many=True,
    ),
    Option("sequence_length", "tokens per block", "TOKENS", 512, count(2)),
    Option("packing", "attention within documents, or a whole block", None, "documents", choices=_PACKING),
    Option("workers", "threads that tokenise; without it: one per CPU", "N", None, _THREADS),
    "adapter",
    Option("recipe", "paper: arXiv 2604.01694; all-linear: ours", None, "all-linear", choices=_NAMES),
    Option("rank", "rank", "R", None, _COUNT),
    Option("alpha", "lora_alpha; the scaling is alpha / rank", "ALPHA", None, _COUNT),
    Option("target_modules", "all-linear (all but output layer and routers), or names with commas", "NAMES"),
    Option("experts", "adapt the experts; routers only by --target-modules", parse=bool),
    Option("dropout", "lora_dropout", "P", None, _SHARE_OR_0),
    Option("train_embeddings", "train input and output embeddings too, as whole modules", parse=bool),
    "training",
    Option("steps", "optimiser steps; or --epochs", "N", None, _COUNT),
    Option("epochs", "passes over the text", "N", None, number(float, 0, COUNT_LIMIT)),
    Option("batch_size", "blocks per process and forward", "N", 2, _COUNT),
    Option("gradient_accumulation_steps", "forwards per step", "N", 1, _COUNT),
    Option("learning_rate", "peak learning rate", "RATE", None, _POSITIVE),
    Option("embedding_learning_rate", "of the embeddings; default: a tenth", "RATE", None, _POSITIVE),
    Option(
        "scheduler", "by the Trainer's name: cosine, ...; a wrong one lists all", "NAME", choices=SCHEDULERS
    ),
    Option("warmup_ratio", "share of the steps to the peak", "SHARE", None, _SHARE_OR_0),
    Option("weight_decay", "weight decay of A and trained embeddings", "RATE", None, _NOT_NEGATIVE),
    Option("max_grad_norm", "clip gradients to this norm; 0: never", "NORM", None, _NOT_NEGATIVE),
    Option("optimizer", "by the Trainer's name (optim)", "NAME", "adamw_torch"),
    _switch("gradient_checkpointing", "recompute activations: less memory, slower"),
    Option("seed", "order of the blocks, dropout", "N", 0, count(0, 2**32)),
    "progress",
    Option("eval_steps", "measure perplexity every N steps, besides start and end", "N", None, _COUNT),
    Option("eval_blocks", "measure it on at most N blocks of each text", "N", 32, _COUNT),
    Option("keep_best", "write the step of the lowest held-out perplexity, not the last", parse=bool),
    Option("patience", "stop after N measurements without a lower one; keeps the best", "N", None, _COUNT),
    Option("max_retain_rise", "stop if --retain rises by more; keeps the best", "PERCENT", None, _POSITIVE),
    Option("log_steps", "log the loss every N steps", "N", 10, _COUNT),
    Option("report_to", "tensorboard, wandb, ... by the Trainer", "NAME", many=True),
    "output",
    Option("output", "folder for everything that the run writes", "DIR", None, a_path, required=True),
    Option("save_steps", "checkpoint every N steps; the last two are kept", "N", 500, _COUNT),
    _switch("resume", "continue from the last checkpoint in DIR, with its run.yaml", by_run=True),
    _switch("overwrite", "replace what an earlier run left in DIR", by_run=True),
    _switch("dry_run", "do the first steps and say what the run needs and takes; write nothing", by_run=True),
    _switch("merge", "also write the merged model to DIR/merged"),
    Option("push_to_hub", "upload the adapter to this private repository", "REPO"),
    Option("config", "YAML file with options; the command line wins", "FILE", None, a_path, by_run=True),
)
OPTIONS = {row.name: row for row in TABLE if isinstance(row, Option)}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One option to a line, with its default; no list of all options in front, and no line for --help."""

    def __init__(self, prog):
        width = min(HELP_WIDTH, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=38, width=width)

    def add_argument(self, action):
        if action.dest != "help":
            super().add_argument(action)

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.dest.replace('_', '-')}"
        if action.nargs == "+":
            return f"{action.option_strings[0]} {action.metavar} ..."
        return super()._format_action_invocation(action)


def declare(parser: argparse.ArgumentParser) -> None:
    """Add all options in groups. None has a default there: only what was given is in the namespace."""
    parser.formatter_class = _HelpFormatter
    parser.usage = f"{parser.prog} --model MODEL --text SOURCE ... --output DIR [options]"
    parser.epilog = f"{'recipes:':22}" + "".join(f"{name:20}" for name in _NAMES).rstrip()
    for row, cells in _ROWS.items():
        if row == "source":  # said by --recipe
            continue
        shown = (f"{cell:g}" if isinstance(cell, float) else str(cell or "-") for cell in cells)
        parser.epilog += f"\n  {row:20}" + "".join(f"{cell:20}" for cell in shown).rstrip()
    for row in TABLE:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
        elif row.parse is bool:
            action = "store_true" if row.by_run else argparse.BooleanOptionalAction
            group.add_argument(row.flag, action=action, default=argparse.SUPPRESS, help=row.help)
        else:
            note = " (required)" if row.required else f" [{row.default}]" if row.default is not None else ""
            shown = {"metavar": row.metavar, "help": row.help + note, "default": argparse.SUPPRESS}
            if row.many:  # given again, it adds
                shown |= {"nargs": "+", "action": "extend"}
            group.add_argument(row.flag, type=row.parse, choices=row.choices, **shown)
