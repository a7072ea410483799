"""Where text comes from: files, folders, datasets saved by `datasets`, datasets of the Hub.

`find` looks at names only, and is quick. `Source.documents` streams the text. Parquet is read by pyarrow, and
datasets by `datasets`. Text and JSON are not: `datasets` takes a whole file of text into memory, turns JSON
strings like "2020-01-01" into times, and values whose type changes into JSON.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from lzma import LZMAError
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from mica.cli.adapt import fingerprint
from mica.cli.adapt.opening import OPENERS, missing_library, opened
from mica.cli.output import expanded, one_line
from mica.errors import UsageError

KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
}
COMPRESSIONS = tuple(OPENERS)
_SUPPORTED = f"supported: {' '.join(KINDS)}, each also with {' '.join(COMPRESSIONS)}"
CHUNK = 2**20  # characters read at once
_TWICE = object()  # the value of a column that a row has more than once
FIRST_ROWS = 100  # in which the column is looked for

# What reading raises for what is in a file, and datasets and huggingface_hub for names that do not exist or
# cannot be reached, and for data sets that need code, a configuration or a library.
_BAD = (OSError, EOFError, LZMAError, zlib.error, ValueError, RuntimeError, ImportError, csv.Error)


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


def _suffix(path: Path) -> str:
    """The suffix that says the kind of a file: ".csv" for "a.csv.gz"."""
    if _is_compressed(path):
        path = path.with_suffix("")
    return path.suffix.lower()


@contextmanager
def _open(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """The text of a file; newlines as ``\\n``, but for ``newline`` ""."""
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
        yield text


@dataclass
class Source:
    """One item of ``--text``, ``--held-out-text`` or ``--retain``.

    ``files``: what is read, in this order; none for a dataset. ``skipped``: how many files of a folder are
    not read: of other kinds, empty, pipes and devices. ``folder``: made by ``Dataset.save_to_disk``. Neither
    files nor folder: a dataset on the Hub, and ``config`` is its configuration. ``left_out``: whether files
    of a folder are not read because they are in the folder that the run writes to.
    """

    option: str
    given: str
    files: tuple[Path, ...] = ()
    skipped: int = 0
    folder: Path | None = None
    config: str | None = None
    left_out: bool = False

    @property
    def is_on_hub(self) -> bool:
        return self.folder is None and not self.files

    def error(self, reason: object, path: Path | None = None) -> UsageError:
        return UsageError(f"{self.option} {path or self.given}: {one_line(reason)}")

    @contextmanager
    def _named(self, path: Path | None = None) -> Iterator[None]:
        """Raise UsageError with the name for all that reading raises."""
        try:
            yield
        except UsageError:
            raise
        except _BAD as error:
            if path is None:
                reason = f"cannot be loaded: {one_line(error)}"
            elif isinstance(error, UnicodeDecodeError) and _suffix(path) != ".parquet":
                reason = f"not UTF-8 text: {error.reason}, 0x{error.object[error.start]:x}"
            else:
                reason = f"cannot be read: {one_line(error)}"
            raise self.error(reason, path) from error

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The saved or Hub dataset, its training split. Raises UsageError if it cannot be had."""
        with self._named():
            if self.folder is None:
                return datasets.load_dataset(self.given, self.config, split="train")
            found = datasets.load_from_disk(str(self.folder))
        if isinstance(found, datasets.Dataset):
            return found
        if "train" not in found:
            raise self.error(f"has no split 'train', only {', '.join(found)}")
        return found["train"]

    def digest(self) -> str:
        """A hash of the bytes of all files and their kinds; names and times do not matter."""
        paths = self.files or [Path(entry["filename"]) for entry in self.dataset.cache_files]
        total = hashlib.blake2b(digest_size=16)
        for path in paths:
            kind = f"{_suffix(path)} {path.suffix.lower()}"
            with self._named(path):
                total.update(fingerprint.of_file(path, kind.encode()))
        return total.hexdigest()

    def state(self) -> list[tuple[int, int]]:
        """(bytes, nanoseconds) of every file: its size and when it changed, which a later change shows in."""
        stats = [path.stat() for path in self.files]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def documents(self, field: str | None) -> Iterator[Iterable[str]]:
        """Every document as an iterable of strings, which joined are its text; rows without text are empty.

        A text file is one document, a row of any other one. ``field`` names the column; None: "text", else
        "content", else the only column of strings.

        Raises UsageError, naming file and row, for all that is not text.
        """
        if not self.files:
            with self._named():
                yield from self._dataset_texts(field)
        for path in self.files:
            kind = KINDS.get(_suffix(path), "text")
            if kind == "text":
                yield self._chunks(path)
            else:
                with self._named(path):
                    yield from self._rows_of_file(kind, field, path)

    def _rows_of_file(self, kind: str, field: str | None, path: Path) -> Iterator[list[str]]:
        """The documents of a file whose rows are documents; ``kind``: see `KINDS`."""
        if kind == "parquet":
            yield from self._parquet_texts(field, path)
        elif kind == "json":
            yield from self._row_texts(self._json(path), field, path)
        else:
            yield from self._row_texts(_csv(path), field, path)

    def _chunks(self, path: Path) -> Iterator[str]:
        with self._named(path), _open(path) as file:
            while chunk := file.read(CHUNK):
                if "\0" in chunk:
                    raise self.error("not text: it contains a NUL character", path)
                yield chunk

    def _json(self, path: Path) -> Iterator[dict]:
        """The objects of JSON Lines, or of an array."""
        with _open(path) as file:
            is_array = file.read(CHUNK).lstrip().startswith("[")
        with _open(path) as file:
            texts = file
            if is_array:
                texts = [file.read()]
            for number, text in enumerate(texts, 1):
                if not text.strip():
                    continue
                found = self._parsed_json(text, number, path)
                rows = [found]
                if is_array:
                    rows = found
                for row in rows:
                    if not isinstance(row, dict):
                        raise self.error(f"every row must be an object, not {type(row).__name__}", path)
                    yield row

    def _parsed_json(self, text: str, first_line: int, path: Path) -> object:
        """The value of ``text``, which begins at line ``first_line`` of the file, from 1."""
        try:
            return json.loads(text.rstrip(), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            line = first_line + error.lineno - 1
            raise self.error(f"line {line} is not JSON: {error.msg}", path) from error

    def _row_texts(self, rows: Iterator[dict], field: str | None, path: Path) -> Iterator[list[str]]:
        """The documents in rows that need not all have the same columns."""
        first = list(islice(rows, FIRST_ROWS))
        has_strings: dict[str, bool] = {}
        for row in first:
            for name, value in row.items():
                has_strings[name] = isinstance(value, str) or has_strings.get(name, False)
        if not has_strings:
            return
        column = self._column(has_strings, field, path)
        values = (row.get(column) for row in chain(first, rows))
        yield from self._texts(values, column, path)

    def _dataset_texts(self, field: str | None) -> Iterator[list[str]]:
        rows = self.dataset
        has_strings = {}
        for name, feature in rows.features.items():
            has_strings[name] = getattr(feature, "dtype", None) in ("string", "large_string")
        if not has_strings:
            return
        column = self._column(has_strings, field, None)
        batches = rows.select_columns([column]).iter(1000)  # row by row it takes ten times as long
        values = chain.from_iterable(batch[column] for batch in batches)
        yield from self._texts(values, column, None)

    def _parquet_texts(self, field: str | None, path: Path) -> Iterator[list[str]]:
        """A file without rows has no documents; jobs write such a file for a share without any."""
        with opened(path) as source:
            if _is_compressed(path):  # Parquet is not read from beginning to end
                source = pyarrow.BufferReader(source.read())
            file = pyarrow.parquet.ParquetFile(source)
            if not file.metadata.num_rows:
                return
            schema = file.schema_arrow
            has_strings = {column.name: _is_string(column.type) for column in schema}
            column = self._column(has_strings, field, path)
            if schema.names.count(column) > 1:
                raise self.error(f"has more than one column '{column}'", path)
            batches = file.iter_batches(1000, columns=[column])
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            yield from self._texts(values, column, path)

    def _texts(self, values: Iterable[object], column: str, path: Path | None) -> Iterator[list[str]]:
        """The documents in the ``values`` of a column. Raises UsageError for a value that is not text."""
        for number, value in enumerate(values, 1):
            if value is _TWICE:
                raise self.error(f"row {number}: has more than one column '{column}'", path)
            if not isinstance(value, str | None):
                kind = type(value).__name__
                raise self.error(f"row {number}: column '{column}' is {kind}, not a string", path)
            text = value or ""
            try:
                text.encode()
            except UnicodeEncodeError as error:  # "\\ud83d" of JSON that was cut: no tokenizer takes it
                half = f"half a character, {text[error.start]!r}"
                raise self.error(f"row {number}: column '{column}' has {half}", path) from error
            yield [text]

    def _column(self, has_strings: dict[str, bool], field: str | None, path: Path | None) -> str:
        """The column to read: ``field``, else "text", "content", or the only one with strings.

        ``has_strings``: by column, in order. Raises UsageError if there is no such column.
        """
        if field is not None:
            wanted = [field]
        else:
            wanted = ["text", "content"]
            with_strings = [name for name, is_string in has_strings.items() if is_string]
            if len(with_strings) == 1:
                wanted += with_strings
        for name in wanted:
            if name in has_strings:
                return name

        if field is None:
            for name in ("messages", "conversations"):
                if name in has_strings:
                    what = f"contains chat messages (column '{name}'); mica adapt trains on plain text"
                    raise self.error(f"{what}. Render them with the chat template first", path)
        names = ", ".join(has_strings)
        raise self.error(f"has no column '{wanted[0]}', only {names}: name one with --text-field", path)


def _csv(path: Path) -> Iterator[dict[str, str | None]]:
    """The rows, all values as strings; `_TWICE` for a column that the header has twice.

    Not by pandas, which takes a first row with one field too many as a sign of an index column.
    """
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    with _open(path, newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        repeated = _repeated(rows.fieldnames)
        for row in rows:
            surplus = row.pop(None, None)
            if surplus:
                fields = len(row) + len(surplus)
                raise ValueError(f"line {rows.line_num} has {fields} fields, the header {len(row)}")
            yield row | repeated


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; `_TWICE` for a key that it has twice, where json would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        row |= _repeated(name for name, _ in pairs)
    return row


def _repeated(names: Iterable[str]) -> dict[str, object]:
    """`_TWICE` for each name that occurs more than once."""
    return {name: _TWICE for name, count in Counter(names).items() if count > 1}


def _is_string(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def find(
    option: str, items: Iterable[str], config: str | None = None, output: Path | None = None
) -> list[Source]:
    """The sources that the items of an option name, by a look at names and sizes only.

    Files of a folder that are in ``output``, the folder that the run writes to, are not read: the run changes
    them.

    Raises UsageError for a file that is missing, empty, of an unsupported type, or needs a library that is
    missing.
    """
    found = []
    for item in items:
        source = Source(option, str(item), config=config)
        _locate(source, output)
        for file in source.files:
            _check_file(source, file)
        found.append(source)
    return found


def _visible(folder: Path) -> Iterator[Path]:
    """All but folders in ``folder`` and below, without what is hidden; links to folders are not followed.

    Raises OSError for a folder that cannot be read, over which `Path.rglob` passes in silence.
    """
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _visible(path)
        else:
            path.exists()  # raises where the folder lists its files and no more
            yield path


def _outside(files: list[Path], folder: Path, output: Path | None) -> list[Path]:
    """The ``files``, all below ``folder``, that are not in ``output``."""
    if output is None:
        return files
    root = Path(os.path.realpath(folder))
    left_out = Path(os.path.realpath(output))
    kept = []
    for file in files:
        place = root / file.relative_to(folder)
        if file.is_symlink():
            place = Path(os.path.realpath(file))
        if left_out not in place.parents:
            kept.append(file)
    return kept


def _locate(source: Source, output: Path | None) -> None:
    """Set ``source.folder`` or ``source.files``; neither for a dataset on the Hub.

    Raises UsageError for what is no such name.
    """
    path = expanded(source.given)
    if path.is_dir():
        if _is_saved_dataset(path):
            _take_saved_dataset(source, path)
        else:
            _take_folder(source, path, output)
    elif path.exists():
        _take_file(source, path)
    elif _looks_like_a_path(source.given, path):
        raise source.error("no such file or folder")


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _looks_like_a_path(given: str, path: Path) -> bool:
    """Whether a name that does not exist here is no name of a dataset on the Hub."""
    return given.startswith((".", "~", "/", "\\")) or len(path.parts) > 2 or _suffix(path) in KINDS


def _take_saved_dataset(source: Source, folder: Path) -> None:
    if "::" in str(folder.resolve()):
        raise source.error("datasets cannot open a folder with '::' in its path: rename it")
    source.folder = folder


def _take_folder(source: Source, folder: Path, output: Path | None) -> None:
    try:
        found = sorted(_visible(folder))
    except OSError as error:
        raise source.error(f"{error.filename} cannot be read: {one_line(error)}") from error
    kept = _outside(found, folder, output)
    source.left_out = len(kept) < len(found)
    source.files = tuple(file for file in kept if _is_text(file))
    source.skipped = len(kept) - len(source.files)
    if not source.files:
        where = "in this folder"
        if source.left_out:
            where = "in this folder outside --output"
        raise source.error(f"no text files {where}; {_SUPPORTED}")


def _is_text(file: Path) -> bool:
    """Whether a file of a folder is read: of a kind that is read, and not empty."""
    return file.is_file() and _suffix(file) in KINDS and file.stat().st_size > 0


def _take_file(source: Source, path: Path) -> None:
    if not path.is_file():  # it would wait for ever, or never end
        raise source.error("a pipe or device, but texts are read more than once: write it to a file first")
    if path.suffix and _suffix(path) not in KINDS:
        raise source.error(f"unsupported file type '{path.suffix}'; {_SUPPORTED}")
    source.files = (path,)


def _check_file(source: Source, path: Path) -> None:
    """Raise UsageError if the file cannot be opened, is empty, or needs a library that is missing."""
    with source._named(path), path.open("rb") as file:
        if not file.read(1):
            raise source.error("the file is empty", path)
    library = missing_library(path)
    if library:
        raise source.error(f"needs {library}: pip install {library}", path)
