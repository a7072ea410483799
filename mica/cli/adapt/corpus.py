"""The data of a run: what is trained on, what is held out and never trained on, and what must be retained."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from mica.cli.adapt import sources
from mica.cli.adapt.amount import Amount
from mica.cli.adapt.packing import SPAN, Blocks, Split, mix, spans_of, split, spread, too_little
from mica.cli.adapt.tokens import Tokens, tokenize
from mica.errors import UsageError

DEAR = 2  # tokens a word


class Part(NamedTuple):
    """What one item of ``--text`` holds.

    ``skipped``: files of a folder that are not read, see `sources.Source`. ``tokens_per_word``: see `Tokens`.
    """

    name: str
    tokens: int
    documents: int
    empty: int
    skipped: int
    tokens_per_word: float


@dataclass(frozen=True)
class Corpus:
    """Datasets of blocks (see `mica.cli.adapt.packing.Blocks`) and what they are made of.

    ``retain``: None without ``--retain``. ``parts``: one for each ``--text``. ``dropped``: documents that
    are left out of the training because they are held out as well. ``held_out_by``: "--held-out-text" or
    `Split.how`. ``largest_token_id``: in any of the texts. ``cached``: nothing had to be tokenised.
    ``fingerprint``: a hash of all tokens of all blocks of training and held-out text and of their order;
    ``retain_fingerprint``: of ``retain``, or None.
    """

    train: Dataset
    held_out: Dataset
    retain: Dataset | None
    parts: tuple[Part, ...]
    dropped: int
    held_out_by: str
    largest_token_id: int
    cached: bool
    fingerprint: str
    retain_fingerprint: str | None
    sequence_length: int

    def amount(self, args: argparse.Namespace, processes: int = 1) -> Amount:
        """What a run reads of the training blocks."""
        return Amount.of(args, len(self.train), processes)

    def cost(self) -> str | None:
        """A note on the source that costs most tokens a word; None if that is at most `DEAR`."""
        dearest = max(self.parts, key=lambda part: part.tokens_per_word)
        if dearest.tokens_per_word <= DEAR:
            return None
        words = self.sequence_length / dearest.tokens_per_word
        costs = f"takes {dearest.tokens_per_word:.1f} tokens per word (split at spaces) with this tokenizer"
        return (
            f"--text {dearest.name} {costs}: a block holds about {words:,.0f} words. 1.3 to 1.5 is usual, "
            "more for code and scripts without spaces. --train-embeddings lets the model learn such tokens; "
            "the tokenizer stays as it is"
        )

    def describe(self, args: argparse.Namespace, num_processes: int = 1) -> str:
        """What the run trains on, for a terminal; more lines only for what is left out."""
        amount = self.amount(args, num_processes)
        lines = [self._describe_training(amount, args), self._describe_measured()]
        lines += self._describe_left_out(amount)
        return "\n".join(lines)

    def _describe_training(self, amount: Amount, args: argparse.Namespace) -> str:
        tokens = _count(sum(part.tokens for part in self.parts), "token")
        documents = _count(sum(part.documents for part in self.parts), "document")
        if self.cached:
            documents += " (already tokenised)"
        blocks = _count(len(self.train), "training block")

        epochs = amount.epochs(amount.tokens_after(amount.steps(args)))
        share = f"{100 * epochs:.3g} % of an epoch"
        if epochs > 1:
            share = f"{epochs:.3g} epochs"
        return f"{tokens} in {documents}, {blocks} of {self.sequence_length}; this run sees {share}"

    def _describe_measured(self) -> str:
        text = f"held out: {_count(len(self.held_out), 'block')} ({self.held_out_by})"
        if self.retain is not None:
            text += f"; to be retained: {_count(len(self.retain), 'block')}"
        return text

    def _describe_left_out(self, amount: Amount) -> list[str]:
        left_out = [
            ("training", self.dropped, "copy", "of held-out documents"),
            ("each epoch", amount.left_out, "block", "short of a full batch, different ones each time"),
        ]
        for part in self.parts:
            left_out.append((part.name, part.empty, "document", "without text"))
            left_out.append((part.name, part.skipped, "file", "of other kinds"))

        lines = []
        for place, number, noun, what in left_out:
            if number:
                lines.append(f"left out of {place}: {_count(number, noun)} {what}")
        return lines


def _count(number: int, noun: str) -> str:
    """The number with its noun: "1 block", "1,234 copies"."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}s"


def check(args: argparse.Namespace, output: Path | None = None) -> list[list[sources.Source]]:
    """The sources of --text, --held-out-text and --retain, by their names alone: nothing is read.

    ``output``: the folder that the run writes to; default: ``args.output``. Files in it are not read.

    Raises UsageError for what the names show to be wrong.
    """
    output = output or args.output
    config = args.dataset_config
    given = {"--text": args.text, "--held-out-text": args.held_out_text, "--retain": args.retain}
    found = []
    for option, items in given.items():
        found.append(sources.find(option, items or [], config, output))

    is_any_on_hub = any(source.is_on_hub for source in chain.from_iterable(found))
    if config is not None and not is_any_on_hub:
        raise UsageError(f"--dataset-config {config}: no source is a dataset on the Hub")
    return found


def gather(args: argparse.Namespace, tokenizer, output: Path | None = None) -> Corpus:
    """Read, tokenise and pack all texts of a run; every process of it calls this.

    Held out is ``--held-out-text``, of which no document is trained on, or what `split` takes: from each
    source if there are weights, else from all joined. ``eval_blocks`` blocks of it are measured, evenly
    spread, and as many of ``--retain``. ``output``: see `check`.

    Raises UsageError for what cannot be read, and if there is not one training and one held-out block.
    """
    found = check(args, output)
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions as well
    text, held_out, retain = (_tokens_of(group, tokenizer, args) for group in found)
    every = [*text, *held_out, *retain]

    groups = _grouped(text, args)
    splits = _splits(groups, held_out, args)
    held_out_blocks = _held_out_blocks(groups, splits, held_out, args)
    by_group, dropped = _training_blocks(groups, splits, held_out, args)
    train = by_group[0]
    if args.text_weights is not None:
        train = mix(by_group, args.text_weights, args.seed)

    retained = None
    retain_fingerprint = None
    if retain:
        retained = _measured("--retain", retain, args)
        retain_fingerprint = _fingerprint([spans_of(retain)], args)

    fingerprinted = [blocks.spans for blocks in by_group] + [part.held_out for part in splits]
    if held_out:
        fingerprinted.append(spans_of(held_out))
    return Corpus(
        train=train,
        held_out=held_out_blocks,
        retain=retained,
        parts=tuple(_part(source, store) for source, store in zip(found[0], text, strict=True)),
        dropped=dropped,
        held_out_by=" and ".join(dict.fromkeys(part.how for part in splits)),
        largest_token_id=max(store.largest for store in every),
        cached=all(store.cached for store in every),
        fingerprint=_fingerprint(fingerprinted, args),
        retain_fingerprint=retain_fingerprint,
        sequence_length=args.sequence_length,
    )


def _tokens_of(group: list[sources.Source], tokenizer, args: argparse.Namespace) -> list[Tokens]:
    if not group:
        return []
    return tokenize(group, tokenizer, args.text_field, args.workers)


def _part(source: sources.Source, store: Tokens) -> Part:
    return Part(
        name=source.given,
        tokens=int(store.lengths.sum()),
        documents=len(store.lengths),
        empty=store.empty,
        skipped=source.skipped,
        tokens_per_word=store.tokens_per_word,
    )


class _Group(NamedTuple):
    """Sources whose documents are joined before some are held out. ``name``: for errors."""

    name: str
    stores: list[Tokens]


def _grouped(text: list[Tokens], args: argparse.Namespace) -> list[_Group]:
    """Each source alone if there are weights, else one group of all."""
    if args.text_weights is None:
        return [_Group("--text", text)]
    return [_Group(f"--text {name}", [store]) for name, store in zip(args.text, text, strict=True)]


def _splits(groups: list[_Group], held_out: list[Tokens], args: argparse.Namespace) -> list[Split]:
    """Divide each group into what is trained on and what is held out: nothing, if ``held_out`` is not empty.

    Raises UsageError if a group is too short for one block of each.
    """
    if held_out:
        nothing = spans_of(held_out)[:0]
        return [Split(spans_of(group.stores), nothing, "--held-out-text") for group in groups]

    splits = []
    for group, limit in zip(groups, _limits(args), strict=True):
        documents = spans_of(group.stores)
        splits.append(split(documents, args.held_out, args.sequence_length, limit, group.name))
    return splits


def _limits(args: argparse.Namespace) -> list[int]:
    """How many blocks each group holds out at most: its share of ``eval_blocks``, but at least one."""
    shares = np.array(args.text_weights or [1.0], dtype=np.float64)
    shares /= shares.max()  # their sum must not overflow
    blocks = np.rint(args.eval_blocks * shares / shares.sum())
    return np.maximum(1, blocks).astype(int).tolist()


def _held_out_blocks(
    groups: list[_Group], splits: list[Split], held_out: list[Tokens], args: argparse.Namespace
) -> Dataset:
    """``eval_blocks`` blocks of ``held_out``, or if that is empty of what the groups hold out.

    Raises UsageError if ``held_out`` is shorter than a block.
    """
    if held_out:
        return _measured("--held-out-text", held_out, args)
    parts = []
    for group, part in zip(groups, splits, strict=True):
        parts.append(_blocks(group.stores, part.held_out, args))
    return spread(ConcatDataset(parts), args.eval_blocks)


def _training_blocks(
    groups: list[_Group], splits: list[Split], held_out: list[Tokens], args: argparse.Namespace
) -> tuple[list[Blocks], int]:
    """The training blocks of each group, and how many documents are left out as copies of held-out ones.

    Raises UsageError if a group has not one block left.
    """
    train = []
    dropped = 0
    for index, (group, part) in enumerate(zip(groups, splits, strict=True)):
        # `split` has seen to this group's own copies.
        others = splits[:index] + splits[index + 1 :]
        held_out_elsewhere = [other.held_out.digest for other in others]
        held_out_elsewhere += [store.digests for store in held_out]
        digests = np.concatenate(held_out_elsewhere or [[]])
        kept = part.train[~np.isin(part.train.digest, digests)]
        dropped += part.dropped + len(part.train) - len(kept)

        tokens = kept.length.sum()
        if tokens < args.sequence_length:
            rest = f"{tokens:,} tokens are not held out"
            raise too_little(group.name, rest, args.sequence_length, "training")
        train.append(_blocks(group.stores, kept, args))
    return train, dropped


def _blocks(stores: list[Tokens], spans: np.recarray, args: argparse.Namespace) -> Blocks:
    return Blocks(stores, spans, args.sequence_length, args.packing)


def _measured(option: str, stores: list[Tokens], args: argparse.Namespace) -> Dataset:
    """Blocks of a text that is only measured. Raises UsageError if it is shorter than one."""
    blocks = _blocks(stores, spans_of(stores), args)
    if not len(blocks):
        raise too_little(option, f"{blocks.spans.length.sum():,} tokens found", args.sequence_length)
    return spread(blocks, args.eval_blocks)


def _fingerprint(every: list[np.recarray], args: argparse.Namespace) -> str:
    """A hash of the tokens in ``every`` array of spans, in order, and of how they are packed and mixed."""
    mixing = None
    if args.text_weights is not None:
        mixing = [*args.text_weights, args.seed]
    packing = json.dumps([args.sequence_length, args.packing, mixing])
    total = hashlib.blake2b(packing.encode(), digest_size=16)
    for spans in every:
        for column in SPAN.names:
            total.update(np.ascontiguousarray(spans[column]))
    return total.hexdigest()
