"""Checkpoints that are whole, or do not count.

The Trainer writes a checkpoint file by file. Whatever happens in between, a checkpoint counts only with the
marker ``complete.json``, which is written last, after all files have reached the disk, and names each with
its size and a hash of its contents. Sizes are compared wherever a checkpoint is looked for, hashes once,
before one is resumed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mica.cli.adapt import fingerprint, processes
from mica.cli.output import one_line
from mica.errors import UsageError

MARKER = "complete.json"
# torch.save's writer says what it did, not why the system refused it
_WRITER = ("PytorchStreamWriter", "inline_container", "Parent directory", "iostream error", "unexpected pos")


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
    files = {path.relative_to(checkpoint).as_posix(): path for path in paths}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    hashes = {name: fingerprint.of_file(path).hex() for name, path in files.items()}
    marker = {**facts, "files": sizes, "hashes": hashes}
    scratch = checkpoint / f".{MARKER}"
    try:
        scratch.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        _flush(scratch)
        os.replace(scratch, checkpoint / MARKER)
    finally:
        scratch.unlink(missing_ok=True)
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
    marker, sizes, _ = _read(checkpoint)
    return None if _wrong(checkpoint, sizes, {}) else marker


def marked_facts(checkpoint: Path) -> dict[str, Any] | None:
    """What `mark` was given, whatever has become of the files since; None where there is no marker."""
    return _read(checkpoint)[0]


def _read(checkpoint: Path) -> tuple[dict[str, Any] | None, dict[str, int], dict[str, str]]:
    """What `mark` was given, size and hash of each file; an earlier version's marker has no hashes."""
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        sizes, hashes = marker.pop("files"), marker.pop("hashes", {})
        if sizes and hashes.keys() <= sizes.keys():  # one that names no file stands for none
            return marker, sizes, hashes
    return None, {}, {}


def _wrong(checkpoint: Path, sizes: dict[str, int], hashes: dict[str, str]) -> str | None:
    """The first file that is missing or has another size or hash than here; None if there is none."""
    for name, size in sizes.items():
        path, expected = checkpoint / name, hashes.get(name)
        with suppress(OSError):  # it is missing, or the disk cannot read it
            is_whole = path.stat().st_size == size
            if is_whole and (expected is None or fingerprint.of_file(path).hex() == expected):
                continue
        return name
    return None


def _complete(output: Path) -> list[Path]:
    return [path for path in folders(output) if facts(path) is not None]


def marked(output: Path) -> list[Path]:
    """All that were complete once, though files may be damaged now; oldest step first."""
    return [path for path in folders(output) if (path / MARKER).is_file()]


def damaged(checkpoint: Path) -> str | None:
    """The first file of a `marked` checkpoint that does not hold what was marked; None if all do.

    Reads every file. Without hashes in the marker only sizes are compared.
    """
    marker, *written = _read(checkpoint)
    return MARKER if marker is None else _wrong(checkpoint, *written)


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint in ``output``; None if there is none."""
    return max(_complete(output), key=step, default=None)


def to_resume(output: Path) -> Path:
    """The checkpoint that ``--resume`` goes on from: the newest complete one without damage. Changes nothing.

    Raises UsageError if there is none.
    """
    found = []
    for path in reversed(marked(output)):
        name = damaged(path)
        if name is None:
            return path
        found.append(f"{path.name} is damaged ({name})")
    half = [f"{path.name} is incomplete" for path in folders(output)[-1:]]
    why = " and ".join(found or half or ["it has no checkpoint"])
    raise UsageError(
        f"--resume: nothing to continue from in {output}: {why}; leave out --resume to start afresh"
    )


def check(checkpoint: Path, **settings: Any) -> None:
    """Raise UsageError if ``checkpoint`` was marked with another value of any of ``settings`` (JSON).

    One that the marker does not have is not compared.
    """
    found = facts(checkpoint) or {}
    changed = {name: value for name, value in settings.items() if found.get(name, value) != value}
    if changed:
        values = ", ".join(f"{name} {found[name]} (now {value})" for name, value in changed.items())
        remedy = f"Continue with the same, or start afresh from the checkpoint by --adapter {checkpoint}"
        if fingerprint.BASE in changed:  # what B belongs to
            remedy = "Put the base of the run back where --model is, or start afresh"
        what = f"{checkpoint.name} was written with {values}: continuing would be another training run"
        raise UsageError(f"--resume: {what}. {remedy}")


def rotate(output: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the last ``keep`` complete checkpoints and that of step ``best``, if not None.

    One process only; raises nothing.

    Not left to the Trainer: it removes the oldest by time of modification, and before the newest is known to
    be whole.
    """
    for path in _complete(output)[:-keep]:
        if step(path) != best:
            shutil.rmtree(path, ignore_errors=True)


def discard(output: Path, resumed: Path | None = None) -> None:
    """Remove the checkpoints in ``output`` that are not complete. One process only; raises nothing.

    Those after the one that is ``resumed`` too: they are damaged, or it would not have been chosen.
    """
    for path in folders(output):
        if facts(path) is None or (resumed is not None and step(path) > step(resumed)):
            shutil.rmtree(path, ignore_errors=True)


class NotWrittenError(UsageError):
    """What `written` raises in all processes."""

    is_known = True


@contextmanager
def written(output: Path, name: str) -> Iterator[None]:
    """Turn a failure to write ``output/name`` into one UsageError in all processes; remove what is half done.

    Every process must enter it. It may be entered within itself, before a collective that a process which has
    failed would not reach. An error of another kind is raised as it is.
    """
    try:
        with processes.agreed((OSError, SafetensorError, UsageError)):
            try:
                yield
            except (SafetensorError, RuntimeError) as error:
                text = one_line(error)
                if isinstance(error, RuntimeError) and not any(part in text for part in _WRITER):
                    raise
                is_full = "os error 28" in text or shutil.disk_usage(output).free < 2**20
                raise UsageError("No space left on device" if is_full else text) from error
    except NotWrittenError:  # from within it: all processes have been told
        raise
    except (OSError, SafetensorError, UsageError) as error:
        if PartialState().is_main_process and name.startswith(PREFIX_CHECKPOINT_DIR):
            shutil.rmtree(output / name, ignore_errors=True)
        why = f"{name} cannot be written: {one_line(error)}; {saved(output)}"
        raise NotWrittenError(f"--output {output}: {why}") from error


def saved(output: Path) -> str:
    """Half a sentence: what a run in ``output`` can be gone on from."""
    checkpoint = latest(output)
    if checkpoint is None:
        return "nothing was saved"
    return f"the last complete checkpoint is {checkpoint} (--resume continues from it)"
