"""How much a run reads: what is said before it is what the Trainer and the run's record have after it."""

import itertools
from argparse import Namespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, RandomSampler

from mica.cli.adapt.amount import Amount

LENGTH = 32


def amount_of(blocks: int, batch_size: int, accumulation: int, processes: int = 1) -> Amount:
    args = Namespace(batch_size=batch_size, gradient_accumulation_steps=accumulation, sequence_length=LENGTH)
    return Amount(args, blocks, processes)


def rounds(amount: Amount) -> list[int]:
    """Blocks of each forward of an epoch, of all processes together, by what accelerate deals out."""
    shards = []
    for process in range(amount.processes):
        drawn = RandomSampler(range(amount.blocks))
        batches = BatchSampler(drawn, amount.args.batch_size, drop_last=amount.drops_the_rest)
        if amount.processes > 1:
            batches = BatchSamplerShard(batches, amount.processes, process)
        shards.append([len(batch) for batch in batches])
    return [sum(sizes) for sizes in zip(*shards, strict=True)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_tokens_of_every_step(processes):
    for blocks, size, accumulation in itertools.product((1, 2, 7, 10, 24), (1, 2, 7, 64), (1, 2, 4, 5)):
        amount = amount_of(blocks, size, accumulation, processes)
        read = rounds(amount)
        steps = [sum(read[at : at + accumulation]) for at in range(0, len(read), accumulation)]
        assert amount.epoch_steps == len(steps)
        after = [0, *itertools.accumulate(steps * 3)]
        assert [amount.tokens_after(step) for step in range(len(after))] == [LENGTH * read for read in after]


def test_epochs_are_tokens_over_those_of_all_blocks():
    amount = amount_of(10, 2, 4)  # eight blocks, then two
    assert amount.epochs(amount.tokens_after(100)) == 50
    assert amount_of(11, 2, 4).epochs(11 * LENGTH) == 1  # one is left out of each epoch
