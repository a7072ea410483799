"""Blocks of tokens for training, cut from documents in memory-mapped arrays; nothing is materialised."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from mica.cli.adapt.evaluation import IGNORED
from mica.cli.adapt.tokens import Tokens


@dataclass(frozen=True)
class Spans:
    """Stretches of tokens in the order in which they are joined: whole documents, or parts of them.

    Arrays of shape (num_spans,): ``store``, which of several `Tokens`, ``start``, where in its ids, and
    ``length``, int64; ``digest``, uint64, that of the whole document.
    """

    store: np.ndarray
    start: np.ndarray
    length: np.ndarray
    digest: np.ndarray

    @staticmethod
    def of(stores: list[Tokens]) -> Spans:
        """All documents of ``stores``."""
        lengths = [tokens.lengths for tokens in stores]
        return Spans(
            np.repeat(np.arange(len(stores)), [len(each) for each in lengths]),
            np.concatenate([each.cumsum() - each for each in lengths]),
            np.concatenate(lengths),
            np.concatenate([tokens.digests for tokens in stores]),
        )

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, chosen: np.ndarray) -> Spans:
        """Some of the spans, by a mask or by indices."""
        return Spans(self.store[chosen], self.start[chosen], self.length[chosen], self.digest[chosen])

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    def without(self, digests: np.ndarray) -> Spans:
        """Without the spans of documents with one of these digests."""
        return self[~np.isin(self.digest, digests)]

    def cut(self, at: np.ndarray) -> tuple[Spans, Spans]:
        """Each span's first ``at`` tokens, and the rest; spans of no token are left in."""
        rest = Spans(self.store, self.start + at, self.length - at, self.digest)
        return Spans(self.store, self.start, at, self.digest), rest


@dataclass
class Blocks(Dataset):
    """Block i: the tokens [i·L, (i+1)·L) of the joined spans, L = ``sequence_length``; the unfilled last is
    dropped.

    Items: ``input_ids`` and ``labels``, (L,) int64, the latter not shifted: the model does that. With
    ``packing`` "stream" the labels are the ids. With "documents" there are also ``position_ids``, which
    start from 0 at each document: transformers' models then attend within a document only, if they are
    given neither ``attention_mask`` nor cache (``use_cache=False``). The label of a document's first token
    is -100, because nothing before it is there to predict it from.
    """

    stores: list[Tokens]
    spans: Spans
    sequence_length: int
    packing: str
    ends: np.ndarray = field(
        init=False, repr=False
    )  # (num_spans,): where each span ends in the joined tokens

    def __post_init__(self):
        self.ends = self.spans.length.cumsum()

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.sequence_length if len(self.ends) else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin = int(index) % len(self) * self.sequence_length
        end = begin + self.sequence_length
        ids = np.empty(self.sequence_length, np.int64)
        positions = np.empty_like(ids)
        firsts = []  # where a document begins
        at, span = begin, int(np.searchsorted(self.ends, begin, side="right"))
        while at < end:
            skipped = at - (int(self.ends[span]) - int(self.spans.length[span]))
            size = min(int(self.ends[span]), end) - at
            source = int(self.spans.start[span]) + skipped
            ids[at - begin : at - begin + size] = self.stores[self.spans.store[span]].ids[
                source : source + size
            ]
            positions[at - begin : at - begin + size] = np.arange(size)
            if not skipped:
                firsts.append(at - begin)
            at, span = at + size, span + 1
        item = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}
        if self.packing == "documents":
            item["labels"][firsts] = IGNORED
            item["position_ids"] = torch.from_numpy(positions)
        return item


def spread(blocks: Dataset, limit: int) -> Dataset:
    """At most ``limit`` of ``blocks``, evenly spaced, so that every source keeps its share."""
    if len(blocks) <= limit:
        return blocks
    return Subset(blocks, np.linspace(0, len(blocks) - 1, limit).round().astype(np.int64).tolist())


def mix(parts: list[Blocks], weights: list[float], seed: int) -> Dataset:
    """An epoch of several sources, of which ``weights`` are the shares.

    Every block of every source is in it at least once, as with `datasets.interleave_datasets`'
    "all_exhausted": the source with the most blocks for its weight is there once, the others more often.
    What does not go up in whole rounds is drawn by ``seed``.
    """
    sizes = np.array([len(part) for part in parts])
    shares = np.array(weights, float)
    counts = np.maximum(sizes, np.rint(shares * (sizes / shares).max()).astype(np.int64))
    chosen, offset = [], 0
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        rounds, more = divmod(int(count), int(size))
        drawn = np.random.default_rng([seed, source]).permutation(size)[:more]
        chosen += [np.tile(np.arange(size), rounds) + offset, np.sort(drawn) + offset]
        offset += size
    return Subset(ConcatDataset(parts), np.concatenate(chosen))


@torch.no_grad()
def keeps_documents_apart(model: torch.nn.Module) -> bool:
    """Whether ``model`` attends within a document only when `Blocks` packs "documents": measured on it.

    The logits of a document are compared after two different ones, in one block: first as "documents" does,
    then, to see that the model reacts at all, as "stream" does. False as well for a model that does not
    take ``position_ids``. Training mode and the state of random numbers stay as they were.
    """
    size = 8
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3 * size, device=model.device).mul(vocabulary // (3 * size)).view(3, 1, size)
    blocks = [torch.cat([other, ids[2]], dim=1) for other in ids[:2]]
    positions = torch.arange(size, device=model.device).repeat(1, 2)

    def difference(**options) -> float:
        one, other = (model(input_ids=block, use_cache=False, **options).logits[:, size:] for block in blocks)
        return (one.float() - other.float()).abs().max().item()

    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            mixed = difference()
            apart = difference(position_ids=positions)
    except TypeError:  # an argument that its forward does not have
        return False
    finally:
        model.train(was_training)
    # Identical shapes and exact zeros of the softmax: equal to the last bits where documents are kept apart.
    return mixed > 0 and apart <= 1e-3 * mixed
