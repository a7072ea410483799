"""The data of a run: what is trained on, what is held out and never trained on, and what must be retained."""

import hashlib
import json
import logging
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import datasets
import numpy as np
from torch.utils.data import Dataset

from mica.cli.adapt import sources
from mica.cli.adapt.amount import Amount
from mica.cli.adapt.config import Settings
from mica.cli.adapt.packing import Blocks, Split, split, spread, suit_packing, too_little
from mica.cli.adapt.tokens import Tokens, joined, tokenize
from mica.errors import UsageError


class Part(NamedTuple):
    """What one item of ``--text`` holds.

    ``name``: the item as it was given. ``skipped``: how many files of a folder are not read, see
    `sources.Source`.
    """

    name: str
    tokens: int
    documents: int
    skipped: int


@dataclass(frozen=True)
class Corpus:
    """The blocks of a run (see `mica.cli.adapt.packing.Blocks`), and what they are made of.

    ``retain`` is None without ``--retain``. ``parts`` has one entry for each ``--text``. ``dropped``: how
    many documents are left out of the training because they are held out as well. ``held_out_by``:
    "--held-out-text" or `Split.how`. ``largest_token_id``: the largest one in any of the texts.
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
    fingerprint: str
    retain_fingerprint: str | None
    sequence_length: int

    def amount(self, args: Namespace, processes: int = 1) -> Amount:
        """What a run reads of the training blocks."""
        return Amount(args, len(self.train), processes)

    def describe(self) -> str:
        """What the run trains on, for a terminal; more lines only for what is left out."""
        tokens = sum(part.tokens for part in self.parts)
        documents = sum(part.documents for part in self.parts)
        blocks = f"blocks of {self.sequence_length}: {len(self.train):,} for training"
        blocks += f", {len(self.held_out):,} held out ({self.held_out_by})"
        if self.retain is not None:
            blocks += f", {len(self.retain):,} to be retained"
        lines = [f"tokens: {tokens:,}, documents: {documents:,}", blocks]
        if self.dropped:
            lines.append(f"left out of training, as copies of held-out documents: {self.dropped:,}")
        for part in self.parts:
            if part.skipped:
                lines.append(f"left out of {part.name}, files of other kinds: {part.skipped:,}")
        return "\n".join(lines)


def check(args: Namespace) -> list[list[sources.Source]]:
    """The sources of --text, --held-out-text and --retain, by their names alone: nothing is read.

    Files in ``args.output`` are not among them.

    Raises UsageError for what the names show to be wrong.
    """
    config = args.dataset_config
    given = {"--text": args.text, "--held-out-text": args.held_out_text, "--retain": args.retain}
    found = [sources.find(option, items or [], config, args.output) for option, items in given.items()]

    is_any_on_hub = any(source.is_on_hub for source in chain.from_iterable(found))
    if config is not None and not is_any_on_hub:
        raise UsageError(f"--dataset-config {config}: no source is a dataset on the Hub")
    return found


def gather(args: Namespace, tokenizer) -> Corpus:
    """Read, tokenise and pack all texts of a run; every process of it calls this.

    Held out is ``--held-out-text``, of which no document is trained on, or what `split` takes of all texts
    joined. ``eval_blocks`` blocks of it are measured, evenly spread, and as many of ``--retain``.

    Raises UsageError for what cannot be read, and if there is not one training and one held-out block.
    """
    found = check(args)
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions as well
    datasets.disable_progress_bars()  # tokenising has one of its own
    by_source = [[tokenize(source, tokenizer, args.text_field) for source in group] for group in found]
    text, held_out, retain = (joined(parts) if parts else None for parts in by_source)

    parts = _split(text, held_out, args)
    retained = None
    retain_fingerprint = None
    if retain is not None:
        retained = _measured("--retain", retain, args)
        retain_fingerprint = _fingerprint([retain.spans], args)
    every = [tokens for tokens in (text, held_out, retain) if tokens is not None]
    return Corpus(
        train=_blocks(text, parts.train, args),
        held_out=_measured("--held-out-text", replace(held_out or text, spans=parts.held_out), args),
        retain=retained,
        parts=tuple(
            Part(source.given, int(tokens.spans.length.sum()), len(tokens.spans), source.skipped)
            for source, tokens in zip(found[0], by_source[0], strict=True)
        ),
        dropped=parts.dropped,
        held_out_by=parts.how,
        largest_token_id=max(int(ids.max(initial=0)) for tokens in every for ids in tokens.ids),
        fingerprint=_fingerprint([parts.train, parts.held_out], args),
        retain_fingerprint=retain_fingerprint,
        sequence_length=args.sequence_length,
    )


def suited(data: Corpus, settings: Settings, model, tokenizer) -> tuple[Corpus, str | None]:
    """``data`` as ``model`` takes it: in stream packing, with a note, if it cannot keep documents apart.

    Raises UsageError if ``--packing documents`` was given: attention across documents is another training.
    """
    note = suit_packing(settings, model)
    if note is not None:
        data = gather(settings.args, tokenizer)
    return data, note


def _split(text: Tokens, held_out: Tokens | None, args: Namespace) -> Split:
    """Divide the documents of ``text``; if there is ``held_out``, into those and what is no copy of them.

    Raises UsageError if there is too little text for one block of each.
    """
    if held_out is None:
        return split(text.spans, args.held_out, args.sequence_length, args.eval_blocks, "--text")
    train = text.spans[~np.isin(text.spans.digest, held_out.spans.digest)]
    tokens = train.length.sum()
    if tokens < args.sequence_length:
        raise too_little(
            "--text", f"{tokens:,} tokens are not held out", "one training block", args.sequence_length
        )
    return Split(train, held_out.spans, "--held-out-text", len(text.spans) - len(train))


def _blocks(tokens: Tokens, spans: np.recarray, args: Namespace) -> Blocks:
    return Blocks(tokens.ids, spans, args.sequence_length, args.packing)


def _measured(option: str, tokens: Tokens, args: Namespace) -> Dataset:
    """Blocks of a text that is only measured. Raises UsageError if it is shorter than one."""
    blocks = _blocks(tokens, tokens.spans, args)
    if not len(blocks):
        raise too_little(
            option, f"{tokens.spans.length.sum():,} tokens found", "one block", args.sequence_length
        )
    return spread(blocks, args.eval_blocks)


def _fingerprint(every: list[np.recarray], args: Namespace) -> str:
    """A hash of the tokens in ``every`` array of spans, in order, and of how they are packed."""
    packing = json.dumps([args.sequence_length, args.packing])
    total = hashlib.blake2b(packing.encode(), digest_size=16)
    for spans in every:
        for column in ("digest", "length"):
            total.update(np.ascontiguousarray(spans[column]))
    return total.hexdigest()
