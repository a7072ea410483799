"""Documents to token ids, in parallel, kept on disk by content and memory-mapped.

One folder a source, below `datasets`' cache (``HF_DATASETS_CACHE``): ``tokens.bin``, all ids of all
documents, and ``facts.npz``. Its name is a hash of all that the ids depend on, so neither another time stamp
nor another file name makes the work again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
import filelock
import numpy as np
import tokenizers
from accelerate import PartialState
from tqdm import tqdm

from mica.cli.adapt import fingerprint, processes
from mica.cli.adapt.sources import Source
from mica.cli.output import explained

VERSION = 4  # of the layout on disk, and of how documents become ids: with another one nothing old is used
PIECE = 20_000  # characters tokenised at once: 11 MB of text took 23.6 s as one string, 11.0 s in pieces
_SAMPLE = 16  # one piece in so many: to find words takes 60 ms/MB, which a tokenizer's threads would wait for
BATCH = 2**22  # characters a call of the tokenizer, whose threads share the pieces


class Tokens:
    """The tokens of one source.

    ``ids``: (num_tokens,) uint16 or uint32, memory-mapped. ``lengths``: (num_documents,) int64, with the EOS.
    ``digests``: (num_documents,) uint64, equal for documents of the same tokens. ``empty``: documents without
    text, which are left out. ``largest``: the largest id. ``tokens_per_word``: without EOS, of a sample;
    words are what is between white space. ``cached``: nothing had to be tokenised.
    """

    def __init__(self, folder: Path, cached: bool = True):
        self.folder, self.cached = folder, cached
        with np.load(folder / "facts.npz") as facts:
            self.lengths, self.digests = facts["lengths"], facts["digests"]
            self.empty, self.largest = facts["empty"].item(), facts["largest"].item()
            self.tokens_per_word = facts["tokens_per_word"].item()
            self.ids = np.memmap(folder / "tokens.bin", dtype=facts["dtype"].item(), mode="r")


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
    at = limit = start + PIECE
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
    """Return the tokens of each source, from the cache or by ``workers`` threads; the same for any number.

    The threads are the tokenizer's own: one that is written in Python has only one. Their number counts
    before the first of them was started in this process; None: one per CPU.

    No special tokens are added but the EOS of ``tokenizer``, if it has one, after every document. Long
    documents are tokenised in pieces (see `cut`); a tokenizer that puts a space before each text puts one
    before each piece.

    To be called by every process of a run. Of those that share a disk one works, with a progress bar, and
    the others wait.

    Raises UsageError for all that cannot be read (see `Source.documents`), for a source without any text,
    for a file that changes while it is read, and if the disk is full.
    """
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    root = Path(datasets.config.HF_DATASETS_CACHE) / "mica-tokens"
    rest = [VERSION, PIECE, tokenizers.__version__, field, _serialised(tokenizer)]
    result = []
    for source in sources:
        state = source.state()
        key = hashlib.blake2b(json.dumps([source.digest(), *rest]).encode(), digest_size=16).hexdigest()
        with explained(f"{source.option} {source.given}: cannot be tokenised below {root}", OSError):
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root / f".{key}.lock"):
                is_there = (root / key / "facts.npz").is_file()
                if not is_there:  # a process that is killed leaves nothing that looks finished
                    partial = root / f".{key}.partial"
                    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
                    try:
                        partial.mkdir()
                        _build(source, tokenizer, field, partial)
                        if source.state() != state:
                            raise source.error("changed while it was read")
                        partial.rename(root / key)
                    finally:
                        shutil.rmtree(partial, ignore_errors=True)
                result.append(Tokens(root / key, cached=is_there))
    return result


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; of the processes of one run the main one takes it first."""
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
    """What a tokenizer does, the same in every process, which `datasets`' hash of its pickle is not."""
    parts = [len(tokenizer), tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", None)]
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append(state | {"truncation": None, "padding": None})  # set by each call
    else:  # written in Python: what it saves
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            files = sorted(file for file in Path(scratch).rglob("*") if file.is_file())
            parts += [fingerprint.of_file(file).hex() for file in files]
    return hashlib.blake2b(json.dumps(parts).encode()).hexdigest()


def _build(source: Source, tokenizer, field: str | None, folder: Path) -> None:
    """Fill ``folder``: the ids of all pieces one after another, with the EOS of each document."""
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    eos = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype)
    lengths, digests, empty, largest = [], [], 0, int(eos.max(initial=0))
    words = counted = 0
    length, digest = 0, hashlib.blake2b(digest_size=8)
    bar = tqdm(desc=f"Tokenising {Path(source.given).name}", unit=" tokens", unit_scale=True, delay=2)
    with bar, (folder / "tokens.bin").open("wb") as file:
        for index, (text, ids, is_last) in enumerate(_tokenised(source.documents(field), tokenizer)):
            if is_last is None:
                empty += 1
                continue
            ids = np.array(ids, dtype)
            file.write(ids)
            digest.update(ids)
            bar.update(len(ids))
            length += len(ids)
            largest = max(largest, int(ids.max(initial=0)))
            if index % _SAMPLE == 0:
                words, counted = words + len(text.split()), counted + len(ids)
            if is_last:
                file.write(eos)
                lengths.append(length + len(eos))
                digests.append(int.from_bytes(digest.digest(), "little"))
                length, digest = 0, hashlib.blake2b(digest_size=8)
    if not any(lengths):
        raise source.error(f"no text in it ({empty:,} empty documents)" if empty else "no text in it")
    documents = {"lengths": np.array(lengths, np.int64), "digests": np.array(digests, np.uint64)}
    facts = {"empty": empty, "largest": largest, "tokens_per_word": counted / max(1, words)}
    np.savez(folder / "facts.npz", dtype=dtype.name, **facts, **documents)


def _pieces(documents: Iterable[Iterable[str]]) -> Iterator[tuple[str, bool | None]]:
    """The pieces of documents, each with whether it is the last; ("", None): a document without text."""
    for document in documents:
        pieces = cut(document)
        before, after = next(pieces, ""), next(pieces, None)
        if after is None and not before.strip():
            yield "", None
            continue
        while before is not None:
            yield before, after is None
            before, after = after, next(pieces, None)


def _tokenised(documents: Iterable[Iterable[str]], tokenizer) -> Iterator[tuple[str, list[int], bool | None]]:
    """`_pieces` with the ids of each, by batches."""
    batch, size = [], 0
    for piece in chain(_pieces(documents), [None]):
        if piece is not None:
            batch.append(piece)
            size += len(piece[0])
        if size >= BATCH or (piece is None and batch):
            texts, ends = zip(*batch, strict=True)
            # no line about texts longer than the model's window
            options = {"add_special_tokens": False, "verbose": False}
            options |= {"return_attention_mask": False, "return_token_type_ids": False}
            yield from zip(texts, tokenizer(list(texts), **options)["input_ids"], ends, strict=True)
            batch, size = [], 0
