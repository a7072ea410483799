"""Passages that an adapter was not trained on, and what its base and the adapted model make of them.

Which ones is decided by a rule, before anything is computed, so that none is chosen because it looks good.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mica.cli.adapt import config, corpus
from mica.cli.adapt.evaluation import IGNORED
from mica.cli.adapt.packing import documents_of, spread

CONTEXT = 128  # tokens that a model sees at most
NEXT = 24  # tokens whose likelihood is measured, and that a model writes itself


class Passage(NamedTuple):
    """Token ids, (length,) int64: ``context`` is what a model sees, ``following`` how the text goes on."""

    context: torch.Tensor
    following: torch.Tensor


def held_out(folder: Path, tokenizer) -> list[torch.Tensor]:
    """The token ids of each document that the run of `mica adapt` in ``folder`` has held out, in order.

    They are found as the run found them: by its settings in run.yaml, and by its own code.
    """
    settings = config.resolve(argparse.Namespace(output=folder, resume=True))
    return documents_of(corpus.gather(settings.args, tokenizer).held_out)


def choose(documents: Sequence[torch.Tensor], number: int) -> list[Passage]:
    """From at most ``number`` of ``documents``, evenly spaced, what is before and after the middle.

    Documents too short to have `NEXT` tokens on both sides do not count.
    """
    long_enough = [ids for ids in documents if len(ids) > 2 * NEXT]
    passages = []
    for ids in spread(long_enough, number):
        middle = len(ids) // 2
        context = ids[max(0, middle - CONTEXT) : middle]
        passages.append(Passage(context, ids[middle : middle + NEXT]))
    return passages


@torch.no_grad()
def read(model, passage: Passage) -> tuple[float, torch.Tensor]:
    """What ``model``, a causal language model in evaluation mode, makes of ``passage``.

    Returns the mean log-likelihood of the tokens of ``following``, in nats per token, and what the model
    itself writes after ``context``, greedily: (at most `NEXT`,) token ids.
    """
    ids = torch.cat(passage)[None].to(model.device)
    seen = ids[:, : len(passage.context)]
    labels = ids.clone()
    labels[:, : seen.shape[1]] = IGNORED
    loss = model(input_ids=ids, labels=labels).loss
    written = model.generate(seen, attention_mask=torch.ones_like(seen), max_new_tokens=NEXT, do_sample=False)
    return -loss.item(), written[0, seen.shape[1] :].cpu()
