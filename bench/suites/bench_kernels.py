"""Each skinny kernel in all its configurations, compared with a copy that moves as many bytes.

All of them are memory-bound, so a kernel is as good as the share of the copy's bandwidth that it reaches:
``bytes`` is what a launch must read and write once. Each configuration is checked against `mica.reference` in
fp64 and refused individually. At the end the library tunes itself on the layers of `bench_layer`, and leaves
its table next to the results.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.measure.machine import DEVICE
from bench.results import journal
from bench.results.names import COPY, DOWN_A, DOWN_B, GRAD_A, UP_B
from bench.suites.bench_layer import CELLS as LAYERS
from bench.suites.harness import build_all, needs_accelerator, pick, refusals
from bench.suites.layer import make_layer
from mica import reference
from mica.ops import call_counts, mica_linear
from tests.support.tolerances import RELATIVE, error

pytest.importorskip("triton")

from mica.kernels import tuning
from mica.kernels.common import target_of
from mica.kernels.configs import Config
from mica.kernels.down_projection import down_projection, plan_down_projection
from mica.kernels.grad_a import grad_a, plan_grad_a
from mica.kernels.launching import Launch
from mica.kernels.limits import padded_columns
from mica.kernels.up_projection import plan_up_projection, up_projection_

pytestmark = needs_accelerator

ROUNDS, ITERATIONS = pick(default=1, cuda=4), pick(default=1, cuda=50)
DTYPE = torch.bfloat16
NAMES = {"down-A": DOWN_A, "down-B": DOWN_B, "up-B": UP_B, "grad_a": GRAD_A}


class Cell(NamedTuple):
    """A kernel on a matrix of activations, tokens x features."""

    kernel: str
    tokens: int
    features: int
    rank: int

    @property
    def axes(self) -> dict[str, str | int]:
        sizes = {"tokens": self.tokens, "features": self.features, "rank": self.rank}
        return {"suite": "kernels", "kernel": NAMES[self.kernel], **sizes, "dtype": "bfloat16"}

    @property
    def name(self) -> str:
        kernel = NAMES[self.kernel]
        return f"{kernel}, {self.tokens} tokens, {self.features} features, r = {self.rank}, bfloat16"

    @property
    def key(self) -> str:
        """For ``-k``."""
        return f"{self.kernel}-{self.tokens}x{self.features}-r{self.rank}"


SIZES = pick(
    quick=[(40, 64, 16)],
    default=[],
    cuda=[*((tokens, 4096, rank) for rank in (16, 64) for tokens in (8192, 2048, 512)), (8192, 14336, 16)],
)
CELLS = [Cell(kernel, *sizes) for sizes in SIZES for kernel in NAMES]


class Work(NamedTuple):
    """What is launched: ``run(*operands, **options)``, by the ``plan`` of the same arguments."""

    plan: Callable
    run: Callable[..., Tensor]
    operands: tuple
    options: dict


def work_of(cell: Cell, device: str) -> Work:
    """With operands as the library passes them; on the device "meta" without their numbers."""
    rank, columns = cell.rank, padded_columns(cell.rank)

    def matrix(rows: int, width: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(rows, width, device=device, dtype=dtype)

    wide, low = matrix(cell.tokens, cell.features), matrix(cell.tokens, columns)
    if cell.kernel == "grad_a":
        return Work(plan_grad_a, grad_a, (low, wide, rank), {})
    if cell.kernel == "down-A":
        factor = matrix(rank, cell.features, torch.float32)
    else:
        factor = matrix(cell.features, columns).t()
    if cell.kernel == "up-B":
        return Work(plan_up_projection, up_projection_, (wide, low, factor), {})
    return Work(plan_down_projection, down_projection, (wide, factor), {"compute_dtype": DTYPE})


EXACT = {  # of the operands in fp64
    "down-A": lambda x, A: reference.down_projection(x, A, 1.0, x.dtype),
    "down-B": lambda dy, B_t: reference.down_projection(dy, B_t, 1.0, dy.dtype),
    "up-B": lambda y, h, B_t: reference.up_projection(y, h, B_t.t()),
    "grad_a": lambda g, x, rank: reference.grad_a(g, x),
}


@functools.cache
def implementations(cell: Cell) -> dict[str, Config | None]:
    """The copy, then every configuration of the kernel's table, the default first."""
    work = work_of(cell, "meta")
    table = work.plan(*work.operands, **work.options, target=target_of(torch.device(DEVICE))).configs
    named = {f"{NAMES[cell.kernel]}, {'x'.join(map(str, config))}": config for config in table}
    return {COPY: None, **named}


def launch_bytes(launch: Launch, out: Tensor) -> int:
    """What a launch must read and write once: its operands, and its output twice where it is updated."""
    ignored = ("counter_ptr", "partial_ptr")
    operands = [t for name, t in launch.args.items() if isinstance(t, Tensor) and name not in ignored]
    once = sum(t.numel() * t.element_size() for t in {id(t): t for t in operands}.values())
    is_updated = launch.args.get("base_ptr") is out
    return once + (out.numel() * out.element_size() if is_updated else 0)


def copy(size: int) -> Callable[[], object]:
    """Reads and writes ``size`` bytes in total."""
    source, target = (torch.zeros(size // 2, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return lambda: target.copy_(source)


def checked(work: Work, config: Config, truth: Tensor) -> Callable[[], Tensor]:
    """The call with this configuration, once its result is right; the first operand may be updated."""
    first, *others = work.operands
    result, limit = work.run(first.clone(), *others, **work.options, config=config), RELATIVE[DTYPE]
    wrong = error(result, truth)
    assert wrong <= limit, f"the relative error is {wrong:.2e}, above {limit:.0e}"
    return functools.partial(work.run, *work.operands, **work.options, config=config)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> tuple[dict[str, Callable], int]:
    """implementation -> its call, and the bytes that each of them moves."""
    torch.manual_seed(0)
    work = work_of(cell, DEVICE)
    out, launch = work.plan(*work.operands, **work.options).bound()
    size = launch_bytes(launch, out)
    wide = [tensor.double() if isinstance(tensor, Tensor) else tensor for tensor in work.operands]
    truth = EXACT[cell.kernel](*wide)
    configs = implementations(cell)

    def build(name: str) -> Callable[[], object]:
        return copy(size) if configs[name] is None else checked(work, configs[name], truth)

    return build_all(cell.name, configs, build), size


# the first named parameter is the innermost loop: implementations take turns within a round
def cases():
    for cell in CELLS:
        for round_ in range(ROUNDS):
            for name, config in implementations(cell).items():
                key = "x".join(map(str, config)) if config else COPY
                yield pytest.param(cell, round_, name, id=f"{cell.key}-{round_}-{key}")


@pytest.mark.parametrize(("cell", "round_", "implementation"), cases())
def bench_kernels(once, gated, cell, round_, implementation):
    calls, size = gated(cell.name, lambda: setting(cell), implementation)
    once(
        calls[implementation],
        cell.name,
        implementation,
        cell.axes,
        ITERATIONS,
        warm_up=True,
        all_clocks=True,
        bytes=size,
    )


TUNED = "the tuner's table"


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Where the tuner writes: next to the journal. A process that continues keeps what is there."""
    folder = os.environ.get(journal.VARIABLE)
    file = (Path(folder).parent if folder else tmp_path) / "tuning.json"
    if not any(group == TUNED for group, _ in refusals):
        file.unlink(missing_ok=True)
    monkeypatch.setenv("MICA_TUNE_FILE", str(file))
    yield file
    monkeypatch.undo()
    tuning.forget()


def results(layer) -> list[Tensor]:
    operands = layer.x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling
    before = call_counts["linear_kernels"]
    y = mica_linear(*operands)
    assert call_counts["linear_kernels"] == before + 1, "no kernels ran"
    return [y.detach(), *torch.autograd.grad(y, (layer.x, layer.lora_A), layer.grad_output)]


def tune(cell, monkeypatch) -> None:
    """Untuned and tuned, which measures what has no entry yet: the same numbers."""
    layer = make_layer(cell.tokens, cell.out, cell.inner, cell.rank, DTYPE, DEVICE)
    outputs = []
    for word in ("0", "1"):
        monkeypatch.setenv("MICA_TUNE", word)
        tuning.forget()
        outputs.append(results(layer))
    for what, default, tuned in zip(("y", "dx", "dA"), *outputs, strict=True):
        wrong, limit = error(tuned, default), RELATIVE[DTYPE]
        assert wrong <= limit, f"{what} is {wrong:.2e} off the untuned one, above {limit:.0e}"


def test_tuning_table(table, monkeypatch):
    """On the layers of rank 16 only: an entry holds for one rank, and each further one takes seconds."""
    layers = {cell.key: cell for cell in LAYERS if cell.rank == 16}
    done = build_all(TUNED, layers, lambda key: tune(layers[key], monkeypatch))
    assert done.keys() == layers.keys(), f"not tuned: {[*layers.keys() - done.keys()]}"
    entries = json.loads(table.read_text())
    kinds = {entry.partition(" | ")[0] for entry in entries}
    assert {"linear", "linear_backward", "down_projection", "up_projection"} <= kinds, (
        f"entries for {kinds} only"
    )
