"""The data of a run: what is trained on, what is held out and never trained on, and what must be retained."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from dataclasses import dataclass
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
    """What one item of ``--text`` holds; ``skipped``: files of a folder that are of no kind that is read.

    ``tokens_per_word``: see `Tokens`.
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
    `Split.how`. ``largest_token_id``: of all texts. ``cached``: nothing had to be tokenised.
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
        epochs = amount.epochs(amount.tokens_after(amount.steps(args)))
        share = f"{epochs:.3g} epochs" if epochs > 1 else f"{100 * epochs:.3g} % of an epoch"
        blocks = f"{_count(len(self.train), 'training block')} of {self.sequence_length}"
        tokens = _count(sum(part.tokens for part in self.parts), "token")
        documents = _count(sum(part.documents for part in self.parts), "document")
        known = " (tokenised before)" if self.cached else ""
        lines = [f"{tokens} in {documents}{known}, {blocks}; this run sees {share}"]
        lines += [f"held out: {_count(len(self.held_out), 'block')} ({self.held_out_by})"]
        if self.retain is not None:
            lines[-1] += f"; to be retained: {_count(len(self.retain), 'block')}"
        out = [
            ("training", self.dropped, "copy", "of held-out documents"),
            ("each epoch", amount.left_out, "block", "short of a full batch, others each time"),
        ]
        for part in self.parts:
            out += [(part.name, part.empty, "document", "without text")]
            out += [(part.name, part.skipped, "file", "of other kinds")]
        lines += [f"left out of {of}: {_count(count, noun)} {what}" for of, count, noun, what in out if count]
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun}"


def check(args: argparse.Namespace, output: Path | None = None) -> list[list[sources.Source]]:
    """The sources of --text, --held-out-text and --retain, by their names alone: nothing is read.

    ``output``: the folder that the run writes to; default: ``args.output``. What is in it is no text.

    Raises UsageError for what that shows to be wrong.
    """
    given = {"--text": args.text, "--held-out-text": args.held_out_text, "--retain": args.retain}
    output = output or args.output
    found = [
        sources.find(option, items or [], args.dataset_config, output) for option, items in given.items()
    ]
    if args.dataset_config is not None and not any(source.is_on_hub for group in found for source in group):
        raise UsageError(f"--dataset-config {args.dataset_config}: no source is a dataset on the Hub")
    return found


def gather(args: argparse.Namespace, tokenizer, output: Path | None = None) -> Corpus:
    """Read, tokenise and pack all texts of a run; every process of it calls this.

    Held out is ``--held-out-text``, of which no document is trained on, or what `split` takes: of each
    source if there are weights, else of all joined. ``eval_blocks`` blocks of it are measured, evenly
    spread, and as many of ``--retain``. ``output``: see `check`.

    Raises UsageError for what cannot be read, and if there is not one training and one held-out block.
    """
    found = check(args, output)
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions as well
    text, held_out, retain = (
        tokenize(each, tokenizer, args.text_field, args.workers) if each else [] for each in found
    )
    every, length, weights = [*text, *held_out, *retain], args.sequence_length, args.text_weights
    groups = [text] if weights is None else [[store] for store in text]
    names = ["--text"] if weights is None else [f"--text {name}" for name in args.text]
    if held_out:
        splits = [Split(spans_of(group), spans_of(held_out)[:0], "--held-out-text") for group in groups]
        held_out_blocks = _measured("--held-out-text", held_out, args)
    else:
        shares = np.array(weights or [1.0], dtype=np.float64)
        shares /= shares.max()  # their sum must not overflow
        limits = np.maximum(1, np.rint(args.eval_blocks * shares / shares.sum())).astype(int).tolist()
        splits = [
            split(spans_of(group), args.held_out, length, limit, name)
            for group, name, limit in zip(groups, names, limits, strict=True)
        ]
        parts = [_blocks(*each, args) for each in zip(groups, (s.held_out for s in splits), strict=True)]
        held_out_blocks = spread(ConcatDataset(parts), args.eval_blocks)
    train, dropped = [], 0
    for index, part in enumerate(splits):
        # What another source holds out, or a set of its own; `split` has seen to this source's own copies.
        others = [other.held_out.digest for other in splits[:index] + splits[index + 1 :]]
        others += [store.digests for store in held_out]
        kept = part.train[~np.isin(part.train.digest, np.concatenate(others or [[]]))]
        dropped += part.dropped + len(part.train) - len(kept)
        if kept.length.sum() < length:
            rest = f"{kept.length.sum():,} tokens are not held out"
            raise too_little(names[index], rest, length, "training")
        train.append(_blocks(groups[index], kept, args))

    held_out_spans = [part.held_out for part in splits] + ([spans_of(held_out)] if held_out else [])
    return Corpus(
        train=train[0] if weights is None else mix(train, weights, args.seed),
        held_out=held_out_blocks,
        retain=_measured("--retain", retain, args) if retain else None,
        parts=tuple(
            Part(
                *(source.given, int(store.lengths.sum()), len(store.lengths), store.empty, source.skipped),
                store.tokens_per_word,
            )
            for source, store in zip(found[0], text, strict=True)
        ),
        dropped=dropped,
        held_out_by=" and ".join(dict.fromkeys(part.how for part in splits)),
        largest_token_id=max(store.largest for store in every),
        cached=all(store.cached for store in every),
        fingerprint=_fingerprint([*(blocks.spans for blocks in train), *held_out_spans], args),
        retain_fingerprint=_fingerprint([spans_of(retain)], args) if retain else None,
        sequence_length=length,
    )


def _blocks(stores: list[Tokens], spans: np.recarray, args: argparse.Namespace) -> Blocks:
    return Blocks(stores, spans, args.sequence_length, args.packing)


def _measured(option: str, stores: list[Tokens], args: argparse.Namespace) -> Dataset:
    """Blocks of a text that is only measured. Raises UsageError if it is shorter than one."""
    blocks = _blocks(stores, spans_of(stores), args)
    if not len(blocks):
        raise too_little(option, f"{blocks.spans.length.sum():,} tokens found", args.sequence_length)
    return spread(blocks, args.eval_blocks)


def _fingerprint(every: list[np.recarray], args: argparse.Namespace) -> str:
    mixing = None if args.text_weights is None else [*args.text_weights, args.seed]
    packing = json.dumps([args.sequence_length, args.packing, mixing])
    total = hashlib.blake2b(packing.encode(), digest_size=16)
    for spans in every:
        for column in SPAN.names:
            total.update(np.ascontiguousarray(spans[column]))
    return total.hexdigest()
