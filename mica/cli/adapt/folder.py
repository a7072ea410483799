"""What is in the output folder of a run, and who may write there."""

import json
from contextlib import suppress
from pathlib import Path

from mica.cli.folder import check_new, entries
from mica.cli.output import check_folder
from mica.errors import UsageError

SETTINGS = "run.yaml"  # the settings of the run
HEADER = "# mica adapt"  # with which they begin
SUMMARY = "summary.json"  # and what was measured, once it has ended
BASE = "base"
MERGED = "merged"
CHECKPOINT = "checkpoint-"
MARKER = "complete.json"  # in a checkpoint: see `mica.cli.adapt.checkpoints`


def check(output: Path, *, resume: bool, merge: bool) -> None:
    """Raise UsageError if a run must not or cannot write to ``output``; makes and removes nothing."""
    check_folder("--output", output)
    found = entries(output)
    has_run = (output / SETTINGS).is_file()
    if resume and not has_run:
        raise UsageError(f"--resume: nothing to continue in {output}: {_what_is_missing(output)}")
    if found and not resume and not _holds_nothing_of_value(output, found):
        what = "is not empty: choose another folder"
        if has_run:
            what += ", or use --resume to continue the run there"
        raise UsageError(f"--output {output}: {what}")
    if merge and not _has_merged(output):
        check_new("--merge", output / MERGED, "move it away")


def _has_merged(output: Path) -> bool:
    """Whether the run in ``output`` has written its merged model, which may be written anew."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((output / SUMMARY).read_text(encoding="utf-8")).get("merged"))
    return False


def _what_is_missing(output: Path) -> str:
    if not output.is_dir():
        return "no such folder"
    if not entries(output):
        return "it is empty"
    return f"it has no {SETTINGS}"


def _holds_nothing_of_value(output: Path, names: list[str]) -> bool:
    """Whether ``names`` are what a run leaves that was killed before its first checkpoint was complete.

    Its first command may be given again.
    """
    settings = output / SETTINGS
    if not settings.is_file() or not settings.read_bytes().startswith(HEADER.encode()):
        return False
    for name in names:
        is_checkpoint = name.startswith(CHECKPOINT) and not (output / name / MARKER).is_file()
        if not (is_checkpoint or name in (SETTINGS, BASE, "runs") or name.endswith(".partial")):
            return False
    return True
