"""Host time: a decoder block whose tensors are so small that the code around the products decides.

On a GPU the host decides wherever a layer's kernels take less time than the code that launches them: with few
tokens, in small models, in decoding. Here kernels are compiled and handed to a driver that launches nothing
(tests/support/no_launch.py): all of the host's work is timed and none of the device's. Such a result has no
numbers to check; `mica.fast.call_counts` proves that it came from kernels. All other implementations are
checked first. One thread is timed by its CPU time, so that other processes of the machine count little.
"""

import functools
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModel, LlamaConfig

import mica.fast
from bench.measure.machine import ON_ACCELERATOR
from bench.results.names import BARE, BOTH, KERNELS, NO_GRADIENT, PYTORCH, STOCK, STOCK_16
from bench.suites.decoder import LINEAR_LAYERS, RANK, Work, adapted
from bench.suites.harness import turns
from bench.suites.steps import Step, check_all, operators
from mica.paths.products import has_native

no_launch = pytest.importorskip("tests.support.no_launch")  # imports Triton
pytestmark = pytest.mark.skipif(
    ON_ACCELERATOR, reason="on a CPU: Triton's driver is replaced for the whole process"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = 16
HIDDEN = 64
INTERMEDIATE = 128
# Relative differences of y, dx and dA from stock PEFT's, whose adapters compute in fp32
GATES = {"float32": 1e-5, "bfloat16": 2e-2}
CALLS = 50  # in a sample


@contextmanager
def kernels():
    """Required: one that is not available is an error, not the PyTorch form."""
    with no_launch.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICA_BACKEND", "triton")
        yield


CONTEXTS = {
    BARE: nullcontext,
    STOCK: mica.fast.disabled,
    STOCK_16: mica.fast.disabled,
    PYTORCH: nullcontext,
    KERNELS: kernels,
}


class Cell(NamedTuple):
    """A Llama of one block, with the rest of a model: masks, rotary embedding, norm, PEFT's wrapper."""

    dtype: str
    autocast: bool = False  # to bfloat16, as in `Trainer(bf16=True)`
    rounds: int = 9

    @property
    def key(self) -> str:
        """For ``-k``."""
        return f"block-{self.dtype}-autocast" if self.autocast else f"block-{self.dtype}"

    @property
    def name(self) -> str:
        what = f"a Llama with 1 block of {HIDDEN} / {INTERMEDIATE}, {TOKENS} tokens"
        name = f"host time of {what}, r = {RANK}, {self.dtype}"
        return f"{name}, autocast" if self.autocast else name

    @property
    def axes(self) -> dict[str, str | int]:
        axes = {"suite": "host block", "tokens": TOKENS, "layers": 1, "rank": RANK, "dtype": self.dtype}
        if self.autocast:
            axes["autocast"] = "bfloat16"
        return axes

    def implementations(self, part: str) -> list[str]:
        if self.dtype == "float32":
            return [BARE, STOCK, PYTORCH, KERNELS]
        return [BARE, STOCK, STOCK_16, PYTORCH, KERNELS]

    def context(self, name: str) -> Callable:
        """What an implementation runs within."""

        @contextmanager
        def within():
            with CONTEXTS[name](), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                yield

        return within


CELLS = [Cell("float32")]
if has_native(torch.bfloat16):
    CELLS += [Cell("bfloat16"), Cell("bfloat16", autocast=True)]


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> dict[str, Step]:
    """Each implementation with its own model."""
    torch.manual_seed(0)
    dtype = DTYPES[cell.dtype]
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=8,  # no tokens go in
        bos_token_id=None,
        eos_token_id=None,
    )
    bare = AutoModel.from_config(config, dtype=dtype).train().requires_grad_(False)
    x, dy = torch.randn(2, 1, TOKENS, HIDDEN, dtype=dtype).unbind()
    work = Work(bare, adapted(bare, 0.02), x, dy)

    def build(name: str) -> Step:
        ran = {}
        if name in (PYTORCH, KERNELS):
            ran = operators(LINEAR_LAYERS, on_kernels=name == KERNELS)
        return work.step(name, cell.context(name), ran)

    gates = dict.fromkeys(("y", "dx", "dA"), GATES[cell.dtype])
    unchecked = (BARE, KERNELS)
    return check_all(cell.name, cell.implementations(BOTH), build, gates, unchecked)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.thread_time)
@turns(CELLS, (NO_GRADIENT, BOTH))
def bench_host(once, gated, one_thread, cell, round_, part, implementation):
    """Without a gradient the operators choose which kernels they launch, if any."""
    group = f"{cell.name}, {part}"
    axes = {**cell.axes, "call": part}
    step = gated(group, lambda: setting(cell), implementation)[implementation]
    has_gradient = part == BOTH
    call = None if has_gradient else step.form.forward
    launches = no_launch.launches
    with torch.set_grad_enabled(has_gradient):
        # no work: what launches nothing has no throughput
        runs = step.time(once, group, implementation, axes, CALLS, call, work={})
    once.note(launches=(no_launch.launches - launches) / runs)
