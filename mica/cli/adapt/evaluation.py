"""Perplexity of a causal language model, exact over any number of processes."""

import math
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Dataset, default_collate

from mica.errors import UsageError

IGNORED = -100  # the label of a token that is not predicted, as everywhere in transformers

# The fp32 copy of the logits is made in slices of this many numbers (128 MiB): training holds more than that.
_SLICE = 2**25


class Likelihood(NamedTuple):
    """How well a model predicts: ``nll`` nats are the negative log-likelihood of all ``tokens`` together."""

    nll: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        if not self.tokens:
            return math.nan
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss). Raises UsageError if that is not finite."""
        if not self.loss < 700:  # nats; NaN is not below it either
            raise UsageError(f"the held-out perplexity is not finite (exp {self.loss:g}): the run diverged")
        return math.exp(self.loss)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of blocks, each tensor (batch_size, sequence_length).

    The first label of a block becomes -100: nothing comes before it, so it is never predicted. Versions of
    transformers differ in whether they count it; this way all of them divide by the same number.
    """
    batch = default_collate(items)
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED
    return {**batch, "labels": labels}


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over all predicted tokens, fp64 on the CPU; logits (batch, length, vocabulary) of any dtype."""
    targets = pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # so that the logits are not copied
    scores = logits.flatten(0, 1)
    rows = max(1, _SLICE // scores.shape[-1])
    sums = []
    for some, theirs in zip(scores.split(rows), targets.split(rows), strict=True):
        sums.append(cross_entropy(some.float(), theirs, ignore_index=IGNORED, reduction="sum"))
    return torch.stack(sums).cpu().double().sum()


@torch.no_grad()
def likelihood(
    model: nn.Module,
    blocks: Dataset[dict[str, Tensor]],
    batch_size: int,
    device: torch.device | None = None,
) -> Likelihood:
    """Score ``blocks``: items with input_ids, labels and maybe position_ids, int64, (sequence_length,) each.

    A token counts if its label is not -100 and it is not the first of its block. The loss is taken in fp32
    whatever the dtype of the logits, and summed in fp64. Each process scores a share of the blocks and all
    return the same; all do the same number of forwards, as FSDP needs. ``device``: of the inputs, by default
    that of the first parameter.
    """
    state = PartialState()
    device = device or next(model.parameters()).device
    mine = range(state.process_index, len(blocks), state.num_processes)
    rounds = math.ceil(len(blocks) / (state.num_processes * batch_size))

    totals = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for turn in range(rounds):
        chosen = mine[turn * batch_size : (turn + 1) * batch_size]
        indices = chosen or [0]  # a process that has none left takes part in the forward all the same
        batch = collate([blocks[index] for index in indices])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        if chosen:
            totals += torch.stack([_nll(logits, labels), (labels != IGNORED).sum().cpu()])
    model.train(was_training)

    if state.num_processes > 1:
        totals = reduce(totals.to(state.device), "sum").cpu()
    return Likelihood(totals[0].item(), int(totals[1]))
