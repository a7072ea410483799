"""Forward + backward of one decoder block with adapters on all linear layers, r = 16, in bf16.

Attention and MLP of random weights with the widths of real models. Every implementation gets embeddings that
require a gradient, so that the bare frozen block has a backward too and all do the same base work. All
results are checked against stock PEFT's before anything is timed, and each timed step has to run the
operators that its name implies.
"""

import functools
from typing import NamedTuple

import torch
from transformers import AutoModel

from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE
from bench.results.names import BARE, FAST, STOCK, STOCK_16
from bench.suites.decoder import RANK, Work, adapted, config_of
from bench.suites.harness import each, iterations, pick
from bench.suites.rounds import prepared, rounds
from bench.suites.steps import CONTEXTS, Prepared, Step, check_all, operators
from tests.support import models

# Relative differences from stock PEFT's, whose adapters compute in fp32
GATES = {"y": 1e-2, "dx": 2e-2, "dA": 2e-2}
A_SCALE = 0.02  # of the values of A: an update that bf16 adapters can carry at width 4096


class Cell(NamedTuple):
    """``tokens``: (batch, sequence)."""

    model: str
    tokens: tuple[int, int] = (2, 512)
    implementations: tuple[str, ...] = (BARE, STOCK, STOCK_16, FAST)

    @property
    def key(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        batch, sequence = self.tokens
        sizes = f"{batch} x {sequence} tokens, r = {RANK}, bfloat16"
        return f"block of {self.model}, {sizes}, forward + backward"

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


def work_of(cell: Cell) -> Work:
    torch.manual_seed(0)
    bare = AutoModel.from_config(config_of(cell.model), dtype=torch.bfloat16)
    bare.train().requires_grad_(False).to(DEVICE)
    masters = adapted(bare, A_SCALE).train()
    shape = (*cell.tokens, bare.config.hidden_size)
    x, dy = torch.randn(2, *shape, device=DEVICE, dtype=torch.bfloat16).unbind()
    return Work(bare, masters, x, dy)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    work = work_of(cell)
    layers = len(models.adapted_layers(work.masters))

    def build(name: str) -> Step:
        ran = operators(layers) if name == FAST else {}
        return work.step(name, CONTEXTS[name], ran)

    steps = check_all(cell.name, cell.implementations, build, GATES)
    facts = {name: {"saved_mb": step.saved_mb()} for name, step in steps.items()}
    return Prepared(steps, facts, iterations(seconds(steps[BARE])))


@each(CELLS)
def bench_block(cell):
    block = prepared(cell.name, lambda: setting(cell))
    rounds(cell.name, cell.implementations, lambda once, _: block.time(once, cell.axes, all_clocks=True))
