"""Host time: a layer and a decoder block so small that the code around the products decides.

On a GPU the host decides wherever a layer's kernels take less time than the code that launches them: with few
tokens, in small models, in decoding. Here kernels are compiled and handed to a driver that launches nothing
(tests/support/no_launch.py): all of the host's work is timed and none of the device's. Such a result has no
numbers to check; `mica.fast.call_counts` proves that it came from kernels. All other implementations are
checked first.

On a CPU the products' own time is in these times: 2 to 4 µs each in fp32, 10 to 30 µs in 16 bits, where
oneDNN sets up every one. A cell "without products" has the same calls with products that compute nothing
(tests/support/no_products.py), as a device's host sees them.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModel

import mica.fast
from bench.measure.machine import ON_ACCELERATOR
from bench.results.names import BARE, BOTH, FAST, KERNELS, MICA, NO_GRADIENT, PLAIN_LORA, PYTHON, stock
from bench.suites import harness
from bench.suites.decoder import RANK, config_of, work_on
from bench.suites.harness import each_part
from bench.suites.rounds import Once, prepared, rounds
from bench.suites.steps import CONTEXTS, Step, check_all
from mica import native
from mica.paths.products import has_native
from tests.support import no_products

no_launch = pytest.importorskip("tests.support.no_launch")  # imports Triton
pytestmark = pytest.mark.skipif(
    ON_ACCELERATOR, reason="on a CPU: Triton's driver is replaced for the whole process"
)

TOKENS = 16
HIDDEN = 64
BLOCK = "64 / 128"
# Relative differences of y, dx and dA from stock PEFT's, whose adapters compute in fp32
GATES = {"float32": 1e-5, "bfloat16": 2e-2}
CALLS = {"layer": 300, "block": 50}  # in a sample


@contextmanager
def kernels():
    """Required: one that is not available is an error, not the reference path."""
    with no_launch.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICA_BACKEND", "triton")
        yield


@contextmanager
def from_python():
    """Required: as on a machine without a C++ compiler, where calls as small as these are left to PEFT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICA_NATIVE", "0")
        yield


WITHIN = {**CONTEXTS, PYTHON: from_python, KERNELS: kernels}


@dataclass(frozen=True)
class Cell(harness.Cell):
    """A linear layer alone, or a Llama of one block with all that is around it in a PEFT model."""

    kind: str  # "layer" or "block"
    dtype: str
    autocast: bool = False  # to bfloat16, as in `Trainer(bf16=True)`
    products: bool = True  # False: matrix products compute nothing
    adapter: str = MICA

    @property
    def axes(self) -> dict[str, str | int]:
        suite = f"host {self.kind}" if self.products else f"host {self.kind}, without products"
        axes = {"suite": suite, "adapter": self.adapter, "tokens": TOKENS, "rank": RANK}
        if self.autocast:
            axes["autocast"] = "bfloat16"
        return {**axes, "dtype": self.dtype}

    def implementations(self, part: str) -> list[str]:
        return [BARE, *stock(self.dtype, self.autocast), FAST, PYTHON, KERNELS]

    def context(self, name: str) -> Callable:
        """What an implementation runs within."""

        @contextmanager
        def within():
            before = mica.fast.call_counts["linear_native"]
            with WITHIN[name](), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                yield
            from_cpp = mica.fast.call_counts["linear_native"] > before
            assert from_cpp == (name == FAST and native.why_not() is None), f"{name} ran from C++: {from_cpp}"

        return within


CELLS = []
for kind, products in (("layer", True), ("layer", False), ("block", True)):
    if not products and native.why_not() is not None:  # no compiler
        continue
    for adapter in (MICA, PLAIN_LORA):
        CELLS.append(Cell(kind, "float32", products=products, adapter=adapter))
        if has_native(torch.bfloat16):
            CELLS.append(Cell(kind, "bfloat16", products=products, adapter=adapter))
            CELLS.append(Cell(kind, "bfloat16", autocast=True, products=products, adapter=adapter))


def layer_of(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=dtype))


def alone(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The call of the one layer, without the model around it."""
    layer = model[0] if isinstance(model, nn.Sequential) else model.base_model.model[0]
    return layer(x)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> dict[str, Step]:
    """Each implementation with its own model."""
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    shape = (1, TOKENS, HIDDEN)
    if cell.kind == "layer":
        work = work_on(layer_of(dtype), shape, cell.adapter, ["0"], alone)
    else:
        work = work_on(AutoModel.from_config(config_of(BLOCK), dtype=dtype), shape, cell.adapter)

    def build(name: str) -> Step:
        return work.step(name, cell.context(name), on_kernels=name == KERNELS)

    gates = dict.fromkeys(("y", "dx", "dA"), GATES[cell.dtype])
    unchecked = (BARE, KERNELS)
    return check_all(cell.name, cell.implementations(BOTH), build, gates, unchecked)


@each_part(CELLS, (NO_GRADIENT, BOTH))
def bench_host(cell, part):
    """Without a gradient the operators choose which kernels they launch, if any."""
    group = f"{cell.name}, {part}"
    axes = {**cell.axes, "call": part}
    steps = prepared(group, lambda: setting(cell))
    has_gradient = part == BOTH

    def sample(once: Once, name: str) -> None:
        step = steps[name]
        call = None if has_gradient else step.form.forward
        launches = no_launch.launches
        products = nullcontext() if cell.products else no_products.installed()
        with products, torch.set_grad_enabled(has_gradient):
            # no work: what launches nothing has no throughput
            runs = step.time(once, axes, CALLS[cell.kind], call, work={})
        once.note(launches=(no_launch.launches - launches) / runs)

    rounds(group, cell.implementations(part), sample)
