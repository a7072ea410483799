"""Blocks of tokens, cut from documents in memory-mapped arrays, and the choice of what is held out.

The choice is by content, never by order or luck. Nothing is materialised.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from mica.cli.adapt.config import Settings
from mica.cli.adapt.evaluation import IGNORED
from mica.errors import UsageError


@dataclass
class Blocks(Dataset):
    """Blocks of ``sequence_length`` = L tokens: block i has the tokens [i·L, (i+1)·L) of the joined spans.

    ``ids`` and ``spans``: as in `mica.cli.adapt.tokens.Tokens`. An unfilled last block is dropped.

    Items: ``input_ids`` and ``labels``, (L,) int64, the latter not shifted: the model does that. With
    ``packing`` "stream" the labels are the ids. With "documents" there are also ``position_ids``, which
    start from 0 at each document: transformers' models then attend within a document only, if they are
    given neither ``attention_mask`` nor cache (``use_cache=False``). The label of a document's first token
    is -100, because nothing before it is there to predict it from.
    """

    ids: list[np.ndarray]
    spans: np.recarray
    sequence_length: int
    packing: str

    def __post_init__(self):
        self.ends = self.spans.length.cumsum()  # where each span ends in the joined tokens

    def __len__(self) -> int:
        if not len(self.ends):
            return 0
        return int(self.ends[-1]) // self.sequence_length

    def place(self, index: int) -> tuple[int, int, int, int]:
        """Where a block begins and ends in the joined tokens, and the first and last of its spans."""
        begin = index * self.sequence_length
        end = begin + self.sequence_length
        return begin, end, *np.searchsorted(self.ends, [begin, end - 1], side="right")

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        index = int(index) % len(self)
        begin, end, first, last = self.place(index)
        parts = []  # tokens of each document
        starts = []  # where in the block documents begin
        for span in range(first, last + 1):
            store, start, length, _ = self.spans[span].item()
            offset = int(self.ends[span]) - length  # of the span in the joined tokens
            low = max(begin, offset)
            high = min(end, offset + length)
            parts.append(self.ids[store][start + low - offset : start + high - offset])
            if low == offset:
                starts.append(low - begin)

        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        item = {"input_ids": ids, "labels": ids.clone()}
        if self.packing == "documents":
            item["labels"][starts] = IGNORED
            item["position_ids"] = torch.cat([torch.arange(len(part)) for part in parts])
        return item


def document_of(blocks: Dataset, index: int) -> int:
    """The digest of the document that most tokens of a block are from: of `Blocks`, or `spread`."""
    if isinstance(blocks, Subset):
        return document_of(blocks.dataset, blocks.indices[index])
    begin, end, first, last = blocks.place(index)
    spans = blocks.spans[first : last + 1]
    ends = blocks.ends[first : last + 1]
    shares = np.minimum(ends, end) - np.maximum(ends - spans.length, begin)
    return int(spans.digest[np.argmax(shares)])


def spread(blocks: Dataset, limit: int) -> Dataset:
    """At most ``limit`` of ``blocks``, evenly spaced, so that every source keeps its share."""
    if len(blocks) <= limit:
        return blocks
    indices = np.linspace(0, len(blocks) - 1, limit).round().astype(np.int64)
    return Subset(blocks, indices.tolist())


class Split(NamedTuple):
    """The spans that are trained on, and those that are held out.

    ``how`` says what the held-out spans are: "documents" or "ends of documents".
    ``dropped``: how many documents are in neither part, because they are copies of held-out ones.
    """

    train: np.recarray
    held_out: np.recarray
    how: str
    dropped: int = 0


def split(documents: np.recarray, share: float, sequence_length: int, limit: int, option: str) -> Split:
    """Hold out ``share`` of the tokens, in (0, 1), but at most ``limit`` blocks and at least one.

    More than is measured is not held out, but trained on. Whole documents are held out if there are enough
    of them; else the end of each that has a whole block. What is held out of a document is left out of its
    copies too, so that it is never trained on.

    Raises UsageError, naming ``option``, if there are not one training and one held-out block.
    """
    for method in (_by_documents, _by_ends):
        result = method(documents, share, sequence_length, limit)
        if result is None:
            continue
        shorter = min(result.train.length.sum(), result.held_out.length.sum())
        if shorter >= sequence_length:
            return result

    _, first = np.unique(documents.digest, return_index=True)
    raise too_little(
        option,
        f"{documents.length[first].sum():,} tokens found, copies not counted",
        "one training and one held-out block",
        sequence_length,
    )


def too_little(option: str, what: str, blocks: str, sequence_length: int) -> UsageError:
    """The error for a text that is too short for these ``blocks``."""
    return UsageError(
        f"{option}: {what}, too little for {blocks} of --sequence-length {sequence_length}; "
        "more text or a smaller --sequence-length helps"
    )


def _by_documents(documents: np.recarray, share: float, sequence_length: int, limit: int) -> Split | None:
    """Hold out whole documents, in the order of their digests, but none longer than all that is wanted.

    None if they are not enough.
    """
    total = int(documents.length.sum())
    wanted = max(sequence_length, min(int(total * share), limit * sequence_length))
    _, first = np.unique(documents.digest, return_index=True)  # of each set of copies
    first = first[documents.length[first] <= wanted]
    enough = np.searchsorted(documents.length[first].cumsum(), wanted) + 1
    if enough > len(first):
        return None
    held_out = documents[np.sort(first[:enough])]
    train = documents[~np.isin(documents.digest, held_out.digest)]
    dropped = len(documents) - len(train) - len(held_out)
    return Split(train, held_out, "documents", dropped)


def _by_ends(documents: np.recarray, share: float, sequence_length: int, limit: int) -> Split | None:
    """Hold out the last blocks of each document, in proportion to its whole blocks; None if none has any."""
    _, first, copy_of = np.unique(documents.digest, return_index=True, return_inverse=True)
    is_first = np.zeros(len(documents), bool)
    is_first[first] = True
    whole = np.where(is_first, documents.length // sequence_length, 0)
    total = int(whole.sum())
    if total == 0:
        return None

    wanted = max(1, min(int(total * share), limit))
    ends = whole.cumsum()
    blocks = ends * wanted // total - (ends - whole) * wanted // total
    blocks = blocks[first][copy_of]  # copies lose as much as the first of them
    at = documents.length - blocks * sequence_length
    train = documents.copy()
    train.length = at
    held_out = documents.copy()
    held_out.start += at
    held_out.length -= at
    is_held_out = is_first & (held_out.length > 0)
    return Split(train[at > 0], held_out[is_held_out], "ends of documents")


def suit_packing(settings: Settings, model: torch.nn.Module) -> str | None:
    """Change the packing to "stream" if ``model`` cannot keep documents apart; return a line that says so.

    Raises UsageError if the option was given: attention across documents is another training.
    """
    if settings.args.packing == "stream" or keeps_documents_apart(model):
        return None
    reason = f"the attention of {type(model).__name__} does not stay within a document of a block"
    if "packing" in settings.given:
        raise UsageError(f"--packing documents: {reason}; --packing stream lets it cross them")
    settings.args.packing = "stream"
    return f"packing is stream: {reason}"


@torch.no_grad()
def keeps_documents_apart(model: torch.nn.Module) -> bool:
    """Whether ``model`` attends within a document only when `Blocks` packs "documents": measured on it.

    In one block, the logits of a document are compared after two different ones: packed as "stream", to see
    that the model reacts at all, and as "documents". False as well for a model that does not take
    ``position_ids``. Training mode and the state of random numbers stay as they were.
    """
    size = 8
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3 * size, device=model.device).mul(vocabulary // (3 * size)).view(3, 1, size)
    first, second, last = ids
    blocks = [torch.cat([first, last], dim=1), torch.cat([second, last], dim=1)]
    positions = torch.arange(size, device=model.device).repeat(1, 2)

    def difference(**options) -> float:
        one, other = (model(input_ids=block, use_cache=False, **options).logits[:, size:] for block in blocks)
        return (one.float() - other.float()).abs().max().item()

    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            mixed = difference()
            apart = difference(position_ids=positions)
    except TypeError:  # an argument that its forward does not have
        return False
    finally:
        model.train(was_training)
    # Identical shapes and exact zeros of the softmax: equal to the last bits where documents are kept apart.
    return mixed > 0 and apart <= 1e-3 * mixed
