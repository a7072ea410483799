"""Documents to token ids, once: `datasets` keeps them in its cache, from which they are memory-mapped.

Their fingerprint there is a hash of all that the ids depend on, so a file that was only touched or renamed is
not tokenised again.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path

import datasets
import numpy as np
import tokenizers
from accelerate import PartialState
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from mica.cli.adapt import processes
from mica.cli.adapt.sources import Source
from mica.cli.output import explained
from mica.cli.record import digest

VERSION = 6  # of what is cached, and of how documents become ids: none of another version is used
PIECE = 20_000  # characters tokenised at once: 11 MB of text took 23.6 s as one string, 11.0 s in pieces
BATCH = 512  # pieces per call of the tokenizer, whose threads share them

# A stretch of tokens, a whole document or a part of one: in which of several arrays of ids, where in it, how
# long; and the digest of the whole document. Arrays of them (`np.recarray`) are in the order of joining.
SPAN = np.dtype([("store", np.int64), ("start", np.int64), ("length", np.int64), ("digest", np.uint64)])


@dataclass
class Tokens:
    """The tokens of one source, or of several (see `joined`).

    ``ids``: memory-mapped arrays, each (num_tokens,) uint16 or uint32. ``spans``: (num_documents,) of `SPAN`
    with their EOS, without those that have no text; digests of documents of the same tokens are equal.
    """

    ids: list[np.ndarray]
    spans: np.recarray


def joined(parts: list[Tokens]) -> Tokens:
    """The documents of all ``parts``, at least one, one after another."""
    ids = []
    spans = []
    for part in parts:
        moved = part.spans.copy()
        moved.store += len(ids)
        spans.append(moved)
        ids += part.ids
    return Tokens(ids, np.concatenate(spans).view(np.recarray))


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text into pieces of at most PIECE characters, the same however it is divided into ``chunks``.

    A cut is before a line that does not begin with white space, where tokenizers split words anyway; else
    at the end of a line, else before a space, else anywhere. The only piece of an empty text is empty.
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


def tokenize(source: Source, tokenizer, field: str | None = None) -> Tokens:
    """Return the tokens of a source, from the cache or by the tokenizer's own threads.

    No special tokens are added but the EOS of ``tokenizer``, if it has one, after every document. Long
    documents are tokenised in pieces (see `cut`); a tokenizer that puts a space before each text puts one
    before each piece.

    Every process of a run calls this. The main one works, with a progress bar, and the others wait.

    Raises UsageError for all that cannot be read (see `Source.documents`), for a source without any text,
    and if the disk is full.
    """
    dependencies = [VERSION, PIECE, tokenizers.__version__, source.digest(), field, _serialised(tokenizer)]
    key = hashlib.blake2b(json.dumps(dependencies).encode(), digest_size=16).hexdigest()

    rows = partial(_rows, source, tokenizer, field)

    def load() -> datasets.Dataset:
        where = f"tokens cannot be cached in {datasets.config.HF_DATASETS_CACHE}"
        with explained(f"{source.option} {source.given}: {where}", OSError):
            try:
                return datasets.Dataset.from_generator(rows, fingerprint=key)
            except DatasetGenerationError as error:
                raise error.__cause__ from None

    documents = None
    with processes.agreed():
        if PartialState().is_main_process:
            documents = load()
    if documents is None:
        documents = load()
    return _tokens(documents.data)


def _tokens(table) -> Tokens:
    """What is in a table with a row for each document, of no ids for one without text."""
    ids = []
    spans = []
    chunks = zip(table.column("ids").chunks, table.column("digest").chunks, strict=True)
    for store, (documents, digests) in enumerate(chunks):
        ids.append(documents.flatten().to_numpy())
        lengths = documents.value_lengths().to_numpy()
        columns = [
            np.full(len(lengths), store),
            lengths.cumsum() - lengths,
            lengths,
            digests.to_numpy().view(np.uint64),
        ]
        spans.append(np.rec.fromarrays(columns, dtype=SPAN))
    every = np.concatenate(spans).view(np.recarray)
    return Tokens(ids, every[every.length > 0])


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
            parts += [digest(file).hex() for file in files]
    return hashlib.blake2b(json.dumps(parts).encode()).hexdigest()


def _rows(source: Source, tokenizer, field: str | None) -> Iterator[dict]:
    """A row for each document: its ``ids`` with the EOS, none without text, and a ``digest`` of them."""
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    is_any = False
    bar = tqdm(desc=f"Tokenising {Path(source.given).name}", unit=" tokens", unit_scale=True, delay=2)
    with bar:
        for ids in _ids_of_documents(source.documents(field), tokenizer):
            digest = int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little", signed=True)
            if len(ids):
                ids = np.append(ids, np.array(eos, ids.dtype))
                is_any = True
            yield {"ids": ids, "digest": digest}
            bar.update(len(ids))
    if not is_any:
        raise source.error("no text in it")


def _ids_of_documents(documents: Iterable[Iterable[str]], tokenizer) -> Iterator[np.ndarray]:
    """The ids of each document, without EOS; none if it has no text."""
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
    parts = []
    pieces = _pieces(documents)
    while batch := list(islice(pieces, BATCH)):
        texts = [text for text, _ in batch]
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no line about texts longer than the model's window
        )
        for (text, is_last), ids in zip(batch, encoded["input_ids"], strict=True):
            is_blank = is_last and not parts and not text.strip()
            parts.append(np.array([] if is_blank else ids, dtype))
            if is_last:
                yield np.concatenate(parts)
                parts = []


def _pieces(documents: Iterable[Iterable[str]]) -> Iterator[tuple[str, bool]]:
    """The pieces of documents, each with whether it is the last of its document."""
    for document in documents:
        for piece, following in pairwise(chain(cut(document), [None])):
            yield piece, following is None
