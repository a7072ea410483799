"""Forward + backward of one decoder block with adapters on all linear layers, r = 16, in bf16.

Attention and MLP of random weights with the widths of real models. Every implementation gets embeddings that
require a gradient, so that the bare frozen block has a backward too and all do the same base work. All
results are checked against stock PEFT's before anything is timed, and each timed step has to run the
operators that its name implies.
"""

import functools
from dataclasses import dataclass

import torch
from transformers import AutoModel

from bench.measure.clocks import seconds
from bench.results.names import BARE, FAST, STOCK, STOCK_16
from bench.suites import harness
from bench.suites.decoder import RANK, config_of, work_on
from bench.suites.harness import each, iterations, pick
from bench.suites.rounds import prepared, rounds
from bench.suites.steps import Prepared, check_all, with_bytes

# Relative differences from stock PEFT's, whose adapters compute in fp32
GATES = {"y": 1e-2, "dx": 2e-2, "dA": 2e-2}


@dataclass(frozen=True)
class Cell(harness.Cell):
    """``tokens``: (batch, sequence)."""

    model: str
    tokens: tuple[int, int] = (2, 512)
    implementations: tuple[str, ...] = (BARE, STOCK, STOCK_16, FAST)

    @property
    def axes(self) -> dict[str, str | int]:
        batch, sequence = self.tokens
        return {
            "suite": "block",
            "model": self.model,
            "tokens": batch * sequence,
            "rank": RANK,
            "dtype": "bfloat16",
        }


CELLS = pick(
    default=[Cell("Llama-3.2-1B"), Cell("Qwen2.5-0.5B"), Cell("GPT-2")],
    cuda=[Cell("Llama-3.2-1B", (4, 2048)), Cell("Llama-3.1-8B", (4, 2048))],
    dry=[Cell("toy", (1, 8))],
)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    torch.manual_seed(0)
    bare = AutoModel.from_config(config_of(cell.model), dtype=torch.bfloat16)
    work = work_on(bare, (*cell.tokens, bare.config.hidden_size))
    steps = check_all(cell.name, cell.implementations, work.step, GATES)
    return with_bytes(steps, iterations(seconds(steps[BARE])))


@each(CELLS)
def bench_block(cell):
    block = prepared(cell.name, lambda: setting(cell))
    rounds(cell.name, cell.implementations, lambda once, _: block.time(once, cell.axes, all_clocks=True))
