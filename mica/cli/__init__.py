"""The ``mica`` command: ``mica COMMAND --help`` explains each one.

A command is a module with ``add_parser(subparsers)``, which declares its arguments, and
``run(args) -> int``, which returns the exit status. Modules import torch and transformers inside
``run`` only, so that ``--help`` and a mistyped argument answer at once.
"""

import argparse
import difflib
import logging
import sys
from contextlib import suppress

from mica import __version__
from mica.cli import adapt, doctor, inspect, transfer
from mica.cli.output import one_line
from mica.errors import UnsuitableLayerError, UsageError

_COMMANDS = (adapt, transfer, inspect, doctor)
# They log as they are imported, which PEFT does where they are installed: torchao and bitsandbytes which of
# their kernels cannot be loaded, torch that torchao uses a deprecated call. None of it concerns a user here,
# and a one-line error would stand below ten such lines.
NOISY = ("bitsandbytes", "kernels", "torch.utils._pytree", "torchao")


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line on stderr: no usage text in front of it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        """Of a command too: here, unlike above it, its options are known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = [option.strip("-") for option in self._option_string_actions]
            near = difflib.get_close_matches(unknown[0].partition("=")[0].strip("-"), names, n=1)
            hint = "".join(f"; did you mean --{name}?" for name in near)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mica", description="Minor Component Adaptation (MiCA) from the command line.")
    parser.add_argument("--version", action="version", version=f"mica {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run ``mica`` on ``argv`` (default: ``sys.argv[1:]``) and return its exit status.

    0 on success, 2 on bad input (one line on stderr), 130 after Ctrl-C. Anything else is a bug and keeps its
    traceback; `mica adapt` ends with 143 after SIGTERM.
    """
    with suppress(AttributeError):  # a file's name must not end a run where a pipe is cp1252, as on Windows
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse: --help (0) or an error (2)
        return stop.code
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return args.run(args)
    except (UsageError, UnsuitableLayerError) as error:
        print(f"mica {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmica {args.command}: stopped", file=sys.stderr)
        return 130
