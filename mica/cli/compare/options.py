"""The options of ``mica compare``: its own, and those of ``mica adapt`` that all its trainings share."""

import argparse

from mica.cli.adapt.options import OPTIONS as OF_ADAPT
from mica.cli.adapt.options import Option
from mica.cli.arguments import count, number
from mica.cli.compare.methods import METHODS

RANK = 64  # with 16, MiCA learned next to nothing in the study (bench/README.md, model quality)
BLOCKS = 64  # measured of each text


def _grid(text: str) -> list:
    """An argparse type: METHOD=RATE,RATE,... as a name and its learning rates."""
    name, _, values = text.partition("=")
    if name not in METHODS or not values:
        raise argparse.ArgumentTypeError(
            f"must be METHOD=RATE,RATE,... with a method of {', '.join(METHODS)}, not '{text}'"
        )
    rate = number(float, 0)
    return [name, [rate(value) for value in values.split(",")]]


TABLE = (
    "model",
    OF_ADAPT["model"],
    "data",
    OF_ADAPT["text"],
    OF_ADAPT["retain"]._replace(required=True),
    OF_ADAPT["sequence_length"],
    "trainings",
    OF_ADAPT["rank"]._replace(help="rank of MiCA; LoRA and DoRA have half of it", default=RANK),
    OF_ADAPT["batch_size"],
    Option(
        "methods",
        "what to compare; default: mica lora full",
        choices=METHODS,
        many=True,
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
    Option("steps", "steps of a whole training; default: what the budget allows", "N", parse=count(4)),
    Option("seeds", "trainings of each method at its best learning rate", "N", 3, count(), may_change=True),
    "output",
    OF_ADAPT["output"]._replace(help="folder for the comparison: new or empty"),
    OF_ADAPT["resume"]._replace(help="go on with the comparison in DIR"),
)
OPTIONS = {row.name: row for row in TABLE if isinstance(row, Option)}
SHARED = ("model", "text", "retain", "sequence_length", "rank", "batch_size")  # with `mica adapt`
