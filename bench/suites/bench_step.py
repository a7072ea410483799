"""Forward + backward of decoders with adapters on all linear layers, r = 16: bare, stock PEFT, mica.fast.

*Step*: of training a whole model. On a CPU SmolLM2-135M with its own weights, in a quick run a small model
with random ones; on an accelerator four layers of Llama-3.2-1B's widths, also with gradient checkpointing, as
Trainer runs it with ``bf16=True`` (the forward under autocast), and under DDP, alone in its group. The
adapted ones also run AdamW on A. They train from the same start, and their losses must be stock PEFT's.
Memory: what is saved for the backward, by how much memory grows within a step, what is trained, and AdamW's
states.

*Block*: attention and MLP of random weights with real widths, in bf16.

*Quantised*: SmolLM2-135M in nf4 beside PEFT's LoRA (stock PEFT cannot do MiCA over bitsandbytes), without an
optimizer: LoRA's would have twice the parameters. Target: at most half the overhead of LoRA, (mica.fast -
bare) / (PEFT LoRA - bare) <= 0.5.

Every implementation gets embeddings that require a gradient, so that the bare frozen model has a backward too
and all do the same base work. All results are checked against stock PEFT's before anything is timed, and each
timed step has to run the operators that its name implies.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

import mica.fast
from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE
from bench.measure.memory import optimizer_bytes, saved_bytes, trainable_bytes
from bench.results.names import BARE, FAST, LORA, STOCK, STOCK_16
from bench.suites.decoder import RANK, Work, adapted, cast, causal, config_of
from bench.suites.harness import build_all, iterations, pick, under_autocast, whole_turns
from bench.suites.steps import CONTEXTS, Step, checked, expected_operators
from tests.support import models

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STEPS = pick(default=2, cuda=6)
LEARNING_RATE = pick(default=1e-3, dry=3e-2)
DISTINCT = 16  # random tokens: that others never occur is learnt in a few steps
SMOLLM2 = "SmolLM2-135M"
STEP, BLOCK, QUANTISED = "step", "block", "quantised"
CHECKPOINTED, AUTOCAST, DDP = "checkpointed", "autocast", "DDP of one process"
# Relative differences from stock PEFT's, whose adapters compute in fp32: of y or the loss (at each step), and
# of the gradients with respect to the embeddings and A at the start. Measured over nf4: 1e-3 and 3e-2.
GATES = {
    (STEP, "bfloat16"): {"y": 1e-2, "dx": 1e-1, "dA": 1e-1},
    (STEP, "float32"): {"y": 1e-5, "dx": 1e-4, "dA": 1e-4},
    (BLOCK, "bfloat16"): {"y": 1e-2, "dx": 2e-2, "dA": 2e-2},
    (QUANTISED, "bfloat16"): {"y": 5e-3, "dx": 1e-1, "dA": 1e-1},
}
# The values of A: an update of a size that bf16 adapters can carry at width 4096, and one that nf4 shows
SCALES = {STEP: 0.02, BLOCK: 0.02, QUANTISED: 0.1}


class Cell(NamedTuple):
    """``tokens``: (batch, sequence); ``layers``: of a model with random weights; ``how`` a step is run."""

    model: str
    tokens: tuple[int, int]
    dtype: str = "bfloat16"
    rounds: int = 6
    layers: int = 4
    vocabulary: int = 32000
    how: str = ""
    kind: str = STEP

    @property
    def name(self) -> str:
        sizes = f"{self.model}, {self.tokens[0]} x {self.tokens[1]} tokens, r = {RANK}, {self.dtype}"
        how = f", {self.how}" if self.how else ""
        return {
            STEP: f"training step of {sizes}{how}",
            BLOCK: f"block of {sizes}, forward + backward",
            QUANTISED: f"forward + backward, {self.dtype} over nf4",
        }[self.kind]

    @property
    def axes(self) -> dict[str, str | int]:
        batch, sequence = self.tokens
        axes = {"suite": self.kind, "model": self.model, "tokens": batch * sequence, "rank": RANK}
        axes |= {"dtype": self.dtype} if self.kind != QUANTISED else {}
        axes |= {"sequence": sequence} if self.kind == STEP else {}
        return axes | ({"how": self.how} if self.how else {})

    @property
    def implementations(self) -> tuple[str, ...]:
        if self.kind == QUANTISED:
            return BARE, LORA, FAST
        return (BARE, STOCK, *([STOCK_16] if self.dtype != "float32" else []), FAST)


def blocks(names: str, rounds: int, tokens: tuple[int, int] = (2, 512)) -> list[Cell]:
    """No tokens are embedded."""
    return [Cell(name, tokens, "bfloat16", rounds, 1, 8, kind=BLOCK) for name in names.split()]


def steps_of_llama(tokens: tuple[int, int], *hows: str) -> list[Cell]:
    return [Cell("Llama-3.2-1B", tokens, rounds=10, how=how) for how in hows]


# Blocks first: SmolLM2 is kept once it has been read.
CELLS = pick(
    quick=[*blocks("Qwen2.5-0.5B", 3), Cell("Qwen2.5-0.5B", (1, 256), rounds=3, layers=2, vocabulary=4000)],
    default=[
        *blocks("Llama-3.2-1B Qwen2.5-0.5B GPT-2", 4),
        *(Cell(SMOLLM2, (1, 512), rounds=3, how=how) for how in ("", AUTOCAST)),
        Cell(SMOLLM2, (1, 256), "float32", rounds=2),
    ],
    full=[
        *blocks("Llama-3.2-1B Qwen2.5-0.5B GPT-2", 6),
        *blocks("Llama-3.1-8B Qwen2.5-7B", 6, (1, 512)),  # half a minute to set up
        *(Cell(SMOLLM2, (2, 512), how=how) for how in ("", AUTOCAST)),
        Cell(SMOLLM2, (1, 512), "float32", rounds=3),
        Cell(SMOLLM2, (2, 512), kind=QUANTISED),  # a step takes 6 s, unpacking most of it
    ],
    cuda=[
        *steps_of_llama((4, 2048), "", CHECKPOINTED, AUTOCAST),
        *steps_of_llama((1, 512), "", CHECKPOINTED, AUTOCAST, DDP),
        *blocks("Llama-3.2-1B Llama-3.1-8B", 10, (4, 2048)),
    ],
    dry=[
        *(Cell("toy", (1, 8), rounds=1, layers=1, vocabulary=64, how=how) for how in ("", CHECKPOINTED)),
        *(Cell("toy", (1, 8), rounds=1, layers=1, vocabulary=64, how=how) for how in (AUTOCAST, DDP)),
        *blocks("toy", 1, (1, 8)),
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


def bare_model(cell: Cell) -> nn.Module:
    dtype = DTYPES[cell.dtype]
    if cell.kind == QUANTISED:
        from tests.support import quantised_models  # of libraries that a machine with a GPU need not have

        nf4 = functools.partial(quantised_models.bnb_4bit, compute_dtype=dtype)
        bare = quantised_models.quantise(models.smollm2(dtype), nf4)
        bare.is_loaded_in_4bit = True
    elif cell.kind == BLOCK:
        bare = AutoModel.from_config(config_of(cell.model), dtype=dtype)
    elif cell.model == SMOLLM2:
        bare = cast(copy.deepcopy(smollm2()), dtype)
    else:
        bare = causal(cell.model, cell.layers, cell.vocabulary, dtype)
    return bare.train().requires_grad_(False).to(DEVICE)  # in eval mode some CPUs repack 4-bit weights


def work_of(cell: Cell) -> Work:
    torch.manual_seed(0)
    bare = bare_model(cell)
    if cell.how == CHECKPOINTED:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
    masters = adapted(bare, SCALES[cell.kind]).train()
    if cell.kind == BLOCK:
        x, dy = torch.randn(
            2, *cell.tokens, bare.config.hidden_size, device=DEVICE, dtype=torch.bfloat16
        ).unbind()
        return Work(bare, masters, x, dy)
    if cell.model == SMOLLM2:
        ids = models.python_reference_tokens()[: cell.tokens[0] * cell.tokens[1]].view(cell.tokens)
    else:
        ids = torch.randint(DISTINCT, cell.tokens)
    x = bare.get_input_embeddings()(ids := ids.to(DEVICE)).detach()
    wrapped = {"wrap": WRAPPED[cell.how]} if cell.how in WRAPPED else {}
    return Work(bare, masters, x, labels=ids, **wrapped)


def build(cell: Cell, work: Work, implementation: str) -> Step:
    layers = len(models.adapted_layers(work.masters))
    if cell.kind != QUANTISED:
        ran = expected_operators(implementation, layers, forwards=1 + (cell.how == CHECKPOINTED))
        rate = LEARNING_RATE if cell.kind == STEP else 0.0
        return work.step(implementation, CONTEXTS[implementation], ran, rate)
    if implementation == LORA:
        config = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear")
        with mica.fast.disabled():
            model = get_peft_model(copy.deepcopy(work.bare), config)
        return work.step_of(model.train(), mica.fast.disabled, {})
    # the base layer is called, since it unpacks the weight
    projections = [f"{name}_projection{part}" for name in ("down", "up") for part in ("", "_backward")]
    ran = dict.fromkeys(projections, layers) if implementation == FAST else {}
    return work.step(implementation, CONTEXTS[implementation], ran)


def losses(step: Step) -> list[float]:
    """Of `STEPS` steps."""
    with step.form.context():
        return [step().item() for _ in range(STEPS)]


class Setting(NamedTuple):
    steps: dict[str, Step]
    facts: dict[str, dict[str, float]]
    iterations: int


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Setting:
    if cell.kind == QUANTISED:
        pytest.importorskip("bitsandbytes")
    work, gates = work_of(cell), GATES[cell.kind, cell.dtype]
    stock = build(cell, work, STOCK)
    expected, lost = stock.results(), []
    if cell.kind == STEP:
        lost = losses(stock)
        assert abs(lost[-1] / lost[0] - 1) > 3 * gates["y"], f"the steps make no difference: {lost}"

    def checked_step(implementation: str) -> Step:
        if implementation == STOCK:
            return stock
        step = build(cell, work, implementation)
        if implementation in (STOCK_16, FAST):
            checked(step, expected, gates)
            for ours, theirs in zip(losses(step) if lost else [], lost, strict=True):
                assert abs(ours / theirs - 1) <= gates["y"], f"a loss is {ours}, stock PEFT's {theirs}"
        return step

    steps = build_all(cell.name, cell.implementations, checked_step)
    if cell.kind == QUANTISED:
        difference = abs(float(expected["y"] / steps[BARE].results()["y"]) - 1)
        assert difference > 10 * gates["y"], f"the adapters change the loss by only {difference:.1e}"
    count = iterations(seconds(steps[BARE])) if cell.kind == BLOCK else 1
    return Setting(steps, {name: memory(step, cell) for name, step in steps.items()}, count)


def memory(step: Step, cell: Cell) -> dict[str, float]:
    """Megabytes."""
    model, optimizer, facts = step.form.module, step.optimizer, {}
    if cell.how != DDP:  # which wants a backward after every forward
        with step.form.context():
            facts["saved_mb"] = saved_bytes(step.form.forward, [model]) / 1e6
    if cell.kind == STEP:
        facts["trained_mb"] = trainable_bytes(model) / 1e6
        facts["optimizer_mb"] = 0.0 if optimizer is None else optimizer_bytes(optimizer) / 1e6
    return facts


@whole_turns(CELLS)
def bench_step(once, gated, cell, round_, implementation):
    steps, facts, count = gated(cell.name, lambda: setting(cell), implementation)
    noted, all_clocks = facts[implementation] if round_ == 0 else {}, cell.kind == BLOCK
    steps[implementation].time(
        once, cell.name, implementation, cell.axes, count, all_clocks=all_clocks, **noted
    )
    if cell.kind == STEP:
        once.note_growth(peak_mb=1e6)
