"""What the commands print and write."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mica.errors import UsageError

PARTIAL = "partial"  # ends of names: see `beside`
OLD = "old"
RECORD = "mica-run.json"  # says whose a folder is: see `mica.cli.record`
_LONGEST = 200  # bytes of a name that gets a longer one beside it; systems allow 255


@contextmanager
def explained(what: str, kinds=Exception, kept: str = "") -> Iterator[None]:
    """Raise UsageError for an error of ``kinds`` within: ``what``, the reason and ``kept``."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        reason = first_sentences(_message(error))
        if not reason:
            reason = type(error).__name__
        usage_error = UsageError(f"{what}: {reason}{kept}")
        usage_error.is_known = getattr(error, "is_known", False)  # to all processes: see `processes.agreed`
        raise usage_error from error


def _message(error: Exception | str) -> str:
    """What an error says; of the system's errors the reason alone, without number and path."""
    return getattr(error, "strerror", None) or str(error)


def check_file(option: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Raise UsageError if no file can be written at ``path``, or its suffix is not in ``suffixes``."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {path}: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path}: exists and is not a file")
    _check_writable(option, path, path.parent)


def check_folder(option: str, path: Path, model: str) -> None:
    """Raise UsageError if no folder can be made or written at ``path``, or it is that of ``model``.

    ``model``: a folder, or anything else. Makes nothing. safetensors and tokenizers write to no path that is
    not UTF-8.
    """
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        what = "the libraries that write models need a path that is UTF-8: choose another folder"
        raise UsageError(f"{option} {shown(str(path))}: {what}") from None
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path}: exists and is not a folder")
    if path.is_dir() and path.resolve() == expanded(model).resolve():
        raise UsageError(f"{option} {path}: is the folder of the model itself")
    existing = next(place for place in (path, *path.resolve().parents) if place.exists())
    _check_writable(option, path, existing)


def _check_writable(option: str, path: Path, folder: Path) -> None:
    """Raise UsageError if nothing can be made in ``folder``, which ``path`` needs."""
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {path}: {folder} is not writable")


def write_file(option: str, path: Path, write: Callable[[Path], None], end: str | None = None) -> None:
    """Let ``write`` fill a temporary file next to ``path``, then rename it: never half a file.

    ``end``: of the temporary file's name (see `beside`); default: the number of this process.

    Raises UsageError if that fails (the disk is full, the folder has gone).
    """
    scratch = beside(path, end or str(os.getpid()))
    try:
        with explained(f"{option} {path}: cannot be written", OSError):
            write(scratch)
            os.replace(scratch, path)
    finally:
        with suppress(OSError):  # the folder may have gone
            scratch.unlink()


def expanded(name: str | Path) -> Path:
    """The path with the home of ``~`` or ``~user``; that of an unknown user stays (pathlib's raises)."""
    return Path(os.path.expanduser(name))


def beside(path: Path, end: str) -> Path:
    """A name for what becomes ``path``, or was it: hidden, in the same folder, and not too long."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    return path.with_name(f".{name}.{end}")


def write_folder(option: str, path: Path, *parts, kept: str = "", **more) -> None:
    """`fill_folder`, and its rename to ``path``: never half a folder.

    What is at ``path`` is replaced, and so is what a killed process has left in the two folders `beside` it:
    the caller must know that all three are its own.

    Raises UsageError if that fails (the disk is full, the folder has gone).
    """
    try:
        with explained(f"{option} {path}: cannot be written", OSError, kept):
            restore(path)
        scratch = fill_folder(option, path, *parts, kept=kept, **more)
        with explained(f"{option} {path}: cannot be written", OSError, kept):
            if os.path.lexists(path):
                path.rename(beside(path, OLD))
            scratch.rename(path)
            flush(path.parent)
    finally:
        with suppress(OSError):
            restore(path)
            remove(beside(path, PARTIAL))


def fill_folder(
    option: str,
    path: Path,
    *parts,
    card: str | None = None,
    kept: str = "",
    begun: Callable[[Path], None] = lambda scratch: None,
    done: Callable[[Path], None] = lambda scratch: None,
) -> Path:
    """Let ``parts`` save themselves (``save_pretrained``), with ``card`` as README.md, to a temporary folder
    next to ``path``, which is returned; one that is there is replaced.

    ``kept`` follows the message of an error: what is not lost. ``begun`` and ``done`` are called with the
    folder, still empty and once it is full.

    Raises UsageError if that fails, and leaves nothing.
    """
    scratch = beside(path, PARTIAL)
    disk_errors = (OSError, SafetensorError)  # the latter: safetensors' own for a full disk
    try:
        with explained(f"{option} {path}: cannot be written", disk_errors, kept):
            remove(scratch)
            scratch.mkdir(parents=True)
            begun(scratch)
            for part in parts:
                part.save_pretrained(scratch)
            if card is not None:
                (scratch / "README.md").write_text(card, encoding="utf-8")
            finish_files(scratch)
            done(scratch)
    except BaseException:
        with suppress(OSError):
            remove(scratch)
        raise
    return scratch


def restore(path: Path) -> None:
    """Finish what a process did not that was killed, or failed, between the two renames of `write_folder`.

    What was at ``path`` is there again if nothing has taken its place, else it is removed.
    """
    old = beside(path, OLD)
    if not os.path.lexists(old):
        return
    if os.path.lexists(path):
        remove(old)
    else:
        old.rename(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there. Raises OSError.

    The record of a folder goes last: what a killed process leaves of the folder still says whose it is.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for entry in path.iterdir():
        if entry.name != RECORD:
            remove(entry)
    shutil.rmtree(path)


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
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name) for name in (*names, *links)]
    return sorted(found)


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


def write_json(option: str, path: Path, report: dict) -> None:
    """`write_file` of ``report`` as JSON. Raises ValueError if it holds NaN or an infinity."""
    text = as_json(report)
    write_file(option, path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def as_json(report: dict) -> str:
    """As every report is written. Raises ValueError if it holds NaN or an infinity."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def shown(name: str) -> str:
    """``name`` of a file as text that any encoding, page and terminal takes: what is odd in it is escaped."""
    if name.isprintable():
        return name
    parts = []
    for one in name:
        if one.isprintable():
            parts.append(one)
        else:
            parts.append(one.encode("unicode_escape").decode())
    return "".join(parts)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; every row has as many cells as ``header``."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


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


def dtype_name(dtype) -> str:
    """The name of a dtype, as float32 for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
