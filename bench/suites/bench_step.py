"""A training step of a whole model, all linear layers adapted, r = 16: bare, stock PEFT, mica.fast.

On a CPU SmolLM2-135M with its own weights, in a quick run a small model with random ones; on an accelerator
four layers of Llama-3.2-1B's widths, also with gradient checkpointing, as Trainer runs it with ``bf16=True``
(the forward under autocast), and under DDP, alone in its group. Every implementation gets
embeddings that require a gradient, so that the bare frozen model has a backward too and all do the same base
work. The adapted ones also run AdamW on A. Before anything is timed they train from the same start, and their
losses must be stock PEFT's. Memory: what is saved for the backward, by how much memory grows within a step,
what is trained, and AdamW's states.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.measure.machine import DEVICE
from bench.measure.memory import optimizer_bytes, saved_bytes, trainable_bytes
from bench.results.names import BARE, FAST, STOCK, STOCK_16
from bench.suites.decoder import LINEAR_LAYERS, RANK, Work, adapted, cast, causal
from bench.suites.harness import build_all, pick, under_autocast
from bench.suites.steps import CONTEXTS, Step, checked, expected_operators
from tests.support import models

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STEPS = pick(default=2, cuda=6)
LEARNING_RATE = pick(default=1e-3, dry=3e-2)
# Relative differences from stock PEFT's, whose adapters compute in fp32: of the loss, at each step, and of
# its gradients with respect to the embeddings and A at the start.
GATES = {"bfloat16": {"y": 1e-2, "dx": 1e-1, "dA": 1e-1}, "float32": {"y": 1e-5, "dx": 1e-4, "dA": 1e-4}}
DISTINCT = 16  # random tokens: that others never occur is learnt in a few steps
SMOLLM2 = "SmolLM2-135M"
CHECKPOINTED, AUTOCAST, DDP = "checkpointed", "autocast", "DDP of one process"


class Cell(NamedTuple):
    """``tokens``: (batch, sequence); ``layers``: of the model with random weights; ``how`` it is run."""

    model: str
    tokens: tuple[int, int]
    dtype: str = "bfloat16"
    rounds: int = 6
    layers: int = 4
    vocabulary: int = 32000
    how: str = ""

    @property
    def name(self) -> str:
        batch, sequence = self.tokens
        how = f", {self.how}" if self.how else ""
        return f"training step of {self.model}, {batch} x {sequence} tokens, r = {RANK}, {self.dtype}{how}"

    @property
    def axes(self) -> dict[str, str | int]:
        batch, sequence = self.tokens
        axes = {"suite": "step", "model": self.model, "tokens": batch * sequence, "sequence": sequence}
        axes |= {"rank": RANK, "dtype": self.dtype}
        return axes | ({"how": self.how} if self.how else {})

    @property
    def implementations(self) -> tuple[str, ...]:
        return (BARE, STOCK, *([STOCK_16] if self.dtype != "float32" else []), FAST)


CELLS = pick(
    quick=[Cell("Qwen2.5-0.5B", (1, 256), rounds=3, layers=2, vocabulary=4000)],
    default=[Cell(SMOLLM2, (1, 512), rounds=3), Cell(SMOLLM2, (1, 256), "float32", rounds=2)],
    full=[Cell(SMOLLM2, (2, 512)), Cell(SMOLLM2, (1, 512), "float32", rounds=3)],
    cuda=[
        *(Cell("Llama-3.2-1B", (4, 2048), rounds=10, how=how) for how in ("", CHECKPOINTED, AUTOCAST)),
        *(Cell("Llama-3.2-1B", (1, 512), rounds=10, how=how) for how in ("", CHECKPOINTED, AUTOCAST, DDP)),
    ],
    dry=[
        Cell("toy", (1, 8), rounds=1, layers=1, vocabulary=64, how=how)
        for how in ("", CHECKPOINTED, AUTOCAST, DDP)
    ],
)


smollm2 = functools.cache(models.smollm2)  # 15 s to read


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def alone(model: nn.Module) -> nn.Module:
    """Under DDP, in a group of this process, which `mica.fast` sees; the bare model has nothing to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    if not dist.is_initialized():
        backend = "nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return DistributedDataParallel(model)


WRAPPED = {AUTOCAST: under_autocast, DDP: alone}


def work_of(cell: Cell) -> Work:
    torch.manual_seed(0)
    if cell.model == SMOLLM2:
        bare = cast(copy.deepcopy(smollm2()), DTYPES[cell.dtype])
        ids = models.python_reference_tokens()[: cell.tokens[0] * cell.tokens[1]].view(cell.tokens)
    else:
        bare = causal(cell.model, cell.layers, cell.vocabulary, DTYPES[cell.dtype])
        ids = torch.randint(DISTINCT, cell.tokens)
    bare, ids = bare.train().requires_grad_(False).to(DEVICE), ids.to(DEVICE)
    if cell.how == CHECKPOINTED:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
    x = bare.get_input_embeddings()(ids).detach()
    wrapped = {"wrap": WRAPPED[cell.how]} if cell.how in WRAPPED else {}
    return Work(bare, adapted(bare, 0.02), x, labels=ids, **wrapped)


def build(cell: Cell, work: Work, implementation: str) -> Step:
    layers = LINEAR_LAYERS * work.bare.config.num_hidden_layers
    ran = expected_operators(implementation, layers, forwards=1 + (cell.how == CHECKPOINTED))
    return work.step(implementation, CONTEXTS[implementation], ran, LEARNING_RATE)


def losses(step: Step) -> list[float]:
    """Of `STEPS` steps."""
    with step.form.context():
        return [step().item() for _ in range(STEPS)]


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> dict[str, Step]:
    work, gates = work_of(cell), GATES[cell.dtype]
    stock = build(cell, work, STOCK)
    expected = stock.results()
    lost = losses(stock)
    assert abs(lost[-1] / lost[0] - 1) > 3 * gates["y"], f"the steps make no difference: {lost}"

    def checked_step(implementation: str) -> Step:
        if implementation == STOCK:
            return stock
        step = build(cell, work, implementation)
        if implementation != BARE:
            checked(step, expected, gates)
            for ours, theirs in zip(losses(step), lost, strict=True):
                assert abs(ours / theirs - 1) <= gates["y"], f"a loss is {ours}, stock PEFT's {theirs}"
        return step

    return build_all(cell.name, cell.implementations, checked_step)


def memory(step: Step, how: str) -> dict[str, float]:
    """Megabytes."""
    model, optimizer, facts = step.form.module, step.optimizer, {}
    if how != DDP:  # which wants a backward after every forward
        with step.form.context():
            facts["saved_mb"] = saved_bytes(step.form.forward, [model]) / 1e6
    facts["trained_mb"] = trainable_bytes(model) / 1e6
    facts["optimizer_mb"] = 0.0 if optimizer is None else optimizer_bytes(optimizer) / 1e6
    return facts


# the last parameter is the innermost loop: implementations take turns within a round
CASES = [
    pytest.param(cell, round_, name, id=f"{cell.name}-{round_}-{name}")
    for cell in CELLS
    for round_ in range(cell.rounds)
    for name in cell.implementations
]


@pytest.mark.parametrize(("cell", "round_", "implementation"), CASES)
def bench_step(once, gated, cell, round_, implementation):
    step = gated(cell.name, lambda: setting(cell), implementation)[implementation]
    facts = memory(step, cell.how) if round_ == 0 else {}
    step.time(once, cell.name, implementation, cell.axes, **facts)
    once.note_growth(peak_mb=1e6)
