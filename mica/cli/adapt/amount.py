"""How much a run reads: every such number that is shown comes from here.

The blocks of an epoch are dealt to the processes in batches; a last round that does not reach all processes
is left out. An optimiser step takes ``accumulation`` rounds, the last step of an epoch those that remain.
"""

import math
from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """What the Trainer reads of ``blocks`` training blocks of ``sequence_length`` tokens.

    ``batch_size``: the blocks of a forward in one process. ``accumulation``: the forwards of a step.
    ``processes``: how many processes train.
    """

    blocks: int
    sequence_length: int
    batch_size: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, args: Namespace, blocks: int, processes: int) -> "Amount":
        """The amount that a run with the options ``args`` reads."""
        accumulation = args.gradient_accumulation_steps
        return cls(blocks, args.sequence_length, args.batch_size, accumulation, processes)

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

    def steps(self, args: Namespace) -> int:
        """Optimiser steps of a run, by ``args.steps`` or ``args.epochs``, as the Trainer rounds them up."""
        if args.steps is not None:
            return args.steps
        return math.ceil(args.epochs * self.epoch_steps)

    def tokens_after(self, step: int) -> int:
        """Tokens that were read by the end of ``step``: the Trainer's ``num_input_tokens_seen``.

        Those of a block that was read twice count twice.
        """
        epochs, more = divmod(step, self.epoch_steps)
        rounds = epochs * self.epoch_rounds + more * self.accumulation
        return rounds * self.round_blocks * self.sequence_length

    def epochs(self, tokens: int) -> float:
        """How often each training block was read, on average, in ``tokens`` tokens."""
        return tokens / (self.sequence_length * self.blocks)
