"""One adapted linear layer, forward and backward, against everything it can be compared with.

From one layer (2048 x 2048, 1024 tokens, r = 16, bf16) one axis varies at a time: tokens, rank, shape, dtype.
Beside that stands a grid of few tokens by rank, where calls cost as much as products do; a full run has one
of all tokens. All rivals of a cell compute with the same x, W, A and B; each of their y, dx and dA is checked
against `mica.reference` before anything is timed. The forward is timed with a gradient to come and without,
the backward on a graph that is kept.
"""

import functools
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import mica.fast
from bench.harness import DEVICE, iterations, pick
from bench.layer import AtenControl, adapted_module, exact, make_layer, relative_errors
from bench.results import ATEN, BACKWARD, BARE, COMPILED, FAST, FORWARD, LORA, NO_GRADIENT, STOCK, STOCK_16
from bench.saved import saved_bytes
from mica.products import has_native

ROUNDS = pick(quick=5, default=6)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Relative errors of y, dx and dA that no layer should pass, and the dtype of the truth: fp64 takes seconds
# for a large layer, and fp32 is as good as exact for bf16.
GATES = {"bfloat16": (1.5e-2, torch.float32), "float32": (1e-5, torch.float64)}


class Cell(NamedTuple):
    """One layer; ``compiled``: also torch.compile's, which takes some ten seconds to build."""

    tokens: int = 1024
    out: int = 2048
    inner: int = 2048
    rank: int = 16
    dtype: str = "bfloat16"
    compiled: bool = False

    @property
    def axes(self) -> dict[str, str | int]:
        shape = {"tokens": self.tokens, "out": self.out, "in": self.inner}
        return {"suite": "layer", **shape, "rank": self.rank, "dtype": self.dtype}

    @property
    def key(self) -> str:
        """For ``-k``."""
        return f"{self.tokens}x{self.out}x{self.inner}-r{self.rank}-{self.dtype}"

    @property
    def rounds(self) -> int:
        """Fewer of layers that take a second and more, whose times scatter less."""
        return ROUNDS if self.tokens * self.out * self.inner < 2**34 else min(ROUNDS, 4)

    def group(self, part: str) -> str:
        return (
            f"layer, {self.tokens} tokens, {self.out} x {self.inner}, r = {self.rank}, {self.dtype}, {part}"
        )


def grid(tokens: tuple, shapes: tuple, ranks: tuple) -> list[Cell]:
    """Every combination, in both dtypes."""
    return [
        Cell(count, *shape, rank, dtype)
        for dtype, shape, rank, count in itertools.product(DTYPES, shapes, ranks, tokens)
    ]


def chosen(cells: list[Cell]) -> list[Cell]:
    """Each once; no bf16 where the processor has no instructions for it and a product may take a minute."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if DEVICE != "cpu" or has_native(DTYPES[cell.dtype]):
            found.setdefault(cell.key, cell)
    return [*found.values()]


COMPILED_TOKENS = (256, 1024)
SHAPES, RANKS = ((576, 576), (1536, 576), (2048, 2048)), (4, 16, 64, 128)
AXES = [
    *(Cell(tokens, compiled=tokens in COMPILED_TOKENS) for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)),
    *(Cell(rank=rank) for rank in (4, 32, 64, 128)),
    *(Cell(tokens, dtype="float32", compiled=tokens == 1024) for tokens in (128, 256, 1024, 4096)),
    *(Cell(1024, *shape) for shape in ((576, 576), (1024, 1024), (4096, 4096), (8192, 2048), (2048, 8192))),
    *(Cell(tokens, 1536, 576) for tokens in (128, 256, 1024)),
    Cell(1024, 576, 1536),
    *(Cell(tokens, 576, 576) for tokens in (128, 256)),
    *(Cell(tokens, 576, 576, dtype="float32") for tokens in (128, 256, 1024)),
    *(Cell(1024, 576, 576, rank=rank) for rank in (4, 128)),
]
FEW = [
    *grid((1, 8, 32, 128), SHAPES[:1], (4, 128)),
    *grid((1, 32), SHAPES[:1], (16, 64)),
    *grid((1, 32), SHAPES[1:], (16, 128)),
    *(Cell(tokens, 576, 576, 128, "float32") for tokens in (1024, 8192)),
]
CELLS = chosen(
    pick(
        quick=[
            *(Cell(tokens, compiled=tokens == 1024) for tokens in (128, 1024, 4096)),
            Cell(rank=64),
            Cell(dtype="float32"),
            *(Cell(1024, n, n) for n in (576, 1024)),
            *grid((1, 32), SHAPES[:1], (16, 128)),
        ],
        default=[*AXES, *FEW],
        full=[*AXES, *FEW, *grid((1, 8, 32, 128, 512, 2048, 8192), SHAPES, RANKS)],
    )
)


class Form(NamedTuple):
    """``forward()`` gives y; ``inputs``: what the backward differentiates by, x first."""

    forward: Callable[[], torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    context: Callable[[], AbstractContextManager] = nullcontext
    module: torch.nn.Module | None = None


class Setting(NamedTuple):
    forms: dict[str, Form]
    grad_output: torch.Tensor
    saved_mb: dict[str, float]
    iterations: dict[str, int]


def forms_of(cell: Cell, layer) -> dict[str, Form]:
    x, stock = layer.x, mica.fast.disabled
    module, lora_A = adapted_module(layer, torch.float32, init="mica")
    found = {
        BARE: Form(lambda: F.linear(x, layer.weight), (x,)),
        STOCK: Form(lambda: module(x), (x, lora_A), stock, module),
        FAST: Form(lambda: module(x), (x, lora_A), nullcontext, module),
        ATEN: Form(
            lambda: AtenControl.apply(x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling),
            (x, layer.lora_A),
        ),
    }
    lora, trained_A = adapted_module(layer, torch.float32)
    trained_B = lora.lora_B["default"].weight.requires_grad_()
    found[LORA] = Form(lambda: lora(x), (x, trained_A, trained_B), stock, lora)
    narrow, narrow_A = adapted_module(layer, x.dtype, init="mica")
    if x.dtype != torch.float32:
        found[STOCK_16] = Form(lambda: narrow(x), (x, narrow_A), stock, narrow)
    if cell.compiled:
        torch._dynamo.reset()  # static shapes in every cell
        compiled = torch.compile(narrow)
        found[COMPILED] = Form(lambda: compiled(x), (x, narrow_A), stock, narrow)
    return found


def gradients(form: Form, y: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, form.inputs, grad_output, retain_graph=True)


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Setting:
    layer = make_layer(cell.tokens, cell.out, cell.inner, cell.rank, DTYPES[cell.dtype], DEVICE)
    forms, dy = forms_of(cell, layer), layer.grad_output
    limit, precision = GATES[cell.dtype]
    truth, saved, seconds = exact(layer, precision), {}, {}
    for name, form in forms.items():
        with form.context():
            calls = mica.fast.call_counts["linear"]
            errors = relative_errors(form.forward, lambda y, form=form: gradients(form, y, dy), truth)
            if name in rivals(cell, NO_GRADIENT):
                with torch.no_grad():  # may be another way through the code
                    alone = relative_errors(form.forward, lambda y: (), truth)
                errors["y without gradient"] = alone["y"]
            for what, error in errors.items():
                bound = 1.0 if name == BARE else limit  # the bare layer lacks the adapter's term
                assert error <= bound, (
                    f"{name}: the relative error of {what} is {error:.2e}, above {bound:.0e}"
                )
            ran = mica.fast.call_counts["linear"] - calls
            assert ran == 2 * (name == FAST), f"{name}: {ran} calls of our operator"
            modules = [] if form.module is None else [form.module]
            saved[name] = saved_bytes(form.forward, modules, but=[layer.weight]) / 1e6
    with forms[BARE].context():
        start = time.perf_counter()
        y = forms[BARE].forward()
        middle = time.perf_counter()
        gradients(forms[BARE], y, dy)
        seconds = {FORWARD: middle - start, BACKWARD: time.perf_counter() - middle}
    seconds[NO_GRADIENT] = seconds[FORWARD]
    return Setting(forms, dy, saved, {part: iterations(one) for part, one in seconds.items()})


def rivals(cell: Cell, part: str) -> list[str]:
    """Without a gradient LoRA's layer is the stock one, and `torch.compile` would have to build another."""
    names = [BARE, STOCK, *([STOCK_16] if cell.dtype != "float32" else []), ATEN, FAST]
    if part != NO_GRADIENT:
        names += [LORA, *([COMPILED] if cell.compiled else [])]
    return names


# the first named parameter is the innermost loop: rivals take turns within a round
def cases():
    for cell in CELLS:
        for round_ in range(cell.rounds):
            for part in (FORWARD, BACKWARD, NO_GRADIENT):
                for name in rivals(cell, part):
                    yield pytest.param(cell, round_, part, name, id=f"{cell.key}-{part}-{round_}-{name}")


@pytest.mark.parametrize(("cell", "round_", "part", "rival"), cases())
def bench_layer(once, gated, cell, round_, part, rival):
    found = gated(cell.group(part), lambda: setting(cell))
    form, count = found.forms[rival], found.iterations[part]
    facts = {"saved_mb": found.saved_mb[rival]} if round_ == 0 and part != NO_GRADIENT else {}
    axes = {**cell.axes, "pass": part}
    with form.context(), torch.set_grad_enabled(part != NO_GRADIENT):
        if part == BACKWARD:
            y = form.forward()
            call = functools.partial(gradients, form, y, found.grad_output)
        else:
            call = form.forward
        once(call, cell.group(part), rival, axes, count, warm_up=True, **facts)
