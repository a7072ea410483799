"""The options of ``mica adapt`` as one table, from which --help, YAML and run.yaml follow, and recipes.

A new option is a row of `TABLE`, its name in `OPTIONS` of tests/test_house.py, and where its help is not
enough a sentence on its page (mica/cli/README.md). What the Trainer takes is passed on in trainer.py, and
given another value in `test_settings_reach_the_trainer`: test_options.py does not notice an option that
nothing reads.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from mica.cli.adapt.methods import METHODS
from mica.cli.arguments import COUNT_LIMIT, DTYPES, a_name, a_path, a_source, count, memory, number
from mica.errors import UsageError

Values = dict[str, object]  # of options, by their names

# By the Trainer's names; its other schedules need parameters of their own.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

# recipe -> option -> value, for MiCA. Not options: "source", and "alpha_per_rank", which is lora_alpha over
# the rank.
RECIPES = {
    # Continued pretraining in the paper: q_proj and v_proj, rank 16 or 32, learning rates from 5e-4 to 2e-3,
    # 4 to 8 epochs. Its text does not give alpha; alpha = 2r is in the author's example.
    "paper": {
        "source": "arXiv 2604.01694",
        "epochs": 4.0,
        "rank": 16,
        "alpha_per_rank": 2,
        "target_modules": "q_proj,v_proj",
        "dropout": 0.05,
        "learning_rate": 5e-4,
        "scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.3,
    },
    "all-linear": {
        "source": "ours",
        "steps": 100,
        "rank": 16,
        "alpha_per_rank": 1,
        "target_modules": "all-linear",
        "experts": True,
        "dropout": 0.0,
        "learning_rate": 1e-3,
        "scheduler": "linear",
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
}
# What all-linear has instead for LoRA and DoRA. alpha = 2r: "LoRA Learns Less and Forgets Less", which also
# recommends all linear layers, for continued pretraining. The rate: trl's page "LoRA Without Regret".
WITH_LORA = {"source": "arXiv 2405.09673, trl's documentation", "alpha_per_rank": 2, "learning_rate": 2e-4}


def recipe(name: str, method: str) -> Values:
    """The values of a recipe for a method. Raises UsageError where it has none."""
    if method == "mica":
        return RECIPES[name]
    if name == "paper":
        raise UsageError(f"--recipe paper: it is MiCA's and has no values for {METHODS[method].title}")
    return RECIPES[name] | WITH_LORA


class Option(NamedTuple):
    """One option: ``--name-with-dashes`` on the command line, ``name`` as attribute and as key in YAML.

    default: None where a recipe or nothing gives the value.
    parse: turns a string into the value; bool for a switch.
    many: takes a list of one or more values.
    by_run: belongs to one start of the command, not to the run: neither read from YAML nor written to it.
    may_change: ``--resume`` accepts another value, as training stays the same.
    needs: names of the options that must be given too.
    """

    name: str
    help: str
    metavar: str | None = None
    default: object = None
    parse: Callable | type = a_name
    choices: Iterable[str] | None = None
    many: bool = False
    required: bool = False
    by_run: bool = False
    may_change: bool = False
    needs: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.parse is bool

    @property
    def is_path(self) -> bool:
        """Whether it names files or folders, perhaps on the Hub."""
        return self.parse in (a_path, a_source)


def _switch(name: str, text: str, **more) -> Option:
    return Option(name, text, default=False, parse=bool, **more)


_COUNT = count()
_POSITIVE = number(float, 0)
_NOT_NEGATIVE = number(float, 0, low_allowed=True)
_SHARE = number(float, 0, 1)
_SHARE_OR_0 = number(float, 0, 1, low_allowed=True)


TABLE = (  # a string: the title of the group that begins there
    "model",
    Option("model", "Hub id, checkpoint folder or GGUF file", "MODEL", parse=a_source, required=True),
    Option("adapter", "continue from this adapter: its method, rank, alpha, layers", "DIR", parse=a_path),
    Option(
        "dtype",
        "dtype of the frozen weights: auto, float32, bfloat16 or float16",
        "NAME",
        default="auto",
        choices=DTYPES,
    ),
    Option(
        "quantize",
        "quantise the frozen weights to 4 (nf4) or 8 bits (int8) with bitsandbytes",
        choices=("nf4", "int8"),
    ),
    _switch("trust_remote_code", "run Python code that comes with the model", may_change=True),
    "data",
    Option(
        "text",
        "text, JSONL, CSV, Parquet: files, folders, datasets",
        "SOURCE",
        parse=a_source,
        many=True,
        required=True,
    ),
    Option("text_field", "column with the text; default: text, content or the only text column", "NAME"),
    Option("dataset_config", "configuration of a dataset on the Hub", "NAME"),
    Option("held_out", "share of the documents to measure on, never trained on", "SHARE", 0.05, _SHARE),
    Option(
        "held_out_text",
        "measure on these instead of a share of SOURCE",
        "SOURCE",
        parse=a_source,
        many=True,
    ),
    Option("retain", "text on which to measure forgetting", "SOURCE", parse=a_source, many=True),
    Option("sequence_length", "tokens per block", "TOKENS", 512, count(2)),
    Option(
        "packing",
        "attend within each document or across the block",
        default="documents",
        choices=("documents", "stream"),
    ),
    "adapter",
    Option("method", "what is trained: A of MiCA, or LoRA or DoRA", default="mica", choices=METHODS),
    Option(
        "recipe",
        "values for what is not given: paper (arXiv 2604.01694) or all-linear",
        default="all-linear",
        choices=RECIPES,
    ),
    Option("rank", "rank of the adapter", "R", parse=_COUNT),
    Option("alpha", "lora_alpha; the scaling is alpha / rank", "ALPHA", parse=_COUNT),
    Option(
        "target_modules",
        "all-linear (all but output layer and routers), or comma-separated names",
        "NAMES",
    ),
    Option("experts", "adapt the experts; routers only if --target-modules names them", parse=bool),
    Option("dropout", "lora_dropout", "P", parse=_SHARE_OR_0),
    Option("train_embeddings", "also train input and output embeddings, as whole modules", parse=bool),
    "training",
    Option("steps", "optimiser steps; or use --epochs", "N", parse=_COUNT),
    Option("epochs", "passes over the text", "N", parse=number(float, 0, COUNT_LIMIT)),
    Option("batch_size", "blocks per process and forward pass", "N", 2, _COUNT),
    Option("gradient_accumulation_steps", "forward passes per optimiser step", "N", 1, _COUNT),
    Option("learning_rate", "peak learning rate", "RATE", parse=_POSITIVE),
    Option(
        "embedding_learning_rate",
        "learning rate for embeddings; default: learning rate / 10",
        "RATE",
        parse=_POSITIVE,
        needs=("train_embeddings",),
    ),
    Option(
        "scheduler",
        "by the Trainer's name: cosine, ...; an invalid name lists all",
        "NAME",
        choices=SCHEDULERS,
    ),
    Option("warmup_ratio", "share of the steps until the peak", "SHARE", parse=_SHARE_OR_0),
    Option("weight_decay", "weight decay of what is trained", "RATE", parse=_NOT_NEGATIVE),
    Option("max_grad_norm", "clip gradients to this norm; 0: never", "NORM", parse=_NOT_NEGATIVE),
    Option("optimizer", "by the Trainer's name (optim)", "NAME", "adamw_torch"),
    _switch("gradient_checkpointing", "recompute activations: less memory, slower", may_change=True),
    Option(
        "memory",
        "do so in as few layers as each batch needs to fit so many GiB; auto: what is free on the device",
        "GIB",
        parse=memory,
        may_change=True,
    ),
    Option("seed", "seed for the order of the blocks, dropout, and A of LoRA", "N", 0, count(0, 2**32)),
    "progress",
    Option(
        "eval_steps",
        "measure perplexity every N steps, besides start and end",
        "N",
        parse=_COUNT,
        may_change=True,
    ),
    Option("eval_blocks", "measure it on at most N blocks of each text", "N", 32, _COUNT),
    Option(
        "keep_best",
        "keep the step with the lowest held-out perplexity, not the last",
        parse=bool,
        may_change=True,
        needs=("eval_steps",),
    ),
    Option(
        "patience",
        "stop after N measurements without a lower one; keeps the best",
        "N",
        parse=_COUNT,
        may_change=True,
        needs=("eval_steps",),
    ),
    Option("log_steps", "log the loss every N steps", "N", 10, _COUNT, may_change=True),
    Option(
        "report_to",
        "trackers by the Trainer's names: tensorboard, wandb, ...",
        "NAME",
        many=True,
        may_change=True,
    ),
    "output",
    Option(
        "output",
        "folder for everything that the run writes",
        "DIR",
        parse=a_path,
        required=True,
        may_change=True,
    ),
    Option(
        "save_steps",
        "write a checkpoint every N steps; the last two are kept",
        "N",
        500,
        _COUNT,
        may_change=True,
    ),
    _switch("resume", "continue from the last checkpoint in DIR, with its run.yaml", by_run=True),
    Option("config", "YAML file with options; the command line wins", "FILE", parse=a_path, by_run=True),
)
OPTIONS = {row.name: row for row in TABLE if isinstance(row, Option)}


def check_required(rows: Iterable[Option], values: Values) -> None:
    """Raise UsageError if one of ``rows`` is required and has no value."""
    missing = [row.flag for row in rows if row.required and values.get(row.name) is None]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")


def declare(
    parser: argparse.ArgumentParser, table: Iterable[str | Option] = TABLE, recipes: bool = True
) -> None:
    """Add all options in groups. None has a default there: only what was given is in the namespace.

    ``recipes``: whether the help lists them.
    """
    required = []
    for row in table:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
            continue
        _add(group, row)
        if row.required:
            required.append(f"{row.flag} {row.metavar}{' ...' if row.many else ''}")
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=38)
    parser.usage = f"{parser.prog} {' '.join(required)} [options]"
    if recipes:
        parser.epilog = f"{_recipe_table()}\n\n{parser.epilog or ''}".rstrip()


def _add(group, option: Option) -> None:
    """Declare ``option`` in an argparse group."""
    if option.is_switch:
        action = "store_true" if option.by_run else argparse.BooleanOptionalAction
        group.add_argument(option.flag, action=action, default=argparse.SUPPRESS, help=option.help)
        return

    text = option.help
    if option.required:
        text += " (required)"
    elif option.default is not None:
        text += f" [{option.default}]"
    keywords = {"type": option.parse, "choices": option.choices, "metavar": option.metavar, "help": text}
    if option.many:
        keywords |= {"nargs": "+", "action": "extend"}  # given again, it adds
    group.add_argument(option.flag, default=argparse.SUPPRESS, **keywords)


def _recipe_table() -> str:
    """The recipes side by side, a line per option."""
    columns = RECIPES | {"for lora and dora": recipe("all-linear", "lora")}
    rows = dict.fromkeys(name for values in columns.values() for name in values)
    del rows["source"]  # which the help of --recipe says

    lines = [f"{'recipes:':22}" + "".join(f"{name:20}" for name in columns)]
    for row in rows:
        lines.append(f"  {row:20}" + "".join(f"{values.get(row, '-')!s:20}" for values in columns.values()))
    return "\n".join(line.rstrip() for line in lines)
