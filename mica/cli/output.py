"""What the commands print and write."""

import functools
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mica.cli.record import NotOwnError, Record
from mica.errors import UsageError

SCRATCH = ".partial"  # what has yet to be renamed


@contextmanager
def explained(what: str, kinds=Exception) -> Iterator[None]:
    """Raise UsageError for an error of ``kinds`` within: ``what`` and the reason."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        reason = first_sentences(_message(error)) or type(error).__name__
        usage_error = UsageError(f"{what}: {reason}")
        usage_error.is_known = getattr(error, "is_known", False)  # to all processes: see `processes.agreed`
        raise usage_error from error


def _message(error: Exception | str) -> str:
    """What an error says; of the system's errors the reason alone, without number and path."""
    return getattr(error, "strerror", None) or str(error)


def check_table(path: Path) -> None:
    """Raise UsageError if no new file can be written at ``path``, which ``--json`` names."""
    if os.path.lexists(path):
        raise UsageError(f"--json {path}: is there already: choose another name, or remove it")
    _check_writable("--json", path, path.parent)


def check_folder(option: str, path: Path) -> None:
    """Raise UsageError if no folder can be made or written at ``path``. Makes nothing.

    safetensors and tokenizers write to no path that is not UTF-8.
    """
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{option} {shown(str(path))}: "
            "the libraries that write models need a path that is UTF-8: choose another folder"
        ) from None
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path}: exists and is not a folder")
    existing = next(place for place in (path, *path.resolve().parents) if place.exists())
    _check_writable(option, path, existing)


def _check_writable(option: str, path: Path, folder: Path) -> None:
    """Raise UsageError if nothing can be made in ``folder``, which ``path`` needs."""
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {path}: {folder} is not writable")


def write_text(option: str, path: Path, text: str, record: Record | None = None) -> None:
    """Write ``text`` to a temporary file next to ``path``, then rename it: never half a file.

    ``record``: of the output folder; by default that in which the file is.

    Raises UsageError if that fails (the disk is full, the folder has gone), and NotOwnError if something is
    there that no command has written.
    """
    record = record or Record(path.parent)
    _write_whole(option, path, text, lambda scratch: record.place({path: scratch}))


def write_table(path: Path, report: dict) -> None:
    """Write what ``--json`` asks for, outside of output folders: not recorded, and replacing nothing.

    Raises UsageError as `write_text`.
    """

    check_table(path)
    _write_whole("--json", path, json_text(report), lambda scratch: os.replace(scratch, path))


def _write_whole(option: str, path: Path, text: str, place: Callable[[Path], None]) -> None:
    """Write ``text`` to a temporary file, which ``place`` then renames to ``path``, or raises."""
    scratch = path.with_name(f".{uuid.uuid4().hex}{SCRATCH}")
    try:
        with explained(f"{option} {path}: cannot be written", OSError):
            path.parent.mkdir(exist_ok=True)
            scratch.write_text(text, encoding="utf-8")
            flush(scratch)
            place(scratch)
    finally:
        with suppress(OSError):  # the folder may have gone
            scratch.unlink()


def tell(text: str) -> None:
    """Print a line on standard error, where it is not mixed with a command's output."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def tell_once(text: str) -> None:
    """`tell`, the first time only, and of several processes in the first one only."""
    if os.environ.get("RANK", "0") == "0":
        tell(text)


def write_unless_edited(option: str, path: Path, text: str) -> None:
    """Write ``text``, unless a user has written or edited the file: then it stays, and stderr says so."""
    try:
        write_text(option, path, text)
    except NotOwnError:
        tell(f"mica: note: {path} is not what mica has written there: it stays as it is")


def expanded(name: str | Path) -> Path:
    """The path with the home of ``~`` or ``~user``; that of an unknown user stays (pathlib's raises)."""
    return Path(os.path.expanduser(name))


def write_folder(
    folder: Path, *parts: Callable[[Path], object], record: Record, card: str | None = None
) -> None:
    """Write a folder, in or below ``--output``, as `fill_folder` does.

    Raises UsageError if that fails (the disk is full, the folder has gone).
    """
    disk_errors = (OSError, SafetensorError)  # the latter: safetensors' own for a full disk
    with explained(f"--output {folder}: cannot be written", disk_errors):
        fill_folder(folder, *parts, record=record, card=card)


def fill_folder(
    folder: Path,
    *parts: Callable[[Path], object],
    record: Record,
    card: str | None = None,
    scratch_name: str = SCRATCH,
) -> None:
    """Let ``parts`` save themselves (their ``save_pretrained``) to ``folder``, with ``card`` as README.md.

    They write to a scratch folder in it, from which all is moved to ``folder`` once it has reached the disk.
    What has another name stays. As long as the scratch folder is there, ``folder`` is not whole. ``record``:
    of the output folder, which is ``folder`` or the one in which it is.

    Raises NotOwnError if a file would be replaced that no command has written, OSError or SafetensorError if
    writing fails, and leaves ``folder`` as it was (but for files that came between a look and the move).
    """
    scratch = folder / scratch_name
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for save in parts:
            save(scratch)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        finish_files(scratch)
        record.place({folder / path.relative_to(scratch): path for path in files_in(scratch)})
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()  # if nothing else is there
        raise
    shutil.rmtree(scratch)
    flush(folder)


def finish_files(folder: Path) -> None:
    """Flush all files below ``folder`` and give them the mode of any new file, which safetensors' lack.

    It writes to a temporary file that only its owner may read, and renames that.
    """
    probe = folder / f".{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in files_in(folder):
        if path.is_symlink():
            continue
        if path.stat().st_mode != mode:
            path.chmod(mode)
        flush(path)


def files_in(folder: Path) -> list[Path]:
    """All files below ``folder``, and links, which are not followed; sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    mode = os.O_RDONLY
    if os.name == "nt":  # which flushes only what may be written
        mode = os.O_RDWR
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(option: str, path: Path, report: dict, record: Record | None = None) -> None:
    """Write ``report`` as JSON, as `write_text` does. Raises ValueError if it holds NaN or an infinity."""
    write_text(option, path, json_text(report), record)


def json_text(report: dict) -> str:
    """``report`` as the text of a file. Raises ValueError if it holds NaN or an infinity."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def shown(name: str) -> str:
    """``name`` of a file as text that any encoding, page and terminal takes: what is odd in it is escaped."""
    if name.isprintable():
        return name
    return repr(name)[1:-1]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; every row has as many cells as ``header``."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines for a terminal: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *cells in table:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:{widths[0]}}", *right]))
    return lines


def one_line(error: Exception | str) -> str:
    """A message on one line: those of libraries may span several. From a system error, only the reason."""
    return " ".join(_message(error).split())


def first_sentences(message: str) -> str:
    """A library's message up to the first line that ends a sentence, on one line; the rest is advice."""
    lines = []
    for line in message.strip().splitlines():
        lines.append(line.strip())
        if lines[-1].endswith((".", "!", "?")):
            break
    return one_line(" ".join(lines))


def size_text(shape: Iterable[int]) -> str:
    """A shape as text, like "48 x 32"."""
    return " x ".join(map(str, shape))


def dtype_name(dtype) -> str:
    """The name of a dtype, as float32 for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
