"""Where text comes from: files, folders, datasets saved by `datasets`, datasets of the Hub.

`find` looks at names only, and is quick. `Source.documents` reads, as streams. Parquet and datasets are read
by `datasets`. Text is read here, since `datasets` takes a file of it into memory at once, and
so is JSON: `datasets` makes times of strings like "2020-01-01", and JSON of values whose type changes.
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
CHUNK = 2**20  # characters read at once
_TWICE = object()  # the value of a column that a row has more than once
FIRST_ROWS = 100  # in which the column is looked for

# What reading raises for what is in a file, and datasets and huggingface_hub for names that do not exist or
# cannot be reached, and for data sets that need code, a configuration or a library.
_BAD = (OSError, EOFError, LZMAError, zlib.error, ValueError, RuntimeError, ImportError, csv.Error)


def _suffix(path: Path) -> str:
    """That of the kind of a file, like ".csv" of "a.csv.gz"."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


@contextmanager
def _open(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """The text of a file; newlines as ``\\n``, but for ``newline`` ""."""
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
        yield text


@dataclass
class Source:
    """One item of ``--text``, ``--held-out-text`` or ``--retain``.

    ``files``: what is read, in this order; none for a dataset. ``skipped``: files of a folder that are of no
    kind that is read, pipes and devices too. ``folder``: made by ``Dataset.save_to_disk``. Neither files nor
    folder: a Hub name, of which ``config`` is the configuration. ``left_out``: whether files in it are not
    read because they are in the folder that the run writes to.
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
            reason = f"cannot be {'read' if path else 'loaded'}: {one_line(error)}"
            if isinstance(error, UnicodeDecodeError) and path and _suffix(path) != ".parquet":
                reason = f"not UTF-8 text: {error.reason}, 0x{error.object[error.start]:x}"
            raise self.error(reason, path) from error

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """That of a saved or Hub dataset. Raises UsageError if it cannot be had."""
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
        total = hashlib.blake2b(digest_size=16)
        for path in self.files or [Path(entry["filename"]) for entry in self.dataset.cache_files]:
            with self._named(path):
                total.update(fingerprint.of_file(path, f"{_suffix(path)} {path.suffix.lower()}".encode()))
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
        for path in self.files or [None]:
            kind = KINDS.get(_suffix(path), "text") if path else "dataset"
            if kind == "text":
                yield self._chunks(path)
                continue
            with self._named(path):
                if kind == "dataset":
                    yield from self._dataset_texts(field)
                elif kind == "parquet":
                    yield from self._parquet_texts(field, path)
                else:
                    rows = self._json(path) if kind == "json" else _csv(path)
                    yield from self._row_texts(rows, field, path)

    def _chunks(self, path: Path) -> Iterator[str]:
        with self._named(path), _open(path) as file:
            while chunk := file.read(CHUNK):
                if "\0" in chunk:
                    raise self.error("not text: there is a NUL in it", path)
                yield chunk

    def _json(self, path: Path) -> Iterator[dict]:
        """The objects of JSON Lines, or of an array."""
        with _open(path) as file:
            is_array = file.read(CHUNK).lstrip().startswith("[")
        with _open(path) as file:
            for number, line in enumerate([file.read()] if is_array else file, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line.rstrip(), object_pairs_hook=_object)
                except json.JSONDecodeError as error:
                    number += error.lineno - 1
                    raise self.error(f"line {number} is not JSON: {error.msg}", path) from error
                for row in found if is_array else [found]:
                    if not isinstance(row, dict):
                        raise self.error(f"every row must be an object, not {type(row).__name__}", path)
                    yield row

    def _row_texts(self, rows: Iterator[dict], field: str | None, path: Path) -> Iterator[list[str]]:
        """The documents in rows of which not every one has every column."""
        first = [*islice(rows, FIRST_ROWS)]
        types: dict[str, bool] = {}
        for name, value in chain.from_iterable(row.items() for row in first):
            types[name] = isinstance(value, str) or types.get(name, False)
        if not types:
            return
        column = self._column(types, field, path)
        yield from self._texts((row.get(column) for row in chain(first, rows)), column, path)

    def _dataset_texts(self, field: str | None) -> Iterator[list[str]]:
        rows = self.dataset
        dtypes = {name: getattr(kind, "dtype", None) for name, kind in rows.features.items()}
        types = {name: dtype in ("string", "large_string") for name, dtype in dtypes.items()}
        if not types:
            return
        column = self._column(types, field, None)
        batches = rows.select_columns([column]).iter(1000)  # row by row it takes ten times as long
        yield from self._texts((text for batch in batches for text in batch[column]), column, None)

    def _parquet_texts(self, field: str | None, path: Path) -> Iterator[list[str]]:
        """A file without rows, as jobs write them for a share without any, has no documents."""
        with opened(path) as source:
            if path.suffix.lower() in COMPRESSIONS:  # it is not read from its beginning to its end
                source = pyarrow.BufferReader(source.read())
            file = pyarrow.parquet.ParquetFile(source)
            if not file.metadata.num_rows:
                return
            schema = file.schema_arrow
            counts = Counter(schema.names)
            column = self._column({each.name: _is_string(each.type) for each in schema}, field, path)
            if counts[column] > 1:
                raise self.error(f"has more than one column '{column}'", path)
            batches = file.iter_batches(1000, columns=[column])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            yield from self._texts(texts, column, path)

    def _texts(self, values: Iterable[object], column: str, path: Path | None) -> Iterator[list[str]]:
        """The documents in the ``values`` of a column. Raises UsageError for what is no text."""
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

    def _column(self, types: dict[str, bool], field: str | None, path: Path | None) -> str:
        """The column to read."""
        strings = [name for name, is_string in types.items() if is_string]
        wanted = ["text", "content", *strings[: len(strings) == 1]] if field is None else [field]
        if found := [name for name in wanted if name in types]:
            return found[0]
        for name in ("messages", "conversations"):
            if name in types and field is None:
                what = f"contains chat messages (column '{name}'); mica adapt trains on plain text"
                raise self.error(f"{what}. Render them with the chat template first", path)
        names = ", ".join(types)
        raise self.error(f"has no column '{wanted[0]}', only {names}: name one with --text-field", path)


def _csv(path: Path) -> Iterator[dict[str, str | None]]:
    """All columns are strings. pandas would take a first row with a field too many for one with an index.

    Of a column that the header has twice DictReader would keep the last.
    """
    csv.field_size_limit(2**31 - 1)
    with _open(path, newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True)
        counts = Counter(rows.fieldnames)
        twice = {name: _TWICE for name, count in counts.items() if count > 1}
        for row in rows:
            if surplus := row.pop(None, None):
                raise ValueError(
                    f"line {rows.line_num} has {len(row) + len(surplus)} fields, the header {len(row)}"
                )
            yield row | twice


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, of which json would keep the last of equal keys."""
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        row |= {name: _TWICE for name, count in counts.items() if count > 1}
    return row


def _is_string(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def find(
    option: str, items: Iterable[str], config: str | None = None, output: Path | None = None
) -> list[Source]:
    """The sources that the items of an option name, by a look at names and sizes only.

    What a folder has in ``output``, the folder that the run writes to, is no text: the run changes it.

    Raises UsageError for a file that is missing, empty, of no kind that is read, or needs a library that is
    missing.
    """
    return [_find(Source(option, str(item), config=config), output) for item in items]


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
    """Those of the ``files`` below ``folder`` that are not in ``output``."""
    if output is None:
        return files
    root, left_out = Path(os.path.realpath(folder)), Path(os.path.realpath(output))
    kept = []
    for file in files:
        place = root / file.relative_to(folder)
        if file.is_symlink():
            place = Path(os.path.realpath(file))
        if left_out not in place.parents:
            kept.append(file)
    return kept


def _find(source: Source, output: Path | None) -> Source:
    path = expanded(source.given)
    supported = f"supported: {' '.join(KINDS)}, each also with {' '.join(COMPRESSIONS)}"
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            if "::" in str(path.resolve()):
                raise source.error("datasets cannot open a folder with '::' in its path: rename it")
            source.folder = path
            return source
        try:
            found = sorted(_visible(path))
        except OSError as error:
            raise source.error(f"{error.filename} cannot be read: {one_line(error)}") from error
        every = _outside(found, path, output)
        source.left_out = len(every) < len(found)
        files = (file for file in every if file.is_file() and _suffix(file) in KINDS)
        source.files = tuple(file for file in files if file.stat().st_size)
        source.skipped = len(every) - len(source.files)
        if not source.files:
            where = "in this folder outside of --output" if source.left_out else "in this folder"
            raise source.error(f"no file with text {where}; {supported}")
    elif path.exists():
        if not path.is_file():  # it would wait for ever, or never end
            raise source.error(
                "a pipe or device, and texts are read more than once: write it to a file first"
            )
        if path.suffix and _suffix(path) not in KINDS:
            raise source.error(f"unsupported file type '{path.suffix}'; {supported}")
        source.files = (path,)
    elif source.given.startswith((".", "~", "/", "\\")) or len(path.parts) > 2 or _suffix(path) in KINDS:
        raise source.error("no such file or folder")
    for file in source.files:
        with source._named(file), file.open("rb") as found:
            if not found.read(1):
                raise source.error("the file is empty", file)
        if library := missing_library(file):
            raise source.error(f"needs {library}: pip install {library}", file)
    return source
