"""The ``mica`` command: ``mica COMMAND --help`` explains each one.

A command is a module with ``add_parser(subparsers)``, which declares its arguments, and
``run(args) -> int``, which returns the exit status. Modules import torch and transformers inside
``run`` only, so that ``--help`` and a mistyped argument answer at once.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

from mica import __version__
from mica.cli import adapt, compare, doctor, fits, inspect, run, transfer
from mica.cli.arguments import HelpFormatter, example, similar
from mica.cli.output import one_line, tell
from mica.errors import UnsuitableLayerError, UsageError

_COMMANDS = (run, adapt, compare, transfer, inspect, fits, doctor)
# PEFT imports these where they are installed, and they log at import: torchao and bitsandbytes list the
# kernels that cannot be loaded, torch warns that torchao uses a deprecated call. None of it concerns a user
# here, and a one-line error would stand below ten such lines.
NOISY = ("bitsandbytes", "kernels", "torch.utils._pytree", "torchao")

# "-rank" too, but neither a negative number nor "-h", behind which argparse allows anything.
_LIKE_AN_OPTION = re.compile(r"--|-(?!h)[A-Za-z]")
_MODEL = "HuggingFaceTB/SmolLM2-135M"
_EXAMPLE = example(
    f"mica adapt --model {_MODEL} --text corpus.jsonl --output run",
    f"mica transfer --adapter run --to {_MODEL}-Instruct --output chat",
    says="The first trains an adapter on a file of texts and writes it to run, the second adds what it has "
    "learned to a chat model. mica COMMAND --help lists the options of a command, and has an example.",
)


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line on stderr: no usage text in front of it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        """Refuse unknown arguments here, where the parser that lacks them can suggest its own.

        argparse passes those of a command up to the main parser, which does not know its options.
        """
        given = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(given)  # first: otherwise a misspelt required option is reported as missing
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._help}")
        return found, unknown

    def _refuse_unknown(self, given: list[str]) -> None:
        """End with an error at the first of this parser's own arguments that looks like an option."""
        known = self._option_string_actions
        for token in given:
            if token == "--":
                return
            if not _LIKE_AN_OPTION.match(token):
                if self._subparsers is not None:
                    commands = self._subparsers._group_actions[0].choices
                    if token not in commands:
                        self.error(f"no command is called '{token}'{similar(token, commands) or self._help}")
                    return  # what follows is for the parser of the command
                if any(action.nargs == argparse.REMAINDER for action in self._actions):
                    return  # what follows is for a script
                continue
            option = token.partition("=")[0]
            if option not in known:
                names = [name.strip("-") for name in known]  # with the dashes all names are similar
                hint = similar(option.strip("-"), names, "--") or self._help
                self.error(f"unrecognized arguments: {token}{hint}")

    @property
    def _help(self) -> str:
        """The end of a message about an argument that is like none of this parser."""
        return f"; {self.prog} --help lists all"


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mica",
        description="Minor Component Adaptation (MiCA) from the command line.",
        formatter_class=HelpFormatter,
        epilog=_EXAMPLE,
    )
    parser.add_argument("--version", action="version", version=f"mica {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run ``mica`` on ``argv`` (default: ``sys.argv[1:]``) and return its exit status.

    0 on success, 2 on bad input and where the output cannot be written (one line on stderr), 130 after
    Ctrl-C, 1 where nobody reads the output any more. Anything else is a bug and keeps its traceback;
    `mica adapt` ends with 143 after SIGTERM. `mica run` ends as its script does.
    """
    try:
        status = _run(argv)
        sys.stdout.flush()
    except OSError as error:
        if not _output_is_lost():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes at exit
        if isinstance(error, BrokenPipeError):  # its reader has gone, as `head` does
            return 1
        tell(f"mica: error: standard output cannot be written: {one_line(error)}")
        return 2
    if callable(status):  # the script of `mica run`, whose output, errors and signals are its own
        return status()
    return status


def _output_is_lost() -> bool:
    """Whether standard output takes no more. Without a buffer nothing is left to flush: write again."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _run(argv: list[str] | None) -> int | Callable[[], int]:
    """The exit status, or for `mica run` what is yet to be called."""
    try:
        prompt = parser()
        args = prompt.parse_args(argv)
        if args.command is None:
            prompt.error("no command is given; mica --help lists them")
    except SystemExit as stop:  # argparse: --help (0) or an error (2)
        return stop.code
    if args.command != "run":
        # a file's name must not end a run where a pipe is cp1252, as on Windows
        with suppress(AttributeError):
            sys.stdout.reconfigure(errors="backslashreplace")
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return args.run(args)
    except (UsageError, UnsuitableLayerError) as error:
        tell(f"mica {args.command}: error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        tell(f"\nmica {args.command}: stopped")
        return 130
