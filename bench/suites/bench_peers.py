"""One MLP block, and one layer, with LoRA or DoRA by the autograd functions of peers, on a CPU; r = 16.

Unsloth, axolotl and NeMo Automodel patch a model with these functions. They come from wheels in the folder
that ``MICA_BENCH_PEERS`` names (`bench.suites.peers`); without it this suite is skipped. Each result is first
compared with stock PEFT's in fp64. Adapters are in fp32, as PEFT makes them, or in the base's dtype where a
peer demands that. Time of forward + backward, and the bytes that a forward keeps.
"""

import copy
import functools
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from bench.measure.clocks import seconds
from bench.measure.machine import ON_ACCELERATOR
from bench.results.names import BARE, DORA, FAST, PLAIN_LORA, STOCK, stock
from bench.suites import harness, peers
from bench.suites.decoder import RANK, cast, work_on
from bench.suites.harness import build_all, each, iterations
from bench.suites.peers import Peer
from bench.suites.rounds import prepared, rounds
from bench.suites.steps import Prepared, Step, checked, with_bytes

PEERS = {} if ON_ACCELERATOR else peers.found()
pytestmark = pytest.mark.skipif(not PEERS, reason=f"on a CPU, with {peers.VARIABLE}: a folder of wheels")
TOKENS = 512
GATES = {"bfloat16": {"y": 1e-2, "dx": 2e-2, "dA": 2e-2}, "float32": {"y": 1e-5, "dx": 1e-5, "dA": 1e-5}}


@dataclass(frozen=True)
class Cell(harness.Cell):
    """An MLP block; without ``intermediate`` one square layer."""

    hidden: int
    intermediate: int = 0
    dtype: str = "bfloat16"
    adapter: str = PLAIN_LORA

    @property
    def axes(self) -> dict[str, str | int]:
        return {
            "suite": "peers",
            "model": "MLP block" if self.intermediate else "layer",
            "adapter": self.adapter,
            "tokens": TOKENS,
            "out": self.intermediate or self.hidden,
            "in": self.hidden,
            "rank": RANK,
            "dtype": self.dtype,
        }

    @property
    def implementations(self) -> list[str]:
        of_peers = [name for name, peer in PEERS.items() if peer.has_dora or self.adapter != DORA]
        return [BARE, *stock(self.dtype), FAST, *of_peers]


CELLS = [
    Cell(576, 1536),
    Cell(576, 1536, "float32"),
    Cell(2048, 8192),
    Cell(576),
    Cell(2048),
    Cell(576, 1536, adapter=DORA),
    Cell(576, 1536, "float32", DORA),
]


def bare_of(cell: Cell) -> nn.Module:
    """An MLP with SwiGLU, or one layer, ``proj``."""
    if not cell.intermediate:
        return nn.Sequential(OrderedDict(proj=nn.Linear(cell.hidden, cell.hidden, bias=False)))
    sizes = {"hidden_size": cell.hidden, "intermediate_size": cell.intermediate}
    return LlamaMLP(LlamaConfig(num_attention_heads=1, num_key_value_heads=1, **sizes))


def call_of(peer: Peer, model: nn.Module, x: Tensor) -> Tensor:
    """By a peer's function, of a model with adapters."""
    wrapped = model.base_model.model
    return peer.linear(wrapped.proj, x) if hasattr(wrapped, "proj") else peer.mlp(wrapped, x)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Prepared:
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    bare = bare_of(cell).to(dtype)
    targets = [name for name, layer in bare.named_modules() if isinstance(layer, nn.Linear)]
    work = work_on(bare, (1, TOKENS, cell.hidden), cell.adapter, targets, nn.Module.__call__)
    exact = work._replace(
        masters=copy.deepcopy(work.masters).double(),
        x=work.x.double(),
        grad_output=work.grad_output.double(),
    )
    expected = exact.step(STOCK).results()

    def build(name: str) -> Step:
        if name == BARE:
            return work.step(name)
        peer = PEERS.get(name)
        if peer is None:
            return checked(work.step(name), expected, GATES[cell.dtype])
        own = work._replace(call=functools.partial(call_of, peer))
        if not peer.has_masters:
            own = own._replace(masters=cast(copy.deepcopy(work.masters), dtype))
        return checked(own.step(name, nullcontext), expected, GATES[cell.dtype])

    steps = build_all(cell.name, cell.implementations, build)
    return with_bytes(steps, iterations(seconds(steps[BARE])))


@each(CELLS)
def bench_peers(cell):
    steps = prepared(cell.name, lambda: setting(cell))
    rounds(cell.name, cell.implementations, lambda once, _: steps.time(once, cell.axes))
