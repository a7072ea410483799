"""What is held out of a text: chosen by content, never by order or luck."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mica.cli.adapt.packing import Spans
from mica.errors import UsageError


class Split(NamedTuple):
    """``how``: "documents", "ends of documents" or "end of the text", of which the held-out tokens are.

    ``dropped``: documents that are in neither part, because they are copies of held-out ones.
    """

    train: Spans
    held_out: Spans
    how: str
    dropped: int = 0


def split(documents: Spans, share: float, sequence_length: int, limit: int, option: str) -> Split:
    """Hold out ``share`` of the tokens, in (0, 1), or ``limit`` blocks if that is less, but at least one
    block.

    More than is measured is not held out, but trained on. Whole documents are held out if there are enough
    of them; else the end of each; else, where every one is shorter than a block, the end of all joined.
    What is held out of a document is left out of its copies too, so that it is never trained on.

    Raises UsageError, naming ``option``, if there are not one training and one held-out block.
    """
    for part in (_by_documents, _by_ends, _by_end):
        result = part(documents, share, sequence_length, limit)
        if result and min(result.train.num_tokens, result.held_out.num_tokens) >= sequence_length:
            return result
    _, first = np.unique(documents.digest, return_index=True)
    found, unique = documents.num_tokens, documents[first].num_tokens
    copies = "" if found == unique else f" ({unique:,} of them in different documents)"
    raise UsageError(
        f"{option}: {found:,} tokens found{copies}, {2 * sequence_length:,} needed: one training and one "
        f"held-out block of --sequence-length {sequence_length}"
    )


def _by_documents(documents: Spans, share: float, sequence_length: int, limit: int) -> Split | None:
    """Documents in the order of their digests. None of those that are longer than all that is wanted."""
    wanted = max(sequence_length, min(int(documents.num_tokens * share), limit * sequence_length))
    _, first = np.unique(documents.digest, return_index=True)
    first = first[documents.length[first] <= wanted]
    enough = np.searchsorted(documents.length[first].cumsum(), wanted) + 1
    if enough > len(first):
        return None
    held_out = documents[np.sort(first[:enough])]
    train = documents.without(held_out.digest)
    return Split(train, held_out, "documents", len(documents) - len(train) - len(held_out))


def _by_ends(documents: Spans, share: float, sequence_length: int, limit: int) -> Split | None:
    """The last blocks of each document, in proportion to its whole blocks."""
    _, first, copy_of = np.unique(documents.digest, return_index=True, return_inverse=True)
    is_first = np.zeros(len(documents), bool)
    is_first[first] = True
    whole = np.where(is_first, documents.length // sequence_length, 0)
    if not (total := int(whole.sum())):
        return None
    wanted = max(1, min(int(total * share), limit))
    ends = whole.cumsum()
    blocks = ends * wanted // total - (ends - whole) * wanted // total
    blocks = blocks[first][copy_of]
    train, held_out = documents.cut(documents.length - blocks * sequence_length)
    return Split(train[train.length > 0], held_out[is_first & (held_out.length > 0)], "ends of documents")


def _by_end(documents: Spans, share: float, sequence_length: int, limit: int) -> Split | None:
    """The last block of all documents joined, which each are shorter than that."""
    starts = documents.length.cumsum() - documents.length
    at = np.clip(documents.num_tokens - sequence_length - starts, 0, documents.length)
    train, held_out = documents.cut(at)
    held_out = held_out[held_out.length > 0]
    is_cut = (at > 0) & (at < documents.length)
    is_copy = np.isin(documents.digest, held_out.digest) & ~is_cut
    is_copy &= at > 0
    return Split(train[(at > 0) & ~is_copy], held_out, "end of the text", int(is_copy.sum()))
