"""Checkpoints that are whole, or do not count.

The Trainer writes a checkpoint file by file. Whatever happens in between, a checkpoint counts only with the
marker ``complete.json``, which is written last, after all files have reached the disk, and names each with
its size and a hash of its contents. Sizes are compared wherever a checkpoint is looked for, hashes once,
before one is resumed. The record of the output folder says which checkpoints are the run's, so that no other
is resumed or removed, and which of them were complete, so that one that has lost its marker is named.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

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
    sizes = {}
    hashes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            name = path.relative_to(checkpoint).as_posix()
            sizes[name] = path.stat().st_size
            hashes[name] = fingerprint.of_file(path).hex()
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
    marker = _read(checkpoint)
    if marker is None or _of_another_size(checkpoint, marker) is not None:
        return None
    return marker.facts


def marked_facts(checkpoint: Path) -> dict[str, Any] | None:
    """What `mark` was given, whatever has become of the files since; None where there is no marker."""
    marker = _read(checkpoint)
    if marker is None:
        return None
    return marker.facts


class _Marker(NamedTuple):
    """What `mark` was given, and size (bytes) and hash of each file of the checkpoint by its name."""

    facts: dict[str, Any]
    sizes: dict[str, int]
    hashes: dict[str, str]


def _read(checkpoint: Path) -> _Marker | None:
    """The marker of ``checkpoint``; None if there is none, or it is not what `mark` writes."""
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        facts = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        sizes = facts.pop("files")
        hashes = facts.pop("hashes")
        if sizes and hashes.keys() == sizes.keys():  # one that names no file stands for none
            return _Marker(facts, sizes, hashes)
    return None


def _of_another_size(checkpoint: Path, marker: _Marker) -> str | None:
    """The first file that is missing or does not have the size in ``marker``; None if all do."""
    for name, size in marker.sizes.items():
        try:
            if (checkpoint / name).stat().st_size != size:
                return name
        except OSError:
            return name
    return None


def _of_another_hash(checkpoint: Path, marker: _Marker) -> str | None:
    """The first file that cannot be read or does not have the hash in ``marker``; None if all do."""
    for name, expected in marker.hashes.items():
        try:
            if fingerprint.of_file(checkpoint / name).hex() != expected:
                return name
        except OSError:
            return name
    return None


def _own(output: Path) -> dict[Path, bool]:
    """The checkpoints of the run in ``output`` -> whether each was complete once; oldest first."""
    found = record.read(output)
    if found is None:
        return {}
    own = {}
    for path in folders(output):
        if path.name in found.files:
            own[path] = found.files[path.name] is not None or (path / MARKER).is_file()
    return own


def _complete(output: Path) -> list[Path]:
    return [path for path in _own(output) if facts(path) is not None]


def marked(output: Path) -> list[Path]:
    """The run's that were complete once, though files may be damaged or lost now; oldest step first."""
    return [path for path, was_complete in _own(output).items() if was_complete]


def damaged(checkpoint: Path) -> str | None:
    """The first file of a `marked` checkpoint that does not hold what was marked; None if all do.

    Reads every file, unless a size shows it already.
    """
    marker = _read(checkpoint)
    if marker is None:
        return MARKER
    return _of_another_size(checkpoint, marker) or _of_another_hash(checkpoint, marker)


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint in ``output``; None if there is none."""
    return max(_complete(output), key=step, default=None)


def to_resume(output: Path) -> Path:
    """The checkpoint that ``--resume`` goes on from: the newest complete one without damage. Changes nothing.

    Raises UsageError if there is none.
    """
    reasons = []
    for path in reversed(marked(output)):
        name = damaged(path)
        if name is None:
            return path
        reasons.append(f"{path.name} is damaged ({name})")
    if not reasons:
        reasons.append(_why_none(output))
    raise UsageError(
        f"--resume: nothing to continue from in {output}: {' and '.join(reasons)}; leave out --resume to "
        "start afresh"
    )


def _why_none(output: Path) -> str:
    """Why there is no checkpoint of the run in ``output`` that was ever complete."""
    found = folders(output)
    if not found:
        return "it has no checkpoint"
    newest = found[-1]
    if facts(newest) is None:
        return f"{newest.name} is incomplete"
    return (
        f"{newest.name} belongs to another run than {record.FILE} (copy that file too, from the same folder)"
    )


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
    what = f"{checkpoint.name} was written with {', '.join(changed.values())}"
    raise UsageError(f"--resume: {what}: continuing would be another training run. {remedy}")


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
            what = f"{path.name} was written after {resumed.name} had been chosen to continue from"
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
    """Turn a failure to write ``output/name`` into one UsageError in all processes; remove what is half done.

    Every process must enter it. It may be entered within itself, before a collective that a process which has
    failed would not reach. An error of another kind is raised as it is. A checkpoint is claimed first.
    """
    is_checkpoint = name.startswith(PREFIX_CHECKPOINT_DIR)
    if is_checkpoint:
        processes.on_main(record.claim, output, name)
    try:
        with processes.agreed((OSError, UsageError)), _writer_errors(output):
            yield
    except NotWrittenError:  # from within it: all processes have been told
        raise
    except (OSError, UsageError) as error:
        if PartialState().is_main_process and is_checkpoint:
            shutil.rmtree(output / name, ignore_errors=True)
        why = f"{name} cannot be written: {one_line(error)}; {saved(output)}"
        raise NotWrittenError(f"--output {output}: {why}") from error


def saved(output: Path) -> str:
    """Half a sentence: what a run in ``output`` can continue from."""
    checkpoint = latest(output)
    if checkpoint is None:
        return "nothing was saved"
    return f"the last complete checkpoint is {checkpoint} (--resume continues from it)"
