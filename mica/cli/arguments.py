"""What the commands' arguments have in common."""

import argparse
import difflib
import errno
import math
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")
COUNT_LIMIT = 2**31  # of steps, blocks, tokens: what the libraries below count in C or keep as a list
_WIDTH = 100  # of the sentences on a help page
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def number(kind: type, low: float, high: float = math.inf, *, low_allowed: bool = False):
    """An argparse type: a number of ``kind`` above ``low`` (or at it) and below ``high``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low < value < high or (low_allowed and value == low):
            return value
        noun = "a whole number" if kind is int else "a number"
        bounds = f"at least {low}" if low_allowed else f"above {low}"
        if high < math.inf:
            bounds += f" and below {high}"
        raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, not '{text}'")

    return parse


def count(low: int = 1, high: int = COUNT_LIMIT):
    """An argparse type: a whole number, at least ``low`` and below ``high``."""
    return number(int, low, high, low_allowed=True)


MEMORY = (
    "where gradient checkpointing is on, each batch checkpoints only as many layers as it needs to fit "
    "so many GiB; auto: what is free on the device"
)


def memory(text: str) -> float | str:
    """An argparse type: for `mica.fast.enable`."""
    return text if text == "auto" else number(float, 0)(text)


def a_name(text: str) -> str:
    """An argparse type: any string but the empty one, which a shell makes of an unset variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def a_path(text: str) -> Path:
    """An argparse type: a path that the system lets this process look at; there need not be anything.

    The shell leaves ``--output=~/run`` as it is, and ``--output=`` would be the working directory.
    """
    path = os.path.expanduser(a_name(text))
    _look_at(path)
    return Path(path)


def a_source(text: str) -> str:
    """An argparse type: the name of a model or a text, a path as in `a_path` or one on the Hub, as given."""
    a_path(text)
    return text


def _look_at(path: str) -> None:
    """Raise ArgumentTypeError if the system refuses to say what is at ``path``.

    Asked for once, here: `Path.exists`, `is_file` and `is_dir` raise such errors, wherever they are called.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise argparse.ArgumentTypeError(f"'{path}': {error.strerror}") from error
    except ValueError as error:  # a NUL or half a character, which YAML can express
        raise argparse.ArgumentTypeError(f"{path!r}: not a name of a file") from error
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"'{path}': {os.strerror(errno.EACCES)}")


def similar(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message: "; did you mean ``prefix``NAME?" with the most similar name, or nothing."""
    known = list(known)
    initials = {"".join(part[:1] for part in re.split("[-_]", each)): each for each in known}
    if len(name) > 1 and name in initials:  # --lr
        near = [initials[name]]
    else:
        near = difflib.get_close_matches(name, known, n=1)
    if not near:
        return ""
    return f"; did you mean {prefix}{near[0]}?"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leaves descriptions and examples as they are, and shows a default where there is one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def example(*lines: str, says: str) -> str:
    """The end of a help page: complete command lines, and a sentence that ``says`` what they do."""
    indented = [f"  {line}" for line in lines]
    return "\n".join(["example:", *indented, textwrap.fill(says, _WIDTH)])


def add_command(commands, name: str, run, description: str, **texts) -> argparse.ArgumentParser:
    """A parser of its own on an argparse subparsers object, with defaults in its help; ``run`` runs it."""
    about = textwrap.fill(description, _WIDTH, break_on_hyphens=False)
    parser = commands.add_parser(
        name, formatter_class=HelpFormatter, allow_abbrev=False, description=about, **texts
    )
    parser.set_defaults(run=run)
    return parser


def add_dtype_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Declare ``--dtype``, with its help text, and ``--trust-remote-code``."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="auto", help=dtype)
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
