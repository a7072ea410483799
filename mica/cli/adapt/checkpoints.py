"""Checkpoints that are whole, or do not count.

The Trainer writes a checkpoint file by file, in a scratch folder. Once all files have reached the disk, with
the marker ``complete.json``, the folder is renamed to ``checkpoint-STEP``. What has no marker does not count.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mica.cli.adapt import fingerprint, processes
from mica.cli.adapt.folder import MARKER, read_object
from mica.cli.output import SCRATCH, files_in, finish_files, flush, json_text, one_line
from mica.cli.record import Record
from mica.errors import UsageError

_PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"  # of the names of checkpoints
REMEDY = "remove it, and the run continues from the one before"

# torch.save's writer says what it did, not why the system refused it
_WRITER = ("PytorchStreamWriter", "inline_container", "Parent directory", "iostream error", "unexpected pos")


def folder_of(output: Path, step: int) -> Path:
    """The checkpoint of ``step``."""
    return output / f"{_PREFIX}{step}"


def scratch(output: Path) -> Path:
    """The folder in which the Trainer writes checkpoints, by their names."""
    return output / f".checkpoint{SCRATCH}"


def folders(output: Path) -> list[Path]:
    """All ``checkpoint-STEP`` folders in ``output``, whole or not, oldest step first."""
    found = [path for path in output.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted((path for path in found if path.name.removeprefix(_PREFIX).isdecimal()), key=step)


def step(checkpoint: Path) -> int:
    """The step after which ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def finish(output: Path, step: int, facts: dict[str, Any]) -> None:
    """Declare the checkpoint of ``step`` in `scratch` complete. ``facts`` (JSON) are kept in its marker.

    Every file is flushed to the disk first: after a power failure no marker may stand for lost files.

    Raises OSError or UsageError if the disk is full, the folder has gone, or there is one of this name.
    """
    checkpoint = folder_of(output, step)
    _check_absent(checkpoint)
    written = folder_of(scratch(output), step)
    files = [path.relative_to(written).as_posix() for path in files_in(written)]
    (written / MARKER).write_text(json_text(facts | {"files": files}), encoding="utf-8")
    finish_files(written)
    Record(output).claim({checkpoint / path.relative_to(written): path for path in files_in(written)})
    try:
        os.rename(written, checkpoint)
    except OSError:
        _check_absent(checkpoint)  # somebody has made it meanwhile
        raise
    written.parent.rmdir()
    flush(checkpoint)
    flush(output)


def _check_absent(checkpoint: Path) -> None:
    if os.path.lexists(checkpoint):
        raise UsageError(f"{checkpoint} is there already: move it away")


def facts(checkpoint: Path) -> dict[str, Any] | None:
    """What `finish` was given; None where ``checkpoint`` is not complete."""
    return read_object(checkpoint / MARKER)


def complete(output: Path) -> list[Path]:
    """The complete checkpoints in ``output``, oldest step first."""
    return [path for path in folders(output) if facts(path) is not None]


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint in ``output``; None if there is none."""
    return next(reversed(complete(output)), None)


def check(checkpoint: Path, **settings: Any) -> None:
    """Raise UsageError if ``checkpoint`` was marked with another value of any of ``settings`` (JSON).

    One that the marker does not have is not compared.
    """
    written_with = facts(checkpoint) or {}
    changed = {}
    for name, value in settings.items():
        before = written_with.get(name, value)
        if before != value:
            changed[name] = f"{name} {before} (now {value})"
    if not changed:
        return

    remedy = f"Continue with the same values, or start a new run from the checkpoint: --adapter {checkpoint}"
    if fingerprint.BASE in changed:  # what B belongs to
        remedy = "Put the base of the run back where --model is, or start afresh"
    raise UsageError(
        f"--resume: {checkpoint.name} was written with {', '.join(changed.values())}: "
        f"continuing would be another training run. {remedy}"
    )


def check_files(checkpoint: Path) -> None:
    """Raise UsageError if a file of ``checkpoint`` is missing or cut off.

    The Trainer goes on without the states that are missing, and torch's advice for a file that was cut is to
    trust it.
    """
    for name in facts(checkpoint).get("files", ()):
        path = checkpoint / name
        what = None
        if not path.is_file():
            what = "is missing"
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            what = "is damaged"
        if what is not None:
            raise UsageError(f"--resume: {checkpoint} cannot be read ({name} {what}): {REMEDY}")


def rotate(output: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints of a run but the last ``keep`` and that of step ``best``, if that is not None.

    Files in them that the run has not written stay. Only one process may call this. Raises nothing.

    Not left to the Trainer: it removes the oldest by time of modification, and before the newest is known to
    be whole.
    """
    kept = complete(output)[-keep:]
    record = Record(output)
    for path in folders(output):
        if kept and step(path) < step(kept[0]) and step(path) != best:
            marker = (path / MARKER).relative_to(output).as_posix()
            # first: a kill must not leave it in half a checkpoint
            record.remove([marker, *record.below(path)])


class NotWrittenError(UsageError):
    """What `written` raises in all processes."""

    is_known = True


@contextmanager
def _writer_errors(output: Path) -> Iterator[None]:
    """Raise what safetensors' and torch.save's own writers raise as a UsageError with the reason."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        text = one_line(error)
        if isinstance(error, RuntimeError) and not any(part in text for part in _WRITER):
            raise
        if "os error 28" in text or shutil.disk_usage(output).free < 2**20:
            text = "No space left on device"
        raise UsageError(text) from error


@contextmanager
def written(output: Path, name: str) -> Iterator[None]:
    """Turn a failure to write ``output/name`` into one UsageError in all processes; remove half a checkpoint.

    Every process must enter it. It may be entered within itself, before a collective that a process which has
    failed would not reach. An error of another kind is raised as it is.
    """
    try:
        with processes.agreed((OSError, UsageError)), _writer_errors(output):
            yield
    except NotWrittenError:  # from within it: all processes have been told
        raise
    except (OSError, UsageError) as error:
        if PartialState().is_main_process and name.startswith(_PREFIX):
            shutil.rmtree(scratch(output), ignore_errors=True)
        raise NotWrittenError(
            f"--output {output}: {name} cannot be written: {one_line(error)}; {saved(output)}"
        ) from error


def saved(output: Path) -> str:
    """Half a sentence: what a run in ``output`` can continue from."""
    checkpoint = latest(output)
    if checkpoint is None:
        return "nothing was saved"
    return f"the last complete checkpoint is {checkpoint} (--resume continues from it)"
