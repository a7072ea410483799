"""What the commands' arguments have in common."""

import argparse
import math
import os
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")


def number(kind: type, low: float, high: float = math.inf, *, low_allowed: bool = False):
    """An argparse type: a number of ``kind`` above ``low`` (or at it) and below ``high``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low < value < high or (low_allowed and value == low):
            return value
        bounds = f"{'at least' if low_allowed else 'above'} {low}"
        bounds += f" and below {high}" if high < math.inf else ""
        noun = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, not '{text}'")

    return parse


def a_path(text: str) -> Path:
    """An argparse type: the shell leaves ``--output=~/run`` as it is."""
    return Path(os.path.expanduser(text))


def add_command(commands, name: str, run, **texts) -> argparse.ArgumentParser:
    """A parser of its own on an argparse subparsers object, with defaults in its help; ``run`` runs it."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(name, formatter_class=formatter, allow_abbrev=False, **texts)
    parser.set_defaults(run=run)
    return parser


def add_dtype_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Declare ``--dtype``, with its help text, and ``--trust-remote-code``."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="auto", help=dtype)
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
