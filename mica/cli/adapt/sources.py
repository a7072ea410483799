"""Where text comes from: files, folders, datasets saved by `datasets`, datasets of the Hub.

`find` looks at names only, and is quick. `Source.documents` reads. Text files and JSON Lines are read here,
as streams: `datasets` takes a text file into memory at once, names no line of a broken JSON file, and stops
where a column that nobody trains on changes its type. Tables and datasets are read by
``datasets.load_dataset``.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from lzma import LZMAError
from pathlib import Path

from mica.errors import UsageError

KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
CHUNK = 2**20  # bytes read at once

# What reading a file raises for what is in it: broken compression, tables that are none, wrong text.
_BAD_FILE = (OSError, EOFError, LZMAError, zlib.error, ValueError)
# What datasets and huggingface_hub raise for names that do not exist or cannot be reached, and for data sets
# that need code, a configuration or a library.
_BAD_DATASET = (OSError, ValueError, RuntimeError, ImportError)


def _suffixes(path: Path) -> tuple[str, str]:
    """Of the kind of a file and of its compression, like (".csv", ".gz"); "" where there is none."""
    *others, last = ["", *(suffix.lower() for suffix in path.suffixes)]
    return (others[-1] if others else "", last) if last in COMPRESSIONS else (last, "")


def _kind(path: Path) -> str | None:
    """The kind of a file by its suffix; None if no such kind is read."""
    return KINDS.get(_suffixes(path)[0])


@dataclass
class Source:
    """One item of ``--text``, ``--held-out-text`` or ``--retain``.

    ``files``: what is read, in this order; none for a dataset. ``skipped``: files of a folder that are of no
    kind that is read, pipes and devices too. ``folder``: made by ``Dataset.save_to_disk``. Neither files nor
    folder: a Hub name, of which ``config`` is the configuration.
    """

    option: str
    given: str
    files: tuple[Path, ...] = ()
    skipped: int = 0
    folder: Path | None = None
    config: str | None = None

    @property
    def is_on_hub(self) -> bool:
        return self.folder is None and not self.files

    @property
    def name(self) -> str:
        """For progress bars."""
        return Path(self.given).name or self.given

    def error(self, reason: object, path: Path | None = None) -> UsageError:
        text = " ".join(str(reason).split())
        return UsageError(f"{self.option} {path or self.given}: {text}")

    @cached_property
    def dataset(self):
        """The `datasets.Dataset` of a saved or Hub dataset. Raises UsageError if it cannot be had."""
        import datasets

        try:
            if self.folder is None:
                return datasets.load_dataset(self.given, self.config, split="train")
            found = datasets.load_from_disk(str(self.folder))
        except _BAD_DATASET as error:
            raise self.error(f"cannot be loaded: {error}") from error
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found:
                raise self.error(f"has no split 'train', but {', '.join(found)}")
            return found["train"]
        return found

    def digest(self) -> str:
        """A hash of the bytes of all files and their kinds; names and times do not matter."""
        total = hashlib.blake2b(digest_size=16)
        files = self.files or [Path(entry["filename"]) for entry in self.dataset.cache_files]
        if not files:  # a dataset in memory has no files; a saved or loaded one always has
            raise self.error("has no files to read")
        for path in files:
            one = hashlib.blake2b(" ".join(_suffixes(path)).encode(), digest_size=16)
            try:
                with path.open("rb") as file:
                    while chunk := file.read(CHUNK):
                        one.update(chunk)
            except OSError as error:
                raise self.error(f"cannot be read: {error.strerror or error}", path) from error
            total.update(one.digest())
        return total.hexdigest()

    def state(self) -> list[tuple[int, int]]:
        """Size and time of change of every file: to see that none changed while it was read."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in self.files)]

    def documents(self, field: str | None) -> Iterator[Iterable[str]]:
        """Every document as an iterable of strings, which joined are its text; rows without text are empty.

        A text file is one document, a row of any other one. ``field`` names the column; None: "text", else
        "content", else the only column of strings.

        Raises UsageError, naming file and row, for all that is not text.
        """
        if not self.files:
            yield from _rows_of(self.dataset, field, self, None)
        for path in self.files:
            try:
                yield from _READERS[_kind(path) or "text"](self, path, field)
            except UsageError:
                raise
            except _BAD_FILE as error:
                if _kind(path) != "parquet":
                    for _ in _text_chunks(self, path):  # the byte, where the cause is text that is not UTF-8
                        pass
                raise self.error(f"cannot be read: {error}", path) from error


def _open(path: Path):
    """The bytes of a file, decompressed by its suffix."""
    import fsspec  # what `datasets` opens files with

    return fsspec.open(str(path), "rb", compression=COMPRESSIONS.get(path.suffix.lower()))


def _text_chunks(source: Source, path: Path) -> Iterator[str]:
    """The text of a file in chunks, newlines as ``\\n``. Raises UsageError for what is not UTF-8 text."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(utf8, translate=True)
    try:
        with _open(path) as file:
            read, chunk = 0, b"-"
            while chunk:
                chunk = file.read(CHUNK)
                pending = len(utf8.getstate()[0])
                if b"\0" in chunk:
                    raise source.error(f"not text: byte {read + chunk.index(0)} is NUL", path)
                try:
                    yield newlines.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    at = read - pending + error.start
                    raise source.error(f"not UTF-8 text (at byte {at})", path) from error
                read += len(chunk)
    except UsageError:
        raise
    except _BAD_FILE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise source.error(f"cannot be read: {reason}", path) from error


def _text_file(source: Source, path: Path, field: str | None) -> Iterator[Iterable[str]]:
    yield _text_chunks(source, path)


def _json_file(source: Source, path: Path, field: str | None) -> Iterator[Iterable[str]]:
    column = None
    for place, row in _json_rows(source, path):
        if not isinstance(row, dict):
            raise source.error(f"{place}: {type(row).__name__}, but every row must be an object", path)
        if column is None:
            types = {name: isinstance(value, str) for name, value in row.items()}
            column = _column(types, field, source, path)
        yield [_text(row.get(column), column, place, source, path)]


def _json_rows(source: Source, path: Path) -> Iterator[tuple[str, object]]:
    """The objects of JSON Lines, or of an array; each with where it is."""
    with _open(path) as file:
        start = file.read(CHUNK)
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        try:
            rows = json.loads("".join(_text_chunks(source, path)))
        except (ValueError, RecursionError) as error:
            raise source.error(f"not JSON: {error}", path) from error
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    read = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except UnicodeDecodeError as error:
                    at = read + error.start
                    raise source.error(f"not UTF-8 text (at byte {at}, line {number})", path) from error
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", error)
                    raise source.error(f"line {number} is not JSON: {reason}", path) from error
            read += len(line)


def _table(source: Source, path: Path, field: str | None) -> Iterator[Iterable[str]]:
    import datasets

    rows = _load_table(path)
    if _kind(path) == "csv":  # all columns are strings: "NA" and "007" are text
        names = next(iter(rows), {})
        rows = _load_table(path, features=datasets.Features(dict.fromkeys(names, datasets.Value("string"))))
    yield from _rows_of(rows, field, source, path)


def _load_table(path: Path, **options):
    import datasets

    if _kind(path) == "csv":
        options |= {"sep": "\t" if _suffixes(path)[0] == ".tsv" else ",", "keep_default_na": False}
    files = escape(str(path))  # a name may hold the characters of a pattern
    return datasets.load_dataset(_kind(path), data_files=files, split="train", streaming=True, **options)


_READERS = {"text": _text_file, "json": _json_file, "csv": _table, "parquet": _table}


def _rows_of(rows, field: str | None, source: Source, path: Path | None) -> Iterator[Iterable[str]]:
    """The documents of a `datasets.Dataset` or `IterableDataset`."""
    if rows.features is None:
        first = next(iter(rows), {})
        types = {name: isinstance(value, str) for name, value in first.items()}
    else:
        strings = ("string", "large_string")
        types = {name: getattr(kind, "dtype", None) in strings for name, kind in rows.features.items()}
    if not types:
        return
    column = _column(types, field, source, path)
    if not types[column]:
        raise source.error(f"column '{column}' holds no strings", path)
    number = 0
    for batch in rows.select_columns([column]).iter(1000):
        for value in batch[column]:
            number += 1
            yield [_text(value, column, f"row {number}", source, path)]


def _column(types: dict[str, bool], wanted: str | None, source: Source, path: Path | None) -> str:
    """The column to read; ``types`` says of each whether it holds strings."""
    if wanted is not None:
        if wanted in types:
            return wanted
        names = ", ".join(types) or "none"
        raise source.error(f"has no column '{wanted}', but {names}: name one by --text-field", path)
    for name in ("text", "content"):
        if name in types:
            return name
    strings = [name for name, is_string in types.items() if is_string]
    if len(strings) == 1:
        return strings[0]
    for name in ("messages", "conversations"):
        if name in types:
            raise source.error(
                f"holds chats (column '{name}'), and this trains on text: write them as text, by the chat "
                "template, into a column first",
                path,
            )
    names = ", ".join(types) or "none"
    raise source.error(f"has no column 'text', but {names}: name one by --text-field", path)


def _text(value: object, column: str, place: str, source: Source, path: Path | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise source.error(f"{place}: '{column}' is {type(value).__name__}, and no string", path)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # an escape like "\ud800" in JSON: half a character
            raise source.error(f"{place}: '{column}' holds half a character (a surrogate)", path) from error
    return value


def find(option: str, items: Iterable[str], config: str | None = None) -> list[Source]:
    """The sources that the items of an option name, by a look at names and sizes only.

    Raises UsageError for a file that is missing, empty or of no kind that is read.
    """
    return [_find(option, str(item), config) for item in items]


def _find(option: str, given: str, config: str | None) -> Source:
    path = Path(given).expanduser()
    source = Source(option, given, config=config)
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return Source(option, given, folder=path)
        every = sorted(file for file in path.rglob("*") if not (file.is_dir() or _is_hidden(file, path)))
        files = tuple(file for file in every if file.is_file() and _kind(file) and file.stat().st_size)
        if not files:
            raise source.error(f"no file with text in this folder: {_allowed()}")
        for file in files:
            _check_file(source, file)
        return Source(option, given, files, len(every) - len(files))
    if path.exists():
        if not path.is_file():  # it would wait for ever, or never end
            raise source.error(
                "a pipe or device, and texts are read more than once: write it to a file first"
            )
        if path.suffix and _kind(path) is None:
            raise source.error(f"'{path.suffix}' is no kind of file that is read: {_allowed()}")
        _check_file(source, path)
        return Source(option, given, (path,))
    if given.startswith((".", "~", "/", "\\")) or len(path.parts) > 2 or _kind(path) or path.is_absolute():
        raise source.error("no such file or folder")
    return source


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _allowed() -> str:
    return f"{' '.join(KINDS)}, each also with {' '.join(COMPRESSIONS)}"


def _check_file(source: Source, path: Path) -> None:
    """Raise UsageError if a file is empty, cannot be opened or needs a library that is missing."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise source.error("the file is empty", path)
    except OSError as error:
        raise source.error(f"cannot be read: {error.strerror or error}", path) from error
    if path.suffix.lower() == ".zst":
        import fsspec.compression

        if "zstd" not in fsspec.compression.available_compressions():
            raise source.error("needs zstandard: pip install zstandard", path)
