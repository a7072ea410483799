"""Forward + backward of layers of experts of random weights, both stacks adapted, r = 16.

There are 64 experts, of which 8 process a token. Implementations: the bare frozen layer, PEFT's LoRA on the
same ``target_parameters`` (stock PEFT has no MiCA there), which forms W + s·B·A of all experts and its
gradient, and LoRA and MiCA on mica.fast. Targets: at most half of PEFT's time, and half of the memory that
its step adds.
"""

import copy
import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import mica.fast
from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.measure.memory import peak_growth
from bench.results.names import BARE, FAST, FAST_LORA, LORA
from bench.suites import harness
from bench.suites.harness import build_all, each, iterations, pick
from bench.suites.layer import Form
from bench.suites.rounds import prepared, rounds
from bench.suites.steps import Prepared, Step, checked
from mica.fast.loading import without_solver
from tests.support import models

RANK = 16
SECONDS = pick(default=60.0, cuda=4.0, dry=0.0)  # of a cell
EXPERTS, TOP_K = pick(default=(64, 8), dry=(4, 2))
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
# Relative differences from PEFT's own path with the same MiCA adapters
GATES = {
    torch.float32: {"y": 1e-5, "dx": 1e-5, "dA": 1e-5},
    torch.bfloat16: {"y": 1e-2, "dx": 2e-2, "dA": 2e-2},
}


@dataclass(frozen=True)
class Cell(harness.Cell):
    tokens: int
    hidden: int
    intermediate: int
    dtype: torch.dtype = torch.float32
    implementations: tuple[str, ...] = (BARE, LORA, FAST_LORA, FAST)

    @property
    def axes(self) -> dict[str, str | int]:
        return {
            "suite": "experts",
            "tokens": self.tokens,
            "out": self.hidden,
            "in": self.intermediate,
            "rank": RANK,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


# the widest are those of OLMoE-1B-7B
CELLS = pick(
    default=[Cell(1024, 1024, 512), Cell(1024, 2048, 1024)],
    cuda=[Cell(4096, 2048, 1024, torch.bfloat16)],
    dry=[Cell(8, 32, 16)],
)


class _Layer(nn.Module):
    """The experts with a fixed routing: PEFT needs a module around what it wraps."""

    def __init__(self, cell: Cell):
        super().__init__()
        config = OlmoeConfig(
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            hidden_size=cell.hidden,
            intermediate_size=cell.intermediate,
        )
        config._experts_implementation = "grouped_mm"  # what transformers chooses
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        self.experts = experts.to_empty(device=DEVICE).to(cell.dtype).requires_grad_(False)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
        scores = torch.rand(cell.tokens, EXPERTS, device=DEVICE).topk(TOP_K)
        self.index = scores.indices
        self.weights = scores.values.to(cell.dtype)

    def forward(self, x):
        return self.experts(x, self.index, self.weights)


def adapted(bare: nn.Module, init: str | bool) -> nn.Module:
    """PEFT's model, around the same base weights, with random adapters."""
    memo = {id(weight): weight for weight in bare.parameters()}
    config = {"lora_alpha": RANK, "init_lora_weights": init, "target_parameters": TARGETS}
    with without_solver():
        model = models.wrap(copy.deepcopy(bare, memo), RANK, [], **config)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            scale = 0.02 if ".lora_A." in name else weight.shape[0] ** -0.5
            weight.data.normal_(0, scale, generator=generator)
    return model


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    torch.manual_seed(0)
    bare = _Layer(cell)
    x, dy = torch.randn(2, cell.tokens, cell.hidden, device=DEVICE).to(cell.dtype).unbind()
    x = x.clone().requires_grad_()
    ran = dict.fromkeys(("experts_linear", "experts_linear_backward"), 2)
    ours, lora = adapted(bare, "mica"), adapted(bare, True)

    def step(model: nn.Module, context=mica.fast.disabled, **operators: int) -> Step:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return Step(Form(lambda: model(x), (x, *trained), context, model), dy, None, operators)

    def build(name: str) -> Step:
        if name == BARE:
            return step(bare)
        if name == LORA:
            return step(lora)
        model = lora if name == FAST_LORA else ours
        counts = ran | {"experts_grad_b": 2} if name == FAST_LORA else ran
        if ON_ACCELERATOR:
            counts = counts | {f"{operator}_kernels": times for operator, times in counts.items()}
        return checked(step(model, nullcontext, **counts), step(model).results(), GATES[cell.dtype])

    steps = build_all(cell.name, cell.implementations, build)
    facts = {name: memory(one) for name, one in steps.items()}
    return Prepared(steps, facts, iterations(seconds(steps[BARE])))


def memory(step: Step) -> dict[str, float]:
    """Megabytes: what a forward saves, and by how much memory grows within a step."""
    facts = {"saved_mb": step.saved_mb()}
    with step.form.context():
        step()  # the libraries' own buffers exist from here on
        with peak_growth() as grown:
            step()
    if grown() is not None:
        facts["peak_mb"] = grown() / 1e6
    return facts


@each(CELLS)
def bench_experts(cell):
    steps = prepared(cell.name, lambda: setting(cell))
    rounds(cell.name, cell.implementations, lambda once, _: steps.time(once, cell.axes), SECONDS)
