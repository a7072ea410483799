"""Checkpoints that are whole, or do not count.

The Trainer writes a checkpoint file by file. Whatever happens in between, a checkpoint counts only with the
marker ``complete.json``, which is written last, after all files have reached the disk, and names each with
its size.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mica.cli.adapt import processes
from mica.cli.output import one_line
from mica.errors import UsageError

MARKER = "complete.json"


def folders(output: Path) -> list[Path]:
    """All ``checkpoint-STEP`` folders in ``output``, whole or not, oldest step first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in output.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=step)


def step(checkpoint: Path) -> int:
    """The step after which ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def mark(checkpoint: Path, **facts: Any) -> None:
    """Declare ``checkpoint`` complete. ``facts`` (JSON) are kept in the marker: see ``facts``.

    Every file is flushed to the disk first: after a power failure no marker may stand for lost files.

    Raises OSError if the disk is full or the folder has gone; then there is no marker.
    """
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in paths:
        _flush(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in paths}
    scratch = checkpoint / f".{MARKER}"
    try:
        scratch.write_text(json.dumps({**facts, "files": sizes}, indent=1) + "\n", encoding="utf-8")
        _flush(scratch)
        os.replace(scratch, checkpoint / MARKER)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    for folder in (checkpoint, checkpoint.parent):
        _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def facts(checkpoint: Path) -> dict[str, Any] | None:
    """What `mark` was given; None where ``checkpoint`` is not complete (no marker, a file missing or cut)."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        sizes = marker.pop("files")
        whole = all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return marker if whole else None


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint in ``output``; None if there is none."""
    return next((path for path in reversed(folders(output)) if facts(path) is not None), None)


def to_resume(output: Path) -> Path:
    """The checkpoint that ``--resume`` goes on from. Changes nothing.

    Raises UsageError if there is no complete one.
    """
    checkpoint = latest(output)
    if checkpoint is None:
        half = folders(output)
        found = f"{half[-1].name} is incomplete" if half else "it has no checkpoint"
        raise UsageError(
            f"--resume: nothing to go on from in {output}: {found}; leave out --resume to start anew"
        )
    return checkpoint


def check(checkpoint: Path, **settings: Any) -> None:
    """Raise UsageError if ``checkpoint`` was marked with another value of one of ``settings``.

    Their names are shown, with spaces for underscores. One that the marker does not have is not compared.
    """
    found = facts(checkpoint) or {}
    for name, value in settings.items():
        if found.get(name, value) != value:
            raise UsageError(
                f"--resume: {checkpoint.name} was written with {name.replace('_', ' ')} {found[name]}, and "
                f"now it is {value}: the batches would be others. Go on with the same, or start anew from "
                f"the checkpoint by --adapter {checkpoint}"
            )


def rotate(output: Path, keep: int) -> None:
    """Remove all but the last ``keep`` complete checkpoints. One process only; raises nothing.

    Not left to the Trainer: it removes the oldest by time of modification, and before the newest is known to
    be whole.
    """
    complete = [path for path in folders(output) if facts(path) is not None]
    for path in complete[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def discard_incomplete(output: Path) -> None:
    """Remove the checkpoints in ``output`` that are not complete. One process only; raises nothing."""
    for path in folders(output):
        if facts(path) is None:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def written(output: Path, name: str) -> Iterator[None]:
    """Turn a failure to write ``output/name`` into one UsageError in all processes; remove what is half done.

    Every process must enter it. An error of another kind is raised as it is.
    """
    failed = None
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        failed = _cannot_write(output, error)
        if failed is None:
            raise
    try:
        processes.agree(failed)
    except UsageError as error:
        if PartialState().is_main_process and name.startswith("checkpoint-"):
            shutil.rmtree(output / name, ignore_errors=True)
        raise UsageError(f"--output {output}: {name} cannot be written: {error}; {saved(output)}") from failed


def _cannot_write(output: Path, error: Exception) -> UsageError | None:
    """The reason in a few words; None for an error of another kind."""
    if isinstance(error, OSError):
        return UsageError(error.strerror or one_line(error))
    text = one_line(error)
    # torch.save's writer says what it did, not why the system refused it
    writer = (
        "PytorchStreamWriter",
        "inline_container",
        "Parent directory",
        "iostream error",
        "unexpected pos",
    )
    if not isinstance(error, SafetensorError) and not any(part in text for part in writer):
        return None
    try:
        full = shutil.disk_usage(output).free < 2**20
    except OSError:  # the folder has gone
        full = False
    return UsageError("No space left on device" if full or "os error 28" in text else text)


def saved(output: Path) -> str:
    """Half a sentence: what a run in ``output`` can be gone on from."""
    checkpoint = latest(output)
    if checkpoint is None:
        return "nothing was saved"
    return f"the last complete checkpoint is {checkpoint} (--resume goes on from it)"
