"""Layers of experts of random weights, both stacks adapted, r = 16: initialisation, forward and backward.

*Step*: 64 experts of which 8 process a token. Implementations: the bare frozen layer, PEFT's LoRA on the same
``target_parameters`` (stock PEFT has no MiCA there), which forms W + s·B·A of all experts and its gradient,
and MiCA on mica.fast. Targets: at most half of LoRA's time, and half of the memory that its step adds.

*Initialisation*: `get_peft_model` on a stack of 768 x 2048 in fp32 (the down projection of Qwen3-30B-A3B)
against a loop of SVDs over its experts, which is what stock PEFT's initialisation of a linear layer would do
for each. A basis that is not certified refuses the number.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import mica.fast
from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.measure.memory import peak_growth, saved_bytes
from bench.results.names import BARE, FAST, LORA, SVD
from bench.results.throughput import FLOP, MATRICES, gram_flop
from bench.suites.harness import build_all, iterations, pick, whole_turns
from bench.suites.layer import Form
from bench.suites.steps import Step, checked
from mica.fast.forward.expert_params import lora_B_of
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
    dtype: torch.dtype = torch.float32
    rounds: int = ROUNDS
    implementations: tuple[str, ...] = IMPLEMENTATIONS

    @property
    def axes(self) -> dict[str, str | int]:
        axes = {"suite": "experts", "tokens": self.tokens, "out": self.hidden, "in": self.intermediate}
        return axes | {"rank": RANK, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def name(self) -> str:
        what = f"{self.tokens} tokens, {EXPERTS} experts of {self.hidden} and {self.intermediate}"
        how = f"{self.axes['dtype']}, {TOP_K} a token, r = {RANK}, forward + backward"
        return f"experts, {what}, {how}"


# the widest are those of OLMoE-1B-7B
CELLS = pick(
    quick=[Cell(1024, 1024, 512)],
    default=[Cell(1024, 1024, 512), Cell(1024, 2048, 1024)],
    cuda=[Cell(4096, 2048, 1024, torch.bfloat16)],
    dry=[Cell(8, 32, 16)],
)


class _Layer(nn.Module):
    """The experts with a fixed routing: PEFT needs a module around what it wraps."""

    def __init__(self, cell: Cell):
        super().__init__()
        sizes = {"hidden_size": cell.hidden, "intermediate_size": cell.intermediate}
        config = OlmoeConfig(num_experts=EXPERTS, num_experts_per_tok=TOP_K, **sizes)
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


def adapted(bare: nn.Module, init: str | bool, rank: int, targets: list[str]) -> nn.Module:
    """PEFT's model, around the same base weights."""
    memo = {id(weight): weight for weight in bare.parameters()}
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights=init, target_parameters=targets, target_modules=[]
    )
    return get_peft_model(copy.deepcopy(bare, memo), config)


def _random(bare: nn.Module, init: str | bool) -> nn.Module:
    """With adapters whose A is not 0, and no initialisation."""
    with without_solver():
        model = adapted(bare, init, RANK, TARGETS)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            scale = 0.02 if ".lora_A." in name else weight.shape[0] ** -0.5
            weight.data.normal_(0, scale, generator=generator)
    return model


class Setting(NamedTuple):
    steps: dict[str, Step]
    facts: dict[str, dict[str, float]]
    iterations: int


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Setting:
    torch.manual_seed(0)
    bare = _Layer(cell)
    x, dy = torch.randn(2, cell.tokens, cell.hidden, device=DEVICE).to(cell.dtype).unbind()
    x = x.clone().requires_grad_()
    ran = {"experts_linear": 2, "experts_linear_backward": 2}
    if ON_ACCELERATOR:
        ran |= {f"{name}_kernels": count for name, count in ran.items()}
    ours = _random(bare, "mica")

    def step(model: nn.Module, context=mica.fast.disabled, **operators: int) -> Step:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return Step(Form(lambda: model(x), (x, *trained), context, model), dy, None, operators)

    builds = {
        BARE: lambda: step(bare),
        LORA: lambda: step(_random(bare, True)),
        FAST: lambda: checked(step(ours, nullcontext, **ran), step(ours).results(), GATES[cell.dtype]),
    }
    steps = build_all(cell.name, builds, lambda name: builds[name]())
    facts = {}
    for name, one in steps.items():
        with one.form.context():
            facts[name] = {"saved_mb": saved_bytes(one.form.forward, [one.form.module]) / 1e6}
            one()  # the libraries' own buffers exist from here on
            with peak_growth() as grown:
                one()
        if grown() is not None:
            facts[name]["peak_mb"] = grown() / 1e6
    return Setting(steps, facts, iterations(seconds(steps[BARE])))


@whole_turns(CELLS)
def bench_experts(once, gated, cell, round_, implementation):
    layer = gated(cell.name, lambda: setting(cell), implementation)
    facts = layer.facts[implementation] if round_ == 0 else {}
    step = layer.steps[implementation]
    step.time(once, cell.name, implementation, cell.axes, layer.iterations, **facts)


MANY, FEW = (128, 768, 2048), (8, 768, 2048)  # experts, out, in
STACK = pick(default=(32, *MANY[1:]), quick=FEW, full=MANY, dry=(3, 48, 64))
STACK_RANK, STACK_ROUNDS = pick(default=16, dry=4), pick(default=3, quick=2, full=2, cuda=2, dry=1)
STACK_GROUP = "experts init, {} experts of {} x {}".format(*STACK)


def loop(stack: Tensor) -> list[Tensor]:
    return [torch.linalg.svd(weight, full_matrices=False).U[:, -STACK_RANK:] for weight in stack]


def energy(stack: Tensor, basis: Tensor) -> Tensor:
    """‖BᵀW‖² of each expert: larger for any other subspace."""
    return (basis.mT @ stack).square().sum((1, 2))


@functools.cache
def initialisations() -> dict[str, Callable]:
    stack = torch.randn(STACK, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bare = nn.ModuleDict({"experts": nn.ParameterDict({"down_proj": stack})}).requires_grad_(False)

    def wrapped():
        return adapted(bare, "mica", STACK_RANK, TARGETS[1:]).base_model.model["experts"]

    def build(name: str) -> Callable:
        if name == SVD:
            return lambda: loop(stack)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is not certified is said in a warning
            bases = lora_B_of(wrapped(), "default").detach()
        error = float((bases.mT @ bases - torch.eye(STACK_RANK, device=DEVICE)).abs().max())
        assert error <= 1e-5, f"BᵀB is off by {error:.1e}"
        few = stack[:2]
        excess = float((energy(few, bases[:2]) / energy(few, torch.stack(loop(few))) - 1).abs().max())
        assert excess <= 1e-3, f"‖BᵀW‖² differs from the SVD's by {excess:.1e}"
        return wrapped

    return build_all(STACK_GROUP, [SVD, FAST], build)


@pytest.mark.parametrize("implementation", [SVD, FAST])
@pytest.mark.parametrize("round_", range(STACK_ROUNDS))
def bench_experts_initialisation(once, gated, round_, implementation):
    calls = gated(STACK_GROUP, initialisations, implementation)
    axes = {"suite": "experts init", **dict(zip(("experts", "out", "in"), STACK, strict=True))}
    experts, *shape = STACK
    work = {MATRICES: experts, FLOP: experts * gram_flop(*shape)}
    once(calls[implementation], STACK_GROUP, implementation, axes | {"rank": STACK_RANK}, work=work)
