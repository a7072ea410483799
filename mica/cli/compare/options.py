"""The options of ``mica compare``: its own, and those of ``mica adapt`` that all its trainings share."""

import argparse

from mica.cli.adapt.options import OPTIONS as OF_ADAPT
from mica.cli.adapt.options import Option
from mica.cli.arguments import count, number
from mica.cli.compare.methods import METHODS, RANDOM

RANK = 64  # with 16, MiCA learned next to nothing in the study (bench/README.md, model quality)
BLOCKS = 64  # measured of each text; the more documents they are from, the narrower are the intervals


def _some_methods(text: str) -> list[str]:
    """An argparse type: names of `METHODS`, separated by commas, two or more."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not one of {', '.join(METHODS)}")
    if len(set(names)) < max(2, len(names)):
        raise argparse.ArgumentTypeError(f"must be two or more different methods, not '{text}'")
    return names


def _grid(text: str) -> list:
    """An argparse type: METHOD=RATE,RATE,... as a name and its learning rates."""
    name, _, values = text.partition("=")
    if name not in METHODS or not values:
        expected = f"must be METHOD=RATE,RATE,... with a method of {', '.join(METHODS)}"
        raise argparse.ArgumentTypeError(f"{expected}, not '{text}'")
    rate = number(float, 0)
    rates = sorted({rate(value) for value in values.split(",")})
    return [name, rates]


def _taken(name: str, **changes) -> Option:
    """The option of `mica adapt`, with ``changes``."""
    return OF_ADAPT[name]._replace(**changes)


TABLE = (
    "model",
    *map(_taken, ("model", "dtype", "trust_remote_code")),
    "data",
    *map(_taken, ("text", "text_field", "dataset_config", "held_out", "held_out_text")),
    _taken("retain", required=True),
    *map(_taken, ("sequence_length", "packing")),
    "trainings",
    *map(_taken, ("recipe",)),
    _taken("rank", help="rank of MiCA and of a random B; LoRA has half of it", default=RANK),
    *map(_taken, ("target_modules", "dropout", "batch_size", "gradient_accumulation_steps")),
    *map(_taken, ("gradient_checkpointing",)),
    "comparison",
    Option(
        "methods",
        f"two or more of {','.join(METHODS)}; default: all but {RANDOM}, which is a control",
        "NAMES",
        parse=_some_methods,
    ),
    Option(
        "rates",
        "learning rates of a method, instead of four of ours; given again, it adds",
        "METHOD=RATE,...",
        parse=_grid,
        many=True,
    ),
    Option(
        "budget", "minutes of wall time for all of it", "MINUTES", 30.0, number(float, 0), may_change=True
    ),
    Option("seeds", "trainings at most of what is near the best", "N", 3, count(), may_change=True),
    Option("steps", "steps of a whole training; default: what the budget allows", "N", parse=count(4)),
    Option(
        "jobs",
        "trainings at once on this machine; default: one per GPU, or per core up to 4",
        "N",
        parse=count(1, 1025),
        by_run=True,
    ),
    _taken("eval_blocks", default=BLOCKS),
    "output",
    _taken("output"),
    _taken("resume", help="go on with the comparison in DIR"),
    _taken("overwrite", help="replace the comparison in DIR"),
)
# Of a recipe's values, those that a comparison chooses by itself; --help does not list them.
CHOSEN = ("rank", "steps", "epochs", "learning_rate")
OPTIONS = {row.name: row for row in TABLE if isinstance(row, Option)}
SHARED = [name for name, row in OPTIONS.items() if name in OF_ADAPT and not row.by_run and name != "steps"]
