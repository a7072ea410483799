"""The options of ``mica adapt`` as one table, which also YAML files are read and written by."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mica.cli.adapt.recipes import RECIPES
from mica.cli.arguments import DTYPES, number

# By the Trainer's names; its other schedules need parameters of their own.
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
HELP_WIDTH = 110

_count = number(int, 1, low_allowed=True)
_share = number(float, 0, 1)


class Option(NamedTuple):
    """``--name-with-dashes``; ``name`` is the attribute and the key in YAML.

    ``parse``: from a string, or bool for a switch; ``default``: also None where a recipe or nothing gives the
    value; ``many``: a list of one or more. ``by_run``: belongs to one start of the command, not to the
    run, so it is neither read from YAML nor written to it. ``may_change``: ``--resume`` allows another value,
    as training is the same.
    """

    name: str
    help: str
    parse: Callable | type = str
    default: object = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    many: bool = False
    required: bool = False
    by_run: bool = False
    may_change: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


GROUPS: dict[str, tuple[Option, ...]] = {
    "model": (
        Option("model", "Hub id, checkpoint folder or GGUF file", metavar="MODEL", required=True),
        Option(
            "adapter", "go on from this MiCA adapter, with its rank, alpha and layers", Path, metavar="DIR"
        ),
        Option(
            "dtype",
            "of the frozen weights: auto, float32, bfloat16 or float16",
            default="auto",
            metavar="NAME",
            choices=DTYPES,
        ),
        Option(
            "quantize", "quantise the frozen weights: 4 or 8 bits, by bitsandbytes", choices=("nf4", "int8")
        ),
        Option(
            "trust_remote_code", "run Python code that comes with the model", bool, False, may_change=True
        ),
    ),
    "data": (
        Option(
            "text",
            "text, JSONL, CSV, Parquet: files, folders, datasets",
            metavar="SOURCE",
            many=True,
            required=True,
        ),
        Option(
            "text_field", "column with the text; without it: text, content or the only one", metavar="NAME"
        ),
        Option(
            "text_weights",
            "share of each SOURCE; without it: by length",
            number(float, 0),
            metavar="NUMBER",
            many=True,
        ),
        Option("dataset_config", "configuration of a dataset from the Hub", metavar="NAME"),
        Option("held_out", "share of the documents that is never trained on", _share, 0.05, "SHARE"),
        Option("held_out_text", "measure on these instead of a share of SOURCE", metavar="SOURCE", many=True),
        Option(
            "retain",
            "text that must not be forgotten: perplexity before and after",
            metavar="SOURCE",
            many=True,
        ),
        Option("sequence_length", "tokens per block", number(int, 2, low_allowed=True), 512, "TOKENS"),
        Option(
            "packing",
            "attention within documents, or within a whole block",
            default="documents",
            metavar="documents|stream",
            choices=("documents", "stream"),
        ),
        Option(
            "workers",
            "processes that tokenise; without it: one per CPU",
            _count,
            metavar="N",
            may_change=True,
        ),
    ),
    "adapter": (
        Option(
            "recipe",
            "paper: arXiv 2604.01694; all-linear: ours",
            default="all-linear",
            choices=tuple(RECIPES),
        ),
        Option("rank", "rank", _count, metavar="R"),
        Option("alpha", "lora_alpha; the scaling is alpha / rank", _count, metavar="ALPHA"),
        Option(
            "target_modules",
            "all-linear (all but output layer and routers), or names with commas",
            metavar="NAMES",
        ),
        Option("experts", "the experts of a mixture; its routers only by --target-modules", bool),
        Option("dropout", "lora_dropout", number(float, 0, 1, low_allowed=True), metavar="P"),
    ),
    "training": (
        Option("steps", "optimiser steps, or:", _count, metavar="N"),
        Option("epochs", "passes over the text", number(float, 0), metavar="N"),
        Option("batch_size", "blocks per process and forward", _count, 2, "N"),
        Option("gradient_accumulation_steps", "forwards per step", _count, 1, "N"),
        Option("learning_rate", "peak learning rate", number(float, 0), metavar="RATE"),
        Option(
            "scheduler", f"by the Trainer's name: {', '.join(SCHEDULERS)}", choices=SCHEDULERS, metavar="NAME"
        ),
        Option(
            "warmup_ratio",
            "share of the steps to the peak",
            number(float, 0, 1, low_allowed=True),
            metavar="SHARE",
        ),
        Option("weight_decay", "weight decay of A", number(float, 0, low_allowed=True), metavar="RATE"),
        Option(
            "max_grad_norm",
            "clip gradients to this norm; 0: never",
            number(float, 0, low_allowed=True),
            metavar="NORM",
        ),
        Option("optimizer", "by the Trainer's name (optim)", default="adamw_torch", metavar="NAME"),
        Option(
            "gradient_checkpointing",
            "recompute activations: less memory, slower",
            bool,
            False,
            may_change=True,
        ),
        Option("seed", "order of the blocks, dropout", number(int, 0, 2**32, low_allowed=True), 0, "N"),
    ),
    "progress": (
        Option(
            "eval_steps",
            "measure perplexity every N steps, besides start and end",
            _count,
            metavar="N",
            may_change=True,
        ),
        Option("eval_blocks", "measure it on at most N blocks of each text", _count, 32, "N"),
        Option("log_steps", "log the loss every N steps", _count, 10, "N", may_change=True),
        Option(
            "report_to", "tensorboard, wandb, ... by the Trainer", metavar="NAME", many=True, may_change=True
        ),
    ),
    "output": (
        Option(
            "output",
            "folder for everything that the run writes",
            Path,
            metavar="DIR",
            required=True,
            may_change=True,
        ),
        Option(
            "save_steps", "checkpoint every N steps; the last two are kept", _count, 500, "N", may_change=True
        ),
        Option(
            "resume", "go on from the last checkpoint in DIR, with its run.yaml", bool, False, by_run=True
        ),
        Option("overwrite", "replace what an earlier run left in DIR", bool, False, by_run=True),
        Option("merge", "also write the merged model to DIR/merged", bool, False, may_change=True),
        Option(
            "push_to_hub", "upload the adapter to this private repository", metavar="REPO", may_change=True
        ),
        Option("config", "YAML file with options; the command line wins", Path, metavar="FILE", by_run=True),
    ),
}
OPTIONS: dict[str, Option] = {option.name: option for group in GROUPS.values() for option in group}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One option to a line, with its default, and no list of all options in front."""

    def __init__(self, prog):
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=38, width=min(HELP_WIDTH, columns))

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
    parser.epilog = "recipes:\n" + recipes_table()
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add(group, option)


def _add(group, option: Option) -> None:
    common = {"dest": option.name, "default": argparse.SUPPRESS, "help": _help(option)}
    if option.parse is bool and option.by_run:
        group.add_argument(option.flag, action="store_true", **common)
    elif option.parse is bool:
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
    else:
        common |= {"type": option.parse, "metavar": option.metavar, "choices": option.choices}
        group.add_argument(option.flag, nargs="+" if option.many else None, **common)


def recipes_table() -> str:
    """What each recipe sets, one option to a line."""
    rows = [("", *RECIPES), ("source", *(recipe.source for recipe in RECIPES.values()))]
    for name in ("epochs", "steps", "rank", "alpha", *OPTIONS):
        if name in dict(row[:2] for row in rows):
            continue
        values = [_recipe_value(recipe, name) for recipe in RECIPES.values()]
        if any(value is not None for value in values):
            rows.append(
                (
                    name,
                    *(
                        "-" if value is None else f"{value:g}" if isinstance(value, float) else value
                        for value in values
                    ),
                )
            )
    return "\n".join("  " + "".join(f"{cell!s:20}" for cell in row).rstrip() for row in rows)


def _recipe_value(recipe, name: str):
    if name == "alpha":
        return f"{recipe.alpha_per_rank} x rank"
    return recipe.values.get(name)


def _help(option: Option) -> str:
    text = option.help.replace("%", "%%")
    if option.required:
        return f"{text} (required)"
    if option.default is not None and option.parse is not bool:
        return f"{text} [{option.default}]"
    return text
