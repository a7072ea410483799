"""What is in the output folder of a run, and who may write there."""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from mica.cli.folder import check_begun, entries
from mica.cli.output import SCRATCH, check_folder, explained
from mica.errors import UsageError

SETTINGS = "run.yaml"  # the settings of the run
HEADER = "# mica adapt"  # with which they begin
SUMMARY = "summary.json"  # and what was measured, once it has ended
BASE = "base"
MARKER = "complete.json"  # in a checkpoint: see `mica.cli.adapt.checkpoints`


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or it holds anything else.

    Raises UsageError for one that is there and cannot be read: nothing may take it for missing.
    """
    cannot_be_read = explained(f"{path} cannot be read", OSError)
    with cannot_be_read, suppress(FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return None


def check(args: argparse.Namespace) -> None:
    """Raise UsageError if a run must not or cannot write to ``args.output``; makes and removes nothing."""
    output = args.output
    check_folder("--output", output)
    found = entries(output)
    if args.resume:
        check_begun(output, SETTINGS)
    elif found and not _holds_nothing_of_value(output, found):
        what = "is not empty: choose another folder"
        if (output / SETTINGS).is_file():
            what += ", or use --resume to continue the run there"
        raise UsageError(f"--output {output}: {what}")


def _holds_nothing_of_value(output: Path, names: list[str]) -> bool:
    """Whether ``names`` are what a run leaves that was killed before its first checkpoint was complete.

    Its first command may be given again.
    """
    whole = [name for name in names if not name.endswith(SCRATCH)]
    if not whole:  # killed as it wrote the first file
        return True
    settings = output / SETTINGS
    if not settings.is_file() or not settings.read_bytes().startswith(HEADER.encode()):
        return False
    return all(name in (SETTINGS, BASE, "runs") for name in whole)
