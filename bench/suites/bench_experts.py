"""A layer of experts of random weights: forward + backward, 64 experts of which 8 process a token, r = 16.

Both of its stacks are adapted. Implementations: the bare frozen layer, PEFT's LoRA on the same
``target_parameters`` (stock PEFT has no MiCA there), which forms W + s·B·A of all experts and its gradient,
and MiCA on mica.fast. Targets: at most half of LoRA's time, and half of the memory that its step adds.
"""

import copy
import functools
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import mica.fast
from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.measure.memory import peak_growth, saved_bytes
from bench.results.names import BARE, FAST, LORA
from bench.suites.harness import build_all, iterations, pick
from bench.suites.layer import Form
from bench.suites.steps import Step, checked
from mica.fast.loading import without_solver

RANK = 16
EXPERTS, TOP_K = pick(default=(64, 8), dry=(4, 2))
ROUNDS = pick(default=4, quick=3, full=6, cuda=10, dry=1)
IMPLEMENTATIONS = (BARE, LORA, FAST)
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
# Relative differences from PEFT's own path with the same MiCA adapters
GATES = {
    torch.float32: {"y": 1e-5, "dx": 1e-5, "dA": 1e-5},
    torch.bfloat16: {"y": 1e-2, "dx": 2e-2, "dA": 2e-2},
}


class Cell(NamedTuple):
    tokens: int
    hidden: int
    intermediate: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens} tokens, {EXPERTS} experts of {self.hidden} and {self.intermediate}, {dtype}"


# the widest are those of OLMoE-1B-7B
CELLS = pick(
    quick=[Cell(1024, 1024, 512, torch.float32)],
    default=[Cell(1024, 1024, 512, torch.float32), Cell(1024, 2048, 1024, torch.float32)],
    cuda=[Cell(4096, 2048, 1024, torch.bfloat16)],
    dry=[Cell(8, 32, 16, torch.float32)],
)


class _Layer(nn.Module):
    """The experts with a fixed routing: PEFT needs a module around what it wraps."""

    def __init__(self, cell: Cell):
        super().__init__()
        config = OlmoeConfig(
            hidden_size=cell.hidden,
            intermediate_size=cell.intermediate,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        )
        config._experts_implementation = "grouped_mm"  # what transformers chooses
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        self.experts = experts.to_empty(device=DEVICE).to(cell.dtype).requires_grad_(False)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
        scores = torch.rand(cell.tokens, EXPERTS, device=DEVICE).topk(TOP_K)
        self.index, self.weights = scores.indices, scores.values.to(cell.dtype)

    def forward(self, x):
        return self.experts(x, self.index, self.weights)


def _adapted(bare: nn.Module, init: str | bool) -> nn.Module:
    """The layer with adapters whose B is orthonormal and whose A is not 0; the base weights are shared."""
    memo = {id(weight): weight for weight in bare.parameters()}
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=init, target_parameters=TARGETS)
    config.target_modules = []
    with without_solver():
        model = get_peft_model(copy.deepcopy(bare, memo), config)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            scale = 0.02 if ".lora_A." in name else weight.shape[0] ** -0.5
            weight.data.normal_(0, scale, generator=generator)
    return model


def _step(model: nn.Module, x, dy, context, ran: dict[str, int]) -> Step:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return Step(Form(lambda: model(x), (x, *trained), context, model), dy, None, ran)


class Setting(NamedTuple):
    steps: dict[str, Step]
    facts: dict[str, dict[str, float]]
    iterations: int


@functools.lru_cache(maxsize=1)
def setting(cell: Cell, group: str) -> Setting:
    torch.manual_seed(0)
    bare = _Layer(cell)
    x, dy = torch.randn(2, cell.tokens, cell.hidden, device=DEVICE).to(cell.dtype).unbind()
    x = x.clone().requires_grad_()
    ran = {"experts_linear": 2, "experts_linear_backward": 2}
    if ON_ACCELERATOR:
        ran |= {f"{name}_kernels": count for name, count in ran.items()}
    adapted = _adapted(bare, "mica")
    builds = {
        BARE: lambda: _step(bare, x, dy, mica.fast.disabled, {}),
        LORA: lambda: _step(_adapted(bare, True), x, dy, mica.fast.disabled, {}),
        FAST: lambda: checked(
            _step(adapted, x, dy, nullcontext, ran),
            _step(adapted, x, dy, mica.fast.disabled, {}).results(),
            GATES[cell.dtype],
        ),
    }
    steps = build_all(group, builds, lambda name: builds[name]())
    facts = {}
    for name, step in steps.items():
        form = step.form
        with form.context():
            saved = saved_bytes(form.forward, [form.module]) / 1e6
            step()  # the libraries' own buffers exist from here on
            with peak_growth() as grown:
                step()
        growth = grown()
        facts[name] = {"saved_mb": saved} | ({} if growth is None else {"peak_mb": growth / 1e6})
    return Setting(steps, facts, iterations(seconds(steps[BARE])))


# the first named parameter is the innermost loop: implementations take turns within a round
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def bench_experts(once, gated, cell, round_, implementation):
    group = f"experts, {cell.key}, {TOP_K} a token, r = {RANK}, forward + backward"
    layer = gated(group, lambda: setting(cell, group), implementation)
    axes = {"suite": "experts", "tokens": cell.tokens, "out": cell.hidden, "in": cell.intermediate}
    axes |= {"rank": RANK, "dtype": str(cell.dtype).removeprefix("torch.")}
    facts = layer.facts[implementation] if round_ == 0 else {}
    layer.steps[implementation].time(once, group, implementation, axes, layer.iterations, **facts)
