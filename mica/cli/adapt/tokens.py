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
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing import active_children, parent_process
from pathlib import Path

import datasets
import filelock
import numpy as np
import tokenizers
from accelerate import PartialState
from tqdm import tqdm

from mica.cli.adapt.sources import Source

VERSION = 2  # of the layout on disk, and of how documents become ids: with another one nothing old is used
PIECE = 20_000  # characters tokenised at once: 11 MB of text took 23.6 s as one string, 11.0 s in pieces
MAX_WORKERS = 16
BATCH = 2**18  # characters a call of the tokenizer
SMALL = 4  # batches: a source of no more needs no processes, and there may be hundreds of them


class Tokens:
    """The tokens of one source. Pickled as the name of its folder, for the workers of a DataLoader.

    ``ids``: (num_tokens,) uint16 or uint32, memory-mapped. ``lengths``: (num_documents,) int64, with the EOS.
    ``digests``: (num_documents,) uint64, equal for documents of the same tokens. ``empty``: documents without
    text, which are left out. ``largest``: the largest id. ``cached``: nothing had to be tokenised.
    """

    def __init__(self, folder: Path, cached: bool = True):
        self.folder, self.cached = folder, cached
        with np.load(folder / "facts.npz") as facts:
            self.lengths, self.digests = facts["lengths"], facts["digests"]
            self.empty, self.largest = facts["empty"].item(), facts["largest"].item()
            self.ids = np.memmap(folder / "tokens.bin", dtype=facts["dtype"].item(), mode="r")

    def __reduce__(self):
        return Tokens, (self.folder, self.cached)


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
                is_there = (root / key / "facts.npz").is_file()
                if not is_there:
                    with _renamed_to(root / key) as folder:
                        _build(source, tokenizer, field, workers or default_workers(), folder)
                        if source.state() != state:
                            raise source.error("changed while it was read")
                result.append(Tokens(root / key, cached=is_there))
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
        parts.append(state | {"truncation": None, "padding": None})  # set by each call
    else:  # written in Python: what it saves
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            files = sorted(file for file in Path(scratch).rglob("*") if file.is_file())
            parts += [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files]
    return hashlib.blake2b(json.dumps(parts).encode()).hexdigest()


def _build(source: Source, tokenizer, field: str | None, workers: int, folder: Path) -> None:
    """Fill ``folder``: the ids of all pieces one after another, with the EOS of each document."""
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    eos = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype)
    lengths, digests, empty, largest = [], [], 0, int(eos.max(initial=0))
    length, digest = 0, hashlib.blake2b(digest_size=8)
    bar = tqdm(desc=f"Tokenising {Path(source.given).name}", unit=" tokens", unit_scale=True, delay=2)
    pieces = _tokenised(_batches(source.documents(field)), tokenizer, workers, source)
    with bar, closing(pieces), (folder / "tokens.bin").open("wb") as file:
        for ids, is_last in pieces:
            if is_last is None:
                empty += 1
                continue
            ids = ids.astype(dtype)
            file.write(ids)
            digest.update(ids)
            bar.update(len(ids))
            length += len(ids)
            largest = max(largest, int(ids.max(initial=0)))
            if is_last:
                file.write(eos)
                lengths.append(length + len(eos))
                digests.append(int.from_bytes(digest.digest(), "little"))
                length, digest = 0, hashlib.blake2b(digest_size=8)
    if not any(lengths):
        raise source.error(f"no text in it ({empty:,} empty documents)" if empty else "no text in it")
    documents = {"lengths": np.array(lengths, np.int64), "digests": np.array(digests, np.uint64)}
    np.savez(folder / "facts.npz", empty=empty, largest=largest, dtype=dtype.name, **documents)


def _batches(documents: Iterable[Iterable[str]]) -> Iterator[list[tuple[str, bool | None]]]:
    """The pieces of documents, each with whether it is the last; ("", None): a document without text."""
    batch, size = [], 0
    for document in documents:
        pieces = cut(document)
        before, after = next(pieces, ""), next(pieces, None)
        is_empty = after is None and not before.strip()
        while before is not None:
            batch.append(("", None) if is_empty else (before, after is None))
            size += len(before)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
            before, after = after, next(pieces, None)
    if batch:
        yield batch


def _tokenised(
    batches: Iterator[list[tuple[str, bool | None]]], tokenizer, workers: int, source: Source
) -> Iterator[tuple[np.ndarray, bool | None]]:
    """The ids of each piece in place of it, in order."""
    # Threads in the tokenizers of forked processes would warn, and could stand still.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _start(tokenizer)
    for batch in batches if workers == 1 else islice(batches, SMALL):
        yield from _ids(batch)
    if (batch := next(batches, None)) is None:
        return
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(tokenizer, True))
    try:
        running = deque([pool.submit(_ids, batch)])
        while running:
            # `pool.map` would read all of the source at once.
            running += [pool.submit(_ids, batch) for batch in islice(batches, 2 * workers - len(running))]
            yield from running.popleft().result()
    except BrokenExecutor as error:  # a process was killed, as a rule for want of memory
        raise source.error(f"tokenising in {workers} processes failed: {error}") from error
    finally:
        for worker in active_children():  # a run that is stopped does not wait for them
            worker.terminate()
        pool.shutdown(cancel_futures=True)


def _start(tokenizer, in_child: bool = False) -> None:
    """What a process tokenises by; a child ends with its parent, which alone hears Ctrl-C."""
    global _tokenizer
    _tokenizer = tokenizer
    if in_child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=lambda: os._exit(parent_process().join() or 1), daemon=True).start()


def _ids(batch: list[tuple[str, bool | None]]) -> list[tuple[np.ndarray, bool | None]]:
    ids = _tokenizer(
        [piece for piece, _ in batch],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no line about texts longer than the model's window
    )["input_ids"]
    return [(np.array(each, np.uint32), is_last) for each, (_, is_last) in zip(ids, batch, strict=True)]
