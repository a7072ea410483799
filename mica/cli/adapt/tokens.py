"""Documents to token ids, in parallel, kept on disk by content and memory-mapped.

Each source has one folder below `datasets`' cache (``HF_DATASETS_CACHE``), with ``tokens.bin``, all ids of
all documents, and ``facts.npz``. Its name is a hash of all that the ids depend on, so a file that was only
touched or renamed is not tokenised again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import datasets
import filelock
import numpy as np
import tokenizers
from accelerate import PartialState
from tqdm import tqdm

from mica.cli.adapt import fingerprint, processes
from mica.cli.adapt.sources import Source
from mica.cli.output import explained

VERSION = 4  # of the layout on disk, and of how documents become ids: no folder of another version is used
PIECE = 20_000  # characters tokenised at once: 11 MB of text took 23.6 s as one string, 11.0 s in pieces
BATCH = 2**22  # characters per call of the tokenizer, whose threads share the pieces
# Words are counted in one of so many pieces: it takes 60 ms/MB, during which the tokenizer's threads wait.
_SAMPLE = 16


class Tokens:
    """The tokens of one source.

    ``ids``: (num_tokens,) uint16 or uint32, memory-mapped. ``lengths``: (num_documents,) int64, with the EOS.
    ``digests``: (num_documents,) uint64, equal for documents of the same tokens. ``empty``: documents without
    text, which are left out. ``largest``: the largest id. ``tokens_per_word``: without EOS, measured on a
    sample; words are what is between white space. ``cached``: nothing had to be tokenised.
    """

    def __init__(self, folder: Path, cached: bool = True):
        self.folder = folder
        self.cached = cached
        with np.load(folder / "facts.npz") as facts:
            self.lengths = facts["lengths"]
            self.digests = facts["digests"]
            self.empty = facts["empty"].item()
            self.largest = facts["largest"].item()
            self.tokens_per_word = facts["tokens_per_word"].item()
            self.ids = np.memmap(folder / "tokens.bin", dtype=facts["dtype"].item(), mode="r")


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text into pieces of at most PIECE characters, the same however it is divided into ``chunks``.

    A cut is before a line that does not begin with white space, where tokenizers split words anyway; else
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
    last_newline = text.rfind("\n", start, limit)

    newline = last_newline
    while newline >= 0:
        if not text[newline + 1].isspace():
            return newline + 1
        newline = text.rfind("\n", start, newline)
    if last_newline >= 0:
        return last_newline + 1

    space = text.rfind(" ", start + 1, limit)
    if space >= 0:
        return space
    return limit


def tokenize(
    sources: list[Source], tokenizer, field: str | None = None, workers: int | None = None
) -> list[Tokens]:
    """Return the tokens of each source, from the cache or by ``workers`` threads; the same for any number.

    The threads are the tokenizer's own; a tokenizer that is written in Python has only one. ``workers``
    counts only until the first of them is started in this process; None: one per CPU.

    No special tokens are added but the EOS of ``tokenizer``, if it has one, after every document. Long
    documents are tokenised in pieces (see `cut`); a tokenizer that puts a space before each text puts one
    before each piece.

    Every process of a run calls this. Where several share a disk, one works, with a progress bar, and the
    others wait.

    Raises UsageError for all that cannot be read (see `Source.documents`), for a source without any text,
    for a file that changes while it is read, and if the disk is full.
    """
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    root = Path(datasets.config.HF_DATASETS_CACHE) / "mica-tokens"
    dependencies = [VERSION, PIECE, tokenizers.__version__, field, _serialised(tokenizer)]
    result = []
    for source in sources:
        state = source.state()
        text = json.dumps([source.digest(), *dependencies])
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        with explained(f"{source.option} {source.given}: tokens cannot be cached in {root}", OSError):
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root / f".{key}.lock"):
                is_cached = (root / key / "facts.npz").is_file()
                if not is_cached:
                    _fill(root / key, source, tokenizer, field, state)
                result.append(Tokens(root / key, cached=is_cached))
    return result


def _fill(folder: Path, source: Source, tokenizer, field: str | None, state: list) -> None:
    """Make ``folder`` at once, by a rename: a process that is killed leaves nothing that looks finished.

    ``state``: of the source when its digest was taken. Raises UsageError if it is another one afterwards.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        _build(source, tokenizer, field, partial)
        if source.state() != state:
            raise source.error("changed while it was being read")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; in one run the main process takes it first."""
    held = filelock.FileLock(lock)
    with processes.agreed():
        if PartialState().is_main_process:
            held.acquire()
    try:
        with held:
            yield
    finally:
        held.release(force=True)


def _serialised(tokenizer) -> str:
    """A hash of what a tokenizer does, the same in every process, unlike `datasets`' hash of its pickle."""
    parts = [len(tokenizer), tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", None)]
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append(state | {"truncation": None, "padding": None})  # set by each call
    else:  # written in Python: its files stand for it
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            files = sorted(file for file in Path(scratch).rglob("*") if file.is_file())
            parts += [fingerprint.of_file(file).hex() for file in files]
    return hashlib.blake2b(json.dumps(parts).encode()).hexdigest()


def _build(source: Source, tokenizer, field: str | None, folder: Path) -> None:
    """Fill ``folder``: the ids of all pieces one after another, with the EOS of each document."""
    dtype = np.dtype(np.uint32)
    if max(tokenizer.get_vocab().values()) < 2**16:
        dtype = np.dtype(np.uint16)
    eos = np.array([], dtype)
    if tokenizer.eos_token_id is not None:
        eos = np.array([tokenizer.eos_token_id], dtype)
    bar = tqdm(desc=f"Tokenising {Path(source.given).name}", unit=" tokens", unit_scale=True, delay=2)
    with bar, (folder / "tokens.bin").open("wb") as file:
        writer = _Writer(file, eos)
        for text, ids, is_last in _tokenised(source.documents(field), tokenizer):
            if is_last is None:
                writer.skip()
                continue
            ids = np.array(ids, dtype)
            writer.add(text, ids)
            bar.update(len(ids))
            if is_last:
                writer.end_document()

    if not any(writer.lengths):
        why = ""
        if writer.empty:
            why = f" ({writer.empty:,} empty documents)"
        raise source.error(f"no text in it{why}")
    np.savez(
        folder / "facts.npz",
        dtype=dtype.name,
        empty=writer.empty,
        largest=writer.largest,
        tokens_per_word=writer.sampled_tokens / max(1, writer.sampled_words),
        lengths=np.array(writer.lengths, np.int64),
        digests=np.array(writer.digests, np.uint64),
    )


class _Writer:
    """Writes the ids of pieces to a file and keeps what `Tokens` says of the documents.

    ``eos``: (1,) or (0,), written after each document; in its length, but not in its digest.
    """

    def __init__(self, file: BinaryIO, eos: np.ndarray):
        self.lengths: list[int] = []
        self.digests: list[int] = []
        self.empty = 0
        self.largest = int(eos.max(initial=0))
        self.sampled_words = 0
        self.sampled_tokens = 0
        self._file = file
        self._eos = eos
        self._pieces = 0
        self._begin_document()

    def _begin_document(self) -> None:
        self._length = 0
        self._digest = hashlib.blake2b(digest_size=8)

    def skip(self) -> None:
        """Count a document without text."""
        self.empty += 1
        self._pieces += 1

    def add(self, text: str, ids: np.ndarray) -> None:
        """Write a piece of the present document."""
        self._file.write(ids)
        self._digest.update(ids)
        self._length += len(ids)
        self.largest = max(self.largest, int(ids.max(initial=0)))
        if self._pieces % _SAMPLE == 0:
            self.sampled_words += len(text.split())
            self.sampled_tokens += len(ids)
        self._pieces += 1

    def end_document(self) -> None:
        self._file.write(self._eos)
        self.lengths.append(self._length + len(self._eos))
        self.digests.append(int.from_bytes(self._digest.digest(), "little"))
        self._begin_document()


def _pieces(documents: Iterable[Iterable[str]]) -> Iterator[tuple[str, bool | None]]:
    """The pieces of documents, each with whether it is the last; ("", None): a document without text."""
    for document in documents:
        pieces = cut(document)
        piece = next(pieces, "")
        following = next(pieces, None)
        if following is None and not piece.strip():
            yield "", None
            continue
        while piece is not None:
            yield piece, following is None
            piece = following
            following = next(pieces, None)


def _batches(pieces: Iterable[tuple[str, bool | None]]) -> Iterator[list[tuple[str, bool | None]]]:
    """`_pieces` in lists of at least BATCH characters, the last of what is left."""
    batch = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _tokenised(documents: Iterable[Iterable[str]], tokenizer) -> Iterator[tuple[str, list[int], bool | None]]:
    """`_pieces` with the ids of each, tokenised by batches."""
    for batch in _batches(_pieces(documents)):
        texts = [text for text, _ in batch]
        ends = [is_last for _, is_last in batch]
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no line about texts longer than the model's window
        )
        yield from zip(texts, encoded["input_ids"], ends, strict=True)
