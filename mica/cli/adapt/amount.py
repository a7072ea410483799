"""How much a run reads, and how long what is left takes: every such number that is shown comes from here.

The blocks of an epoch are dealt to the processes in batches; a last round that does not reach all processes
is left out. An optimiser step takes ``accumulation`` rounds, the last step of an epoch those that remain.
"""

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """What the Trainer reads of ``blocks`` training blocks of ``sequence_length`` tokens.

    ``batch_size``: blocks per process and forward. ``accumulation``: forwards per step. ``processes``: their
    number.
    """

    blocks: int
    sequence_length: int
    batch_size: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, args: argparse.Namespace, blocks: int, processes: int) -> "Amount":
        """By the options of a run."""
        return cls(
            blocks=blocks,
            sequence_length=args.sequence_length,
            batch_size=args.batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=processes,
        )

    @property
    def drops_the_rest(self) -> bool:
        """Whether blocks that do not fill a round are left out: yes, unless there is no full round."""
        return self.blocks >= self.batch_size * self.processes

    @property
    def round_blocks(self) -> int:
        """Blocks that all processes together read in a forward."""
        if self.processes == 1:
            return min(self.batch_size, self.blocks)
        return self.batch_size * self.processes  # fewer are filled up with copies

    @property
    def epoch_rounds(self) -> int:
        """Forwards of each process in an epoch."""
        return self.blocks // self.round_blocks or 1

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps in an epoch."""
        return math.ceil(self.epoch_rounds / self.accumulation)

    @property
    def left_out(self) -> int:
        """Blocks that an epoch does not read: different ones in each, by chance."""
        return max(0, self.blocks - self.epoch_rounds * self.round_blocks)

    def steps(self, args: argparse.Namespace) -> int:
        """Optimiser steps of a run, by ``args.steps`` or ``args.epochs``, as the Trainer rounds them up."""
        if args.steps is not None:
            return args.steps
        return math.ceil(args.epochs * self.epoch_steps)

    def blocks_after(self, step: int) -> int:
        """Blocks that were read by the end of ``step``; one that was read twice counts twice."""
        epochs, more = divmod(step, self.epoch_steps)
        rounds = epochs * self.epoch_rounds + more * self.accumulation
        return rounds * self.round_blocks

    def tokens_after(self, step: int) -> int:
        """Tokens that were read by the end of ``step``: the Trainer's ``num_input_tokens_seen``."""
        return self.blocks_after(step) * self.sequence_length

    def epochs(self, tokens: int) -> float:
        """How often ``tokens`` are all training blocks, on average."""
        return tokens / (self.sequence_length * self.blocks)


def measurements(first: int, last: int, eval_steps: int | None) -> int:
    """How many measurements of perplexity come after that of step ``first``, up to that of step ``last``.

    Every ``eval_steps`` steps, and at the end. The one before the first step is not among them.
    """
    if first >= last:
        return 0
    every = eval_steps or last
    return (last - 1) // every - first // every + 1


class Pace:
    """What training and measuring took in this session, for the time that is left.

    ``measuring``: seconds spent in measurements of perplexity.
    """

    def __init__(self):
        self.measuring = 0.0
        self._count = 0

    def measured(self, seconds: float) -> None:
        """Note one measurement of perplexity."""
        self.measuring += seconds
        self._count += 1

    def left(self, training: float, done: int, blocks: int, ahead: int) -> float:
        """Seconds for ``blocks`` more blocks and ``ahead`` measurements.

        ``training``: seconds that ``done`` blocks took, without measurements. A resumed session has measured
        nothing at first: until then a measurement counts as 0 s.
        """
        a_block = training / max(1, done)
        a_measurement = self.measuring / max(1, self._count)
        return blocks * a_block + ahead * a_measurement
