"""How much a run reads: every such number that is shown comes from here.

The blocks of an epoch are dealt to the processes in batches; a last round that does not reach all processes
is left out. An optimiser step takes ``--gradient-accumulation-steps`` rounds, the last one of an epoch those
that remain.
"""

import math
from argparse import Namespace
from typing import NamedTuple


class Amount(NamedTuple):
    """What the Trainer reads of ``blocks`` training blocks in a run with the options ``args``.

    ``processes``: how many processes train.
    """

    args: Namespace
    blocks: int
    processes: int

    @property
    def drops_the_rest(self) -> bool:
        """Whether blocks that do not fill a round are left out: yes, unless there is no full round."""
        return self.blocks >= self.args.batch_size * self.processes

    @property
    def round_blocks(self) -> int:
        """Blocks that all processes together read in a forward."""
        if self.processes == 1:
            return min(self.args.batch_size, self.blocks)
        return self.args.batch_size * self.processes  # fewer are filled up with copies

    @property
    def epoch_rounds(self) -> int:
        """Forwards of each process in an epoch."""
        return self.blocks // self.round_blocks or 1

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps in an epoch."""
        return math.ceil(self.epoch_rounds / self.args.gradient_accumulation_steps)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run, as the Trainer rounds them up."""
        return self.args.steps or math.ceil(self.args.epochs * self.epoch_steps)

    def tokens_after(self, step: int) -> int:
        """Tokens that were read by the end of ``step``: the Trainer's ``num_input_tokens_seen``.

        Those of a block that was read twice count twice.
        """
        epochs, more = divmod(step, self.epoch_steps)
        rounds = epochs * self.epoch_rounds + more * self.args.gradient_accumulation_steps
        return rounds * self.round_blocks * self.args.sequence_length

    def epochs(self, tokens: int) -> float:
        """How often each training block was read, on average, in ``tokens`` tokens."""
        return tokens / (self.args.sequence_length * self.blocks)
