"""A training step of a whole decoder with adapters on all linear layers, r = 16: bare, stock PEFT, mica.fast.

On a CPU SmolLM2-135M with its own weights, on an accelerator four layers of Llama-3.2-1B's widths, also with
gradient checkpointing, and as Trainer runs it with ``bf16=True`` (the forward under autocast). With a dropout
of 0.05, on all linear layers or in the paper's recipe, results are compared while it is off. The adapted ones
also run AdamW on what they train. They train from the same start, and their losses must be stock PEFT's.
Memory: what is saved for the backward, and by how much it grows within a step.

Every implementation gets embeddings that require a gradient, so that the bare frozen model has a backward too
and all do the same base work. Each timed step has to run the operators that its name implies.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from bench.measure.machine import DEVICE
from bench.results.names import BARE, DORA, FAST, FAST_ACTIVATIONS, MICA, PLAIN_LORA, STOCK, stock
from bench.suites import harness
from bench.suites.decoder import (
    RANK,
    SMOLLM2,
    Work,
    causal,
    loss,
    reference_ids,
    under_autocast,
    work_on,
)
from bench.suites.harness import build_all, each, pick
from bench.suites.rounds import Once, prepared, rounds
from bench.suites.steps import Prepared, Step, checked, with_bytes
from tests.support import models

STEPS = pick(default=2, cuda=6, dry=3)
SECONDS = pick(default=120.0, cuda=4.0, dry=0.0)  # of a cell
LEARNING_RATE = pick(default=1e-3, dry=3e-2)
DISTINCT = 16  # random tokens: that others never occur is learnt in a few steps
CHECKPOINTED = "checkpointed"
AUTOCAST = "autocast"
DROPOUT = "dropout 0.05"
PAPER = "paper's recipe"
CONFIGS: dict[str, dict] = {  # how -> of the adapter
    DROPOUT: {"lora_dropout": 0.05},
    PAPER: {"lora_dropout": 0.05, "targets": ["q_proj", "v_proj"], "lora_alpha": 2 * RANK},
}
# Relative differences from stock PEFT's, whose adapters compute in fp32: of the loss (at each step), and of
# the gradients with respect to the embeddings and A at the start.
GATES = {
    "bfloat16": {"y": 1e-2, "dx": 1e-1, "dA": 1e-1},
    "float32": {"y": 1e-5, "dx": 1e-4, "dA": 1e-4},
}


@dataclass(frozen=True)
class Cell(harness.Cell):
    """``tokens``: (batch, sequence); ``layers``: of a model with random weights; ``how`` a step is run."""

    model: str
    tokens: tuple[int, int]
    dtype: str = "bfloat16"
    layers: int = 4
    vocabulary: int = 32000
    how: str = ""
    adapter: str = MICA
    suite: str = "step"  # others run such steps, too

    @property
    def axes(self) -> dict[str, str | int]:
        batch, sequence = self.tokens
        axes = {
            "suite": self.suite,
            "model": self.model,
            "adapter": self.adapter,
            "tokens": batch * sequence,
            "sequence": sequence,
            "rank": RANK,
        }
        if self.how:
            axes["how"] = self.how
        return {**axes, "dtype": self.dtype}

    @property
    def implementations(self) -> list[str]:
        ours = [FAST] if self.how or self.dtype == "float32" else [FAST, FAST_ACTIVATIONS]
        return [BARE, *stock(self.dtype, self.how == AUTOCAST), *ours]


def steps_of_llama(tokens: tuple[int, int], *hows: str, adapter: str = MICA) -> list[Cell]:
    return [Cell("Llama-3.2-1B", tokens, how=how, adapter=adapter) for how in hows]


def toy_steps(*hows: str, adapter: str = MICA) -> list[Cell]:
    return [Cell("toy", (1, 8), layers=1, vocabulary=64, how=how, adapter=adapter) for how in hows]


CELLS = pick(
    default=[
        Cell(SMOLLM2, (1, 512)),
        Cell(SMOLLM2, (1, 512), how=AUTOCAST),
        Cell(SMOLLM2, (1, 512), how=DROPOUT),
        Cell(SMOLLM2, (1, 512), how=PAPER),
        Cell(SMOLLM2, (1, 256), "float32"),
        *(Cell(SMOLLM2, (1, 512), how=how, adapter=PLAIN_LORA) for how in ("", AUTOCAST, DROPOUT)),
        Cell(SMOLLM2, (1, 256), "float32", adapter=PLAIN_LORA),
        Cell(SMOLLM2, (1, 512), adapter=DORA),
        Cell(SMOLLM2, (1, 256), "float32", adapter=DORA),
    ],
    cuda=[
        *steps_of_llama((4, 2048), "", CHECKPOINTED, AUTOCAST, DROPOUT, PAPER),
        *steps_of_llama((1, 512), "", CHECKPOINTED, AUTOCAST),
        *steps_of_llama((4, 2048), "", AUTOCAST, DROPOUT, adapter=PLAIN_LORA),
    ],
    dry=[
        *toy_steps("", CHECKPOINTED, AUTOCAST, DROPOUT, PAPER),
        *toy_steps("", AUTOCAST, DROPOUT, adapter=PLAIN_LORA),
        *toy_steps("", adapter=DORA),
    ],
)


def work_of(cell: Cell) -> Work:
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    if cell.model == SMOLLM2:
        bare = models.smollm2(dtype)
        ids = reference_ids(cell.tokens).to(DEVICE)
    else:
        bare = causal(cell.model, cell.layers, cell.vocabulary, dtype)
        ids = torch.randint(DISTINCT, cell.tokens).to(DEVICE)
    if cell.how == CHECKPOINTED:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
    shape = (*cell.tokens, bare.config.hidden_size)
    call = functools.partial(loss, ids)
    if cell.how == AUTOCAST:
        call = functools.partial(under_autocast, call)
    work = work_on(bare, shape, cell.adapter, call=call, **CONFIGS.get(cell.how, {}))
    return work._replace(x=bare.get_input_embeddings()(ids).detach(), grad_output=None)


def build(cell: Cell, work: Work, implementation: str) -> Step:
    forwards = 2 if cell.how == CHECKPOINTED else 1
    return work.step(implementation, forwards=forwards, rate=LEARNING_RATE)


def set_dropout(step: Step, on: bool) -> None:
    """Every implementation draws masks of its own, so that results can be compared only while it is off."""
    for module in step.form.module.modules():
        if type(module) is nn.Dropout:
            module.train(on)


def losses(step: Step) -> list[float]:
    """The losses of `STEPS` steps."""
    with step.form.context():
        return [step().item() for _ in range(STEPS)]


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    work = work_of(cell)
    gates = GATES[cell.dtype]
    stock = build(cell, work, STOCK)
    set_dropout(stock, False)
    expected = stock.results()
    expected_losses = losses(stock)
    change = abs(expected_losses[-1] / expected_losses[0] - 1)
    assert change > 3 * gates["y"], f"the steps make no difference: {expected_losses}"

    def checked_step(implementation: str) -> Step:
        if implementation == STOCK:
            return stock
        step = build(cell, work, implementation)
        if implementation == BARE:
            return step
        set_dropout(step, False)
        checked(step, expected, gates)
        for ours, theirs in zip(losses(step), expected_losses, strict=True):
            assert abs(ours / theirs - 1) <= gates["y"], f"a loss is {ours}, stock PEFT's {theirs}"
        return step

    steps = build_all(cell.name, cell.implementations, checked_step)
    for name, step in steps.items():
        set_dropout(step, True)
        with step.form.context():
            varies = len({step.form.forward().item() for _ in range(4)}) > 1
        assert varies == (cell.how in CONFIGS and name != BARE), f"{name}: is dropout off?"
    return with_bytes(steps)


@each(CELLS)
def bench_step(cell):
    steps = prepared(cell.name, lambda: setting(cell))

    def sample(once: Once, name: str) -> None:
        steps.time(once, cell.axes)
        once.note_growth("peak_mb", 1e6)

    rounds(cell.name, cell.implementations, sample, SECONDS)
