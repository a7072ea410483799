"""One MLP block, and one layer, with plain LoRA by the autograd functions of peers, on a CPU; r = 16.

Unsloth, axolotl and NeMo Automodel patch a model with these functions. They come from wheels in the folder
that ``MICA_BENCH_PEERS`` names (`bench.suites.peers`); without it this suite is skipped. Each result is first
compared with the fp64 definition. Adapters are in fp32, as PEFT makes them, or in the base's dtype where a
peer demands that. Time of forward + backward, and the bytes that a forward keeps.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure.clocks import seconds
from bench.measure.machine import ON_ACCELERATOR
from bench.results.names import BARE, FAST, PLAIN_LORA, STOCK_16, stock
from bench.suites import peers
from bench.suites.decoder import RANK, adapted, cast
from bench.suites.harness import build_all, each, iterations
from bench.suites.layer import Form
from bench.suites.rounds import prepared, rounds
from bench.suites.steps import CONTEXTS, Prepared, Step, checked, operators
from tests.support import definition

PEERS = {} if ON_ACCELERATOR else peers.found()
pytestmark = pytest.mark.skipif(not PEERS, reason=f"on a CPU, with {peers.VARIABLE}: a folder of wheels")
TOKENS = 512
A_SCALE = 0.02
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
GATES = {"bfloat16": {"y": 1e-2, "dx": 2e-2, "dA": 2e-2}, "float32": {"y": 1e-5, "dx": 1e-5, "dA": 1e-5}}


class Cell(NamedTuple):
    """An MLP block; without ``intermediate`` one square layer."""

    hidden: int
    intermediate: int = 0
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        """For ``-k``."""
        return f"{self.hidden}x{self.intermediate or self.hidden}-{self.dtype}"

    @property
    def kind(self) -> str:
        return "MLP block" if self.intermediate else "layer"

    @property
    def name(self) -> str:
        sizes = f"{self.hidden} x {self.intermediate or self.hidden}"
        return f"{self.kind} of peers, {sizes}, {TOKENS} tokens, LoRA, r = {RANK}, {self.dtype}"

    @property
    def axes(self) -> dict[str, str | int]:
        return {
            "suite": "peers",
            "model": self.kind,
            "adapter": PLAIN_LORA,
            "tokens": TOKENS,
            "out": self.intermediate or self.hidden,
            "in": self.hidden,
            "rank": RANK,
            "dtype": self.dtype,
        }

    @property
    def implementations(self) -> list[str]:
        return [BARE, *stock(self.dtype), FAST, *PEERS]


CELLS = [Cell(576, 1536), Cell(576, 1536, "float32"), Cell(2048, 8192), Cell(576), Cell(2048)]


class Block(nn.Module):
    """An MLP with SwiGLU, or one layer."""

    def __init__(self, cell: Cell, dtype: torch.dtype):
        super().__init__()
        options = {"bias": False, "dtype": dtype}
        if not cell.intermediate:
            self.proj = nn.Linear(cell.hidden, cell.hidden, **options)
            return
        self.gate_proj = nn.Linear(cell.hidden, cell.intermediate, **options)
        self.up_proj = nn.Linear(cell.hidden, cell.intermediate, **options)
        self.down_proj = nn.Linear(cell.intermediate, cell.hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.by(nn.Module.__call__, x)

    def by(self, linear, x: Tensor) -> Tensor:
        """``linear(layer, x)``: how a layer is computed."""
        if hasattr(self, "proj"):
            return linear(self.proj, x)
        return linear(self.down_proj, F.silu(linear(self.gate_proj, x)) * linear(self.up_proj, x))


def defined(layer: nn.Module, x: Tensor) -> Tensor:
    return definition.linear(x, *peers.factors(layer))


def step_of(cell: Cell, model: nn.Module, call, operands: Tensor, context, **ran: int) -> Step:
    x, grad_output = operands.unbind()
    x = x.clone().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Step(Form(lambda: call(x), (x, *trained), context, model), grad_output, None, ran)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    torch.manual_seed(0)
    dtype = DTYPES[cell.dtype]
    bare = Block(cell, dtype).requires_grad_(False)
    targets = [name for name, _ in bare.named_children()]
    masters = adapted(bare, A_SCALE, targets, PLAIN_LORA)
    operands = torch.randn(2, 1, TOKENS, cell.hidden, dtype=dtype)
    exact = copy.deepcopy(masters).double().base_model.model
    by_definition = functools.partial(exact.by, defined)
    expected = step_of(cell, exact, by_definition, operands.double(), CONTEXTS[BARE]).results()

    def build(name: str) -> Step:
        if name == BARE:
            return step_of(cell, bare, bare, operands, CONTEXTS[BARE])
        model = copy.deepcopy(masters).base_model.model
        peer = PEERS.get(name)
        if name == STOCK_16 or (peer is not None and not peer.has_masters):
            cast(model, dtype)
        if peer is None:
            ran = operators(len(targets)) if name == FAST else {}
            step = step_of(cell, model, model, operands, CONTEXTS[name], **ran)
        else:
            call = functools.partial(peer.mlp, model)
            if not cell.intermediate:
                call = functools.partial(peer.linear, model.proj)
            step = step_of(cell, model, call, operands, CONTEXTS[BARE])
        return checked(step, expected, GATES[cell.dtype])

    steps = build_all(cell.name, cell.implementations, build)
    facts = {name: {"saved_mb": step.saved_mb()} for name, step in steps.items()}
    return Prepared(steps, facts, iterations(seconds(steps[BARE])))


@each(CELLS)
def bench_peers(cell):
    steps = prepared(cell.name, lambda: setting(cell))
    rounds(cell.name, cell.implementations, lambda once, _: steps.time(once, cell.axes))
