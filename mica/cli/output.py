"""What the commands print and write."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mica.errors import UsageError


@contextmanager
def explained(what: str, kinds=Exception, kept: str = "") -> Iterator[None]:
    """Raise UsageError, ``what`` and the reason and ``kept``, for an error of ``kinds`` within."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        reason = first_sentences(getattr(error, "strerror", None) or str(error)) or type(error).__name__
        told = UsageError(f"{what}: {reason}{kept}")
        told.is_known = getattr(error, "is_known", False)  # to all processes: see `processes.agreed`
        raise told from error


def check_file(option: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Raise UsageError if no file can be written at ``path``, or its suffix is not in ``suffixes``."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {path}: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path}: exists and is not a file")
    _check_writable(option, path, path.parent)


def check_folder(option: str, path: Path, model: str) -> None:
    """Raise UsageError if no folder can be made or written at ``path``, or it is that of ``model``.

    ``model``: a folder, or anything else. Makes nothing.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path}: exists and is not a folder")
    if path.is_dir() and path.resolve() == Path(model).expanduser().resolve():
        raise UsageError(f"{option} {path}: is the folder of the model itself")
    _check_writable(option, path, next(place for place in (path, *path.resolve().parents) if place.exists()))


def _check_writable(option: str, path: Path, folder: Path) -> None:
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        what = "not writable" if folder.is_dir() else "not a folder"
        raise UsageError(f"{option} {path}: {folder} is {what}")


def write_file(option: str, path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, then rename it: never half a file.

    Raises UsageError if that fails (the disk is full, the folder has gone).
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with explained(f"{option} {path}: cannot be written", OSError):
            write(scratch)
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_folder(option: str, path: Path, *parts, card: str | None = None, kept: str = "") -> None:
    """Let ``parts`` save themselves (``save_pretrained``) to a temporary folder next to ``path``, with
    ``card`` as README.md, then rename it: never half a folder.

    A folder that is at ``path`` is replaced. ``kept`` follows the message of an error: what is not lost.

    Raises UsageError if that fails (the disk is full, the folder has gone).
    """
    # Fixed names, so that the next run clears what a killed one has left.
    scratch, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    full = (OSError, SafetensorError)  # the latter: safetensors' own for a full disk
    try:
        with explained(f"{option} {path}: cannot be written", full, kept):
            _remove(scratch, old)
            scratch.mkdir(parents=True)
            for part in parts:
                part.save_pretrained(scratch)
            if card is not None:
                (scratch / "README.md").write_text(card, encoding="utf-8")
            if path.exists():
                path.rename(old)
            scratch.rename(path)
    finally:
        if old.exists() and not path.exists():  # the second of the two renames has failed
            old.rename(path)
        _remove(scratch, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(option: str, path: Path, report: dict) -> None:
    """`write_file` of ``report`` as JSON. Raises ValueError if it holds NaN or an infinity."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_file(option, path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def one_line(error: Exception | str) -> str:
    """A message on one line: those of libraries may span several. Of the system's errors the reason alone."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def first_sentences(message: str) -> str:
    """A library's message up to the first line that ends a sentence, on one line; the rest is advice."""
    lines = [line.strip() for line in message.strip().splitlines()]
    end = next((index for index, line in enumerate(lines, 1) if line.endswith((".", "!", "?"))), None)
    return one_line(" ".join(lines[:end]))


def dtype_name(dtype) -> str:
    """The name of a dtype, as float32 for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
