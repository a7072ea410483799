"""Where text comes from: files, folders, datasets saved by `datasets`, datasets of the Hub.

`find` looks at names only, and is quick. `Source.documents` reads tables in parts, as frames of pandas: CSV
and Parquet by pandas and pyarrow, as `datasets` does, but from opened files, as it takes "a::b.csv" for a
file within another, and "[a].csv" for a.csv. JSON is read by the standard library: `datasets` refuses a file
in which another column than the text's comes or changes its type after the first 10 MB.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import datasets
import pandas
import pyarrow
import pyarrow.parquet
from pandas import DataFrame

from mica.cli.loading import note_hub
from mica.cli.output import expanded, explained
from mica.cli.record import digest
from mica.errors import UsageError

CHUNK = 2**20  # characters read at once
_ROWS = 1000  # read at once; the column is looked for in the first of them
_SEPARATORS = ",;\t|"  # of CSV: Excel writes semicolons where the decimal point is a comma


def _zstandard(path: Path, mode: str) -> BinaryIO:
    """Open a zst file with pyarrow, which needs no other library, reads all frames and refuses a cut file."""
    return pyarrow.CompressedInputStream(path.open(mode), "zstd")


_OPENERS = {".gz": gzip.open, ".zst": _zstandard, ".xz": lzma.open, ".bz2": bz2.open}


def _suffix(path: Path) -> str:
    """The suffix that says the kind of a file: ".csv" for "a.csv.gz"."""
    if path.suffix.lower() in _OPENERS:
        path = path.with_suffix("")
    return path.suffix.lower()


def _opened(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed: to be closed."""
    return _OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _read(path: Path) -> io.TextIOWrapper:
    """The text of a file: to be closed. A BOM is no part of it, and newlines are ``\\n``."""
    return io.TextIOWrapper(_opened(path), "utf-8-sig")


@dataclass
class Source:
    """One item of ``--text``, ``--held-out-text`` or ``--retain``.

    ``files``: what is read, in this order; none for a dataset. ``skipped``: how many files of a folder are
    not read: of other kinds, empty, pipes and devices. ``folder``: made by ``Dataset.save_to_disk``. Neither
    files nor folder: a dataset on the Hub, and ``config`` is its configuration.
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

    def error(self, reason: str, path: Path | None = None) -> UsageError:
        return UsageError(f"{self.option} {path or self.given}: {reason}")

    def _reading(self, path: Path) -> AbstractContextManager[None]:
        return explained(f"{self.option} {path}: cannot be read")

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The saved or Hub dataset, its training split. Raises UsageError if it cannot be had."""
        where = f"{self.option} {self.given}"
        if self.is_on_hub:
            with explained(f"{where}: no such file or folder, and it cannot be loaded from the Hub"):
                note_hub(self.given)
                return datasets.load_dataset(self.given, self.config, split="train")
        with explained(f"{where}: cannot be loaded"):
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
            with self._reading(path):
                total.update(digest(path, kind.encode()))
        return total.hexdigest()

    def documents(self, field: str | None) -> Iterator[Iterable[str]]:
        """Every document as an iterable of strings, which joined are its text; rows without text are empty.

        A text file is one document, a row of any other one. ``field`` names the column; None: "text", else
        "content", else the only column of strings; of CSV not that, as line 1 may be no header.

        Raises UsageError, naming the file, for all that is not text.
        """
        if not self.files:
            tables = self.dataset.with_format("arrow").iter(_ROWS)
            yield from self._texts(map(_frame, tables), field, None)
        for path in self.files:
            frames = KINDS.get(_suffix(path))
            if frames is None:
                yield self._chunks(path)
                continue
            with self._reading(path):
                yield from self._texts(frames(path), field, path)

    def _chunks(self, path: Path) -> Iterator[str]:
        """A text in pieces."""
        with self._reading(path), _read(path) as text:
            while chunk := text.read(CHUNK):
                if "\0" in chunk:
                    raise self.error("not text: it contains a NUL character", path)
                yield chunk

    def _texts(
        self, frames: Iterator[DataFrame], field: str | None, path: Path | None
    ) -> Iterator[list[str]]:
        """The documents in rows, of which only the first need to have the column."""
        # pandas says by a warning alone that it drops a field without a name.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        column = None
        for frame in frames:
            if column is None:
                column = self._column(frame, field, path)
            if column not in frame:
                yield from [[""]] * len(frame)
                continue
            if _kind(frame[column]) not in ("string", "empty"):
                raise self.error(f"column '{column}' must have strings only", path)
            for text in frame[column].astype(object).fillna(""):
                text.encode()  # raises UnicodeEncodeError for half a character, which JSON can express
                yield [text]

    def _column(self, frame: DataFrame, field: str | None, path: Path | None) -> str:
        """The column to read: ``field``, else "text", "content", or, but in CSV, the only one with strings.

        Raises UsageError if there is no such column.
        """
        wanted = [field] if field is not None else ["text", "content"]
        for name in wanted:
            if name in frame:
                return name
        names = f"{', '.join(frame):.200}"
        if path is not None and _suffix(path) in (".csv", ".tsv"):
            names += " (by its line 1)"  # which may be a document, and no header
        elif field is None:
            with_strings = [name for name in frame if _kind(frame[name]) == "string"]
            if len(with_strings) == 1:
                return with_strings[0]
        raise self.error(f"has no column '{wanted[0]}', only {names}: name one with --text-field", path)


def _separator(path: Path, usual: str) -> str:
    """What separates the names at the top of a CSV file: ``usual``, unless only another one does."""
    with _read(path) as text:
        line = next(filter(str.strip, text), "")
    for separator in usual + _SEPARATORS:
        if len(next(csv.reader([line[:10_000]], delimiter=separator), [])) > 1:
            return separator
    return usual


def _csv_frames(path: Path, usual: str = ",") -> Iterator[DataFrame]:
    # By default pandas takes a first row with one field too many for a sign of an index column, and "NA" for
    # nothing.
    as_text = {"index_col": False, "keep_default_na": False, "na_values": ""}
    separator = _separator(path, usual)
    with _opened(path) as file:
        yield from pandas.read_csv(file, sep=separator, chunksize=10 * _ROWS, **as_text)


def _frame(table: pyarrow.Table | pyarrow.RecordBatch) -> DataFrame:
    return table.to_pandas(ignore_metadata=True)  # which may make an index of a column


def _parquet_frames(path: Path) -> Iterator[DataFrame]:
    with _opened(path) as file:
        yield from map(_frame, pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS))


def _json_frames(path: Path) -> Iterator[DataFrame]:
    """The rows of JSON Lines, or of an array."""
    rows = _json_rows(path)
    while some := list(islice(rows, _ROWS)):
        yield DataFrame(some, dtype=object)


def _json_rows(path: Path) -> Iterator[dict]:
    """ValueError for no JSON, and for a row that is no object."""
    with _read(path) as text:
        begin = text.read(CHUNK).lstrip()
    with _read(path) as text:
        for row in json.load(text) if begin.startswith("[") else _json_lines(text):
            if not isinstance(row, dict):
                raise ValueError(f"every row must be an object, not {type(row).__name__}")
            yield row


def _json_lines(text: Iterable[str]) -> Iterator[object]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error.msg}") from error


KINDS = {  # suffix -> what reads frames; None: a text
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex")),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_frames),
    ".csv": _csv_frames,
    ".tsv": partial(_csv_frames, usual="\t"),
    ".parquet": _parquet_frames,
}
_SUPPORTED = f"supported: {' '.join(KINDS)}, each also with {' '.join(_OPENERS)}"


def _kind(values: pandas.Series) -> str:
    """What values are, those that are missing left out: "string", "empty" if all are missing, ..."""
    return pandas.api.types.infer_dtype(values.astype(object))


def find(
    option: str, items: Iterable[str], config: str | None = None, output: Path | None = None
) -> list[Source]:
    """The sources that the items of an option name, by a look at names and sizes only.

    Files of a folder that are in ``output``, the folder that the run writes to, are not read: the run changes
    them.

    Raises UsageError for a file that is missing, empty, or of an unsupported type.
    """
    return [_located(Source(option, str(item), config=config), output) for item in items]


def _located(source: Source, output: Path | None) -> Source:
    """``source`` with its ``folder`` or ``files``; neither for a dataset on the Hub.

    Raises UsageError for what is no such name.
    """
    path = expanded(source.given)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            source.folder = path
        else:
            with explained(f"{source.option} {source.given}: a folder in it cannot be read", OSError):
                _take_files(source, path, output)
    elif path.exists():
        _take_file(source, path)
    elif source.given.startswith((".", "~", "/", "\\")) or len(path.parts) > 2 or _suffix(path) in KINDS:
        raise source.error("no such file or folder")
    return source


def _take_files(source: Source, folder: Path, output: Path | None) -> None:
    """Set ``source.files`` to those in ``folder`` and below, without what is hidden or in ``output``.

    Raises OSError for a folder that cannot be read, over which `Path.rglob` passes in silence.
    """

    def refuse(error: OSError) -> None:
        raise error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    if output is not None:
        files = [path for path in files if output.resolve() not in path.resolve().parents]
    found = [
        path for path in sorted(files) if path.is_file() and _suffix(path) in KINDS and path.stat().st_size
    ]
    if not found:
        raise source.error(f"no text files in this folder; {_SUPPORTED}")
    source.files = tuple(found)
    source.skipped = len(files) - len(found)


def _take_file(source: Source, path: Path) -> None:
    if not path.is_file():  # it would wait for ever, or never end
        raise source.error("a pipe or device, but texts are read more than once: write it to a file first")
    if path.suffix and _suffix(path) not in KINDS:
        raise source.error(f"unsupported file type '{path.suffix}'; {_SUPPORTED}")
    if not path.stat().st_size:
        raise source.error("the file is empty")
    source.files = (path,)
