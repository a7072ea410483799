"""Checkpoints that are whole, or do not count.

The Trainer writes a checkpoint file by file. Whatever happens in between, a checkpoint counts only with the
marker ``complete.json``, which is written last, after all files have reached the disk, and names each with
its size and a hash of its contents. Sizes are compared wherever a checkpoint is looked for, hashes once,
before one is resumed. The record of the output folder says which checkpoints are the run's, so that no other
is resumed or removed, and which of them have been complete, so that one that has lost its marker is named.
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

from mica.cli import record
from mica.cli.adapt import fingerprint, processes
from mica.cli.output import finish_files, flush, one_line
from mica.cli.record import MARKER
from mica.errors import UsageError

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
    finish_files(checkpoint)
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    files = {path.relative_to(checkpoint).as_posix(): path for path in paths}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    hashes = {name: fingerprint.of_file(path).hex() for name, path in files.items()}
    marker = {**facts, "files": sizes, "hashes": hashes}
    scratch = checkpoint / f".{MARKER}"
    try:
        scratch.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        flush(scratch)
        os.replace(scratch, checkpoint / MARKER)
    finally:
        scratch.unlink(missing_ok=True)
    for folder in (checkpoint, checkpoint.parent):
        flush(folder)
    record.completed(checkpoint.parent, checkpoint.name)


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


def _own(output: Path) -> dict[Path, bool]:
    """The checkpoints of the run in ``output`` -> whether each was complete once; oldest first."""
    found = record.read(output)
    if found is None:
        return {}
    ours = [path for path in folders(output) if path.name in found.files]
    return {path: found.files[path.name] is not None or (path / MARKER).is_file() for path in ours}


def _complete(output: Path) -> list[Path]:
    return [path for path in _own(output) if facts(path) is not None]


def marked(output: Path) -> list[Path]:
    """The run's that were complete once, though files may be damaged or lost now; oldest step first."""
    return [path for path, was_complete in _own(output).items() if was_complete]


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
    if not found:
        found = [f"{path.name} {_why_not_own(path)}" for path in folders(output)[-1:]]
    why = " and ".join(found or ["it has no checkpoint"])
    raise UsageError(
        f"--resume: nothing to continue from in {output}: {why}; leave out --resume to start afresh"
    )


def _why_not_own(checkpoint: Path) -> str:
    if facts(checkpoint) is None:
        return "is incomplete"
    return f"is of another run than {record.FILE} there (put that file of its folder beside it)"


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
    _remove(output, [path for path in _complete(output)[:-keep] if step(path) != best])


def discard(output: Path, resumed: Path | None = None) -> None:
    """Remove the run's checkpoints in ``output`` that are not complete. One process only.

    Those after the one that is ``resumed`` too, which are damaged.

    Raises UsageError, and removes nothing, if one of these is not: it would have been resumed, had it been
    there then.
    """
    unwanted = []
    for path in _own(output):
        is_later = resumed is not None and step(path) > step(resumed)
        if is_later and damaged(path) is None:
            what = f"{path.name} was written after {resumed.name} had been chosen to go on from"
            raise UsageError(f"--output {output}: {what}: another run writes to it")
        if is_later or facts(path) is None:
            unwanted.append(path)
    _remove(output, unwanted)


def _remove(output: Path, unwanted: list[Path]) -> None:
    """Remove checkpoints of the run, but none into which somebody has put a file; what fails stays."""
    with suppress(OSError, UsageError):
        found = record.read(output)
        for path in unwanted:
            if record.stranger(output, found, [path.name]) is None:
                shutil.rmtree(path, ignore_errors=True)
        record.forget(output, *(path.name for path in unwanted if not path.exists()))


class NotWrittenError(UsageError):
    """What `written` raises in all processes."""

    is_known = True


@contextmanager
def written(output: Path, name: str) -> Iterator[None]:
    """Turn a failure to write ``output/name`` into one UsageError in all processes; remove what is half done.

    Every process must enter it. It may be entered within itself, before a collective that a process which has
    failed would not reach. An error of another kind is raised as it is. A checkpoint is claimed first.
    """
    is_checkpoint = name.startswith(PREFIX_CHECKPOINT_DIR)
    if is_checkpoint:
        processes.on_main(record.claim, output, name)
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
        if PartialState().is_main_process and is_checkpoint:
            shutil.rmtree(output / name, ignore_errors=True)
        why = f"{name} cannot be written: {one_line(error)}; {saved(output)}"
        raise NotWrittenError(f"--output {output}: {why}") from error


def saved(output: Path) -> str:
    """Half a sentence: what a run in ``output`` can be gone on from."""
    checkpoint = latest(output)
    if checkpoint is None:
        return "nothing was saved"
    return f"the last complete checkpoint is {checkpoint} (--resume continues from it)"
