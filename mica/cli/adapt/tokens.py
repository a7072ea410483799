"""Documents to token ids, in parallel, kept on disk by content and memory-mapped.

One folder a source, below `datasets`' cache (``HF_DATASETS_CACHE``): ``tokens.bin``, all ids of all
documents; ``lengths.npy`` and ``digests.npy``, one number a document; ``facts.json``. Its name is a hash of
all that the ids depend on, so neither another time stamp nor another file name makes the work again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow as pa
import tokenizers
from accelerate import PartialState
from tqdm import tqdm

from mica.cli.adapt.sources import Source

VERSION = 1  # of the layout on disk, and of how documents become ids: with another one nothing old is used
PIECE = 20_000  # characters tokenised at once: 11 MB of text took 23.6 s as one string, 11.0 s in pieces
MAX_WORKERS = 16
BATCH = 100  # pieces a call of the tokenizer: at most 2 million characters
SMALL = 2**20  # characters below which a source needs no processes and no bar: there may be hundreds of them
_CHARACTERS = 2**22  # written to disk at once
_SCHEMA = pa.schema({"text": pa.string(), "is_last": pa.bool_()})


class Tokens:
    """The tokens of one source. Pickled as the name of its folder, for the workers of a DataLoader.

    ``ids``: (num_tokens,) uint16 or uint32, memory-mapped. ``lengths``: (num_documents,) int64, with the EOS.
    ``digests``: (num_documents,) uint64, equal for documents of the same tokens. ``empty``: documents without
    text, which are left out. ``largest``: the largest id. ``cached``: nothing had to be tokenised.
    """

    def __init__(self, folder: Path, cached: bool = True):
        self.folder, self.cached = folder, cached
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.empty, self.largest, self.dtype = facts["empty"], facts["largest"], facts["dtype"]

    def __reduce__(self):
        return Tokens, (self.folder, self.cached)

    @cached_property
    def ids(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r")

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.load(self.folder / "lengths.npy")

    @cached_property
    def digests(self) -> np.ndarray:
        return np.load(self.folder / "digests.npy")

    @property
    def key(self) -> str:
        return self.folder.name


def default_workers() -> int:
    """Processes that tokenise: one for each CPU that this process may use, at most 16."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; elsewhere all CPUs
    return min(MAX_WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text, given in chunks, into pieces of at most PIECE characters; how it came in chunks is no
    matter.

    A cut is before a line that does not begin with white space, where tokenizers of words cut anyway; else
    at the end of a line, else before a space, else anywhere.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        start = 0
        while len(text) - start > PIECE:
            end = _end(text, start)
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def _end(text: str, start: int) -> int:
    """Where the piece that begins at ``start`` ends; looks at PIECE + 1 characters only."""
    limit = start + PIECE
    at = limit
    while (at := text.rfind("\n", start, at)) >= 0:
        if not text[at + 1].isspace():
            return at + 1
    if (at := text.rfind("\n", start, limit)) >= 0:
        return at + 1
    at = text.rfind(" ", start + 1, limit)
    return at if at > 0 else limit


def tokenize(
    sources: list[Source], tokenizer, field: str | None = None, workers: int | None = None
) -> list[Tokens]:
    """Return the tokens of each source, from the cache or by ``workers`` processes; the same for any
    number.

    No special tokens are added but the EOS of ``tokenizer``, if it has one, after every document. Long
    documents are tokenised in pieces (see `cut`); a tokenizer that puts a space before each text puts one
    before each piece.

    To be called by every process of a run. Of those that share a disk one works, with a progress bar, and
    the others wait for a lock on a file: a collective operation would time out after some minutes.

    Raises UsageError for all that cannot be read (see `Source.documents`), for a source without any text,
    for a file that changes while it is read, and if the disk is full.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "mica-tokens"
    rest = [VERSION, PIECE, tokenizers.__version__, field, _serialised(tokenizer)]
    result = []
    for source in sources:
        state = source.state()
        key = hashlib.blake2b(json.dumps([source.digest(), *rest]).encode(), digest_size=16).hexdigest()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root / f".{key}.lock"):
                if (root / key / "facts.json").is_file():
                    result.append(Tokens(root / key))
                    continue
                with _renamed_to(root / key) as folder:
                    _build(source, tokenizer, field, workers or default_workers(), folder)
                    if source.state() != state:
                        raise source.error("changed while it was read")
                result.append(Tokens(root / key, cached=False))
        except OSError as error:
            raise source.error(f"cannot be tokenised below {root}: {error.strerror or error}") from error
    return result


@contextmanager
def _renamed_to(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed at the end: a process that is killed leaves nothing that looks finished."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: we hold the lock
    try:
        partial.mkdir()
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; of the processes of one run the main one takes it first."""
    state = PartialState()
    held = filelock.FileLock(lock)
    if state.is_main_process:
        held.acquire()
    try:
        state.wait_for_everyone()
        with held:
            yield
    finally:
        held.release(force=True)


def _serialised(tokenizer) -> str:
    """What a tokenizer does, the same in every process, which `datasets`' hash of its pickle is not."""
    parts = [len(tokenizer), tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", None)]
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(truncation=None, padding=None)  # set by each call
        parts.append(state)
    else:  # written in Python: what it saves
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            files = sorted(file for file in Path(scratch).rglob("*") if file.is_file())
            parts += [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files]
    return hashlib.blake2b(json.dumps(parts).encode()).hexdigest()


def _build(source: Source, tokenizer, field: str | None, workers: int, folder: Path) -> None:
    """Fill ``folder``: text in pieces, then their tokens by `datasets`, then the arrays."""
    scratch = folder / "scratch"
    scratch.mkdir()
    empty, characters = _write_pieces(source, field, scratch / "pieces.arrow")
    pieces = datasets.Dataset.from_file(str(scratch / "pieces.arrow"))
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    is_small = characters <= SMALL
    ids = datasets.List(datasets.Value(dtype.name))
    try:
        with _settings(is_quiet=is_small):
            tokens = pieces.map(
                _ids,
                batched=True,
                batch_size=BATCH,
                fn_kwargs={"tokenizer": tokenizer, "dtype": dtype},
                remove_columns="text",
                features=datasets.Features(ids=ids, is_last=datasets.Value("bool")),
                num_proc=None if is_small or workers == 1 else workers,
                load_from_cache_file=False,
                cache_file_name=str(scratch / "tokens.arrow"),
                new_fingerprint="tokens",  # not asked for; else `datasets` would pickle the tokenizer for one
                desc=f"Tokenising {source.name}",
            )
    except RuntimeError as error:  # a process was killed, as a rule for want of memory
        raise source.error(f"tokenising in {workers} processes failed: {error}") from error
    facts = _write_arrays(tokens, tokenizer.eos_token_id, dtype, folder)
    if not (folder / "tokens.bin").stat().st_size:
        raise source.error(f"no text in it ({empty:,} empty documents)" if empty else "no text in it")
    del tokens, pieces  # or Windows could not remove their files
    shutil.rmtree(scratch)
    (folder / "facts.json").write_text(json.dumps({"empty": empty, **facts}), encoding="utf-8")


def _write_pieces(source: Source, field: str | None, path: Path) -> tuple[int, int]:
    """Write all text in pieces, for `datasets` to map into memory; return how many documents are empty, and
    how many characters there are.
    """
    empty, size, total, texts, ends = 0, 0, 0, [], []
    bar = tqdm(desc=f"Reading {source.name}", unit=" characters", unit_scale=True, delay=2)
    with bar, pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for document in source.documents(field):
            is_empty = True
            for piece, is_last in _marked(document):
                is_empty = False
                texts.append(piece)
                ends.append(is_last)
                size += len(piece)
                if size >= _CHARACTERS:
                    writer.write_batch(_batch(texts, ends))
                    bar.update(size)
                    total, size, texts, ends = total + size, 0, [], []
            empty += is_empty
        writer.write_batch(_batch(texts, ends))
    return empty, total + size


def _batch(texts: list[str], ends: list[bool]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(texts, pa.string()), pa.array(ends, pa.bool_())], schema=_SCHEMA)


def _marked(document: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The pieces of a document, each with whether it is the last; none if there is only white space."""
    pieces = cut(document)
    before, is_long = next(pieces, ""), False
    for piece in pieces:
        yield before, False
        before, is_long = piece, True
    if is_long or before.strip():
        yield before, True


def _ids(batch: dict[str, list], tokenizer, dtype) -> dict[str, list]:
    ids = tokenizer(
        batch["text"],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no line about texts longer than the model's window
    )["input_ids"]
    return {"ids": [np.asarray(piece, dtype) for piece in ids], "is_last": batch["is_last"]}


def _write_arrays(tokens, eos: int | None, dtype: np.dtype, folder: Path) -> dict[str, int | str]:
    """Write the ids of all pieces one after another, with the EOS of each document; return what to note of
    them.
    """
    lengths, digests, largest, length, digest = [], [], 0, 0, hashlib.blake2b(digest_size=8)
    end = np.array([] if eos is None else [eos], dtype)
    with (folder / "tokens.bin").open("wb") as file:
        for table in tokens.with_format("arrow").iter(1000):
            for ids, is_last in zip(table["ids"], table["is_last"].to_pylist(), strict=True):
                piece = ids.values.to_numpy()
                file.write(piece)
                digest.update(piece)
                length += len(piece)
                largest = max(largest, int(piece.max(initial=0)))
                if is_last:
                    file.write(end)
                    lengths.append(length + len(end))
                    digests.append(int.from_bytes(digest.digest(), "little"))
                    length, digest = 0, hashlib.blake2b(digest_size=8)
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))
    np.save(folder / "digests.npy", np.array(digests, np.uint64))
    return {"dtype": dtype.name, "largest": max(largest, int(end.max(initial=0)))}


@contextmanager
def _settings(*, is_quiet: bool) -> Iterator[None]:
    """No threads in the tokenizers of forked processes, which would warn and could stand still; no bar if
    quiet.
    """
    name = "TOKENIZERS_PARALLELISM"
    before, had_bars = os.environ.get(name), not datasets.are_progress_bars_disabled()
    os.environ[name] = "false"
    if is_quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
