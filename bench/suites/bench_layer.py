"""One adapted linear layer, forward and backward, against everything it can be compared with.

From one layer (2048 x 2048, 1024 tokens, r = 16, bf16) one axis varies at a time: tokens, rank, shape, dtype.
In addition few tokens by rank, where calls cost as much as products, layers with the paper's dropout of
0.05, of which only forward and backward are timed, and plain LoRA. On an accelerator the layer is 4096 x
4096, tokens vary by rank, kernels are required, and layers under torch.compile, whose builds take longest,
are cells of their own at the end. *Forms*, there only, are those that `mica.kernels.configs` names, each
forced; with few tokens they show from how much work on kernels are worth their launches. The device chooses
one of them, too, as at the first call of such a layer, which `bench.gpu` reports.

All implementations in a cell compute with the same x, W, A and B. Each of their y, dx, dA and dB is checked
before anything is timed, a form also by what it launches, and only the one that is wrong is left out. The
forward is timed with and without recording a graph, the backward on a graph that is kept.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

import mica.fast
from bench.measure.clocks import seconds
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.measure.memory import alive_bytes
from bench.results import names
from bench.results.names import (
    BACKWARD,
    BARE,
    FAST,
    FORWARD,
    MICA,
    NO_GRADIENT,
    PLAIN_LORA,
    STOCK,
    STOCK_16,
)
from bench.suites import harness
from bench.suites.harness import build_all, each_part, iterations, pick
from bench.suites.layer import (
    Form,
    Layer,
    adapted_module,
    check_dropout,
    check_errors,
    exact,
    make_layer,
)
from bench.suites.rounds import Once, prepared, rounds
from mica.kernels import configs
from mica.ops.linear import linear_eager
from mica.paths import choose, tuning
from mica.paths.products import has_native
from tests.support.tolerances import RELATIVE

# Relative errors of y, dx and dA that no layer should pass, and the dtype of the truth: on a CPU fp64 takes
# seconds for a large layer, and fp32 is as good as exact for bf16.
GATES = {"bfloat16": 1.5e-2, "float32": 1e-5}
EXACT = {"bfloat16": torch.float64 if DEVICE == "cuda" else torch.float32, "float32": torch.float64}
DROPOUT = 0.05  # the paper's
PASSES = (FORWARD, BACKWARD, NO_GRADIENT)
FORMS = {names.of_form(word): word for word in configs.FORM_NAMES} if ON_ACCELERATOR else {}
LAUNCHED = {  # form -> by kernel, how many launches a forward and its backward make in MiCA
    "split": {"down_projection": 2, "up_projection": 2, "grad_a": 1},
    "first": {"down_projection": 2, "grad_a": 1},
    "fused": {"down_projection": 2, "fused_linear": 2, "grad_a": 1},
    "mixed": {"up_projection": 2},
    "reference": {},
}


@dataclass(frozen=True)
class Cell(harness.Cell):
    """One layer. ``compiled``: also under torch.compile, which takes some ten seconds for each, on an
    accelerator that and its baselines only; ``forms``: of the operator, instead of PEFT's layers."""

    tokens: int = 1024
    out: int = 2048
    inner: int = 2048
    rank: int = 16
    dtype: str = "bfloat16"
    compiled: bool = False
    forms: bool = False
    dropout: float = 0.0
    adapter: str = MICA

    @property
    def axes(self) -> dict[str, str | int]:
        axes = {
            "suite": "forms" if self.forms else "layer",
            "adapter": self.adapter,
            "tokens": self.tokens,
            "out": self.out,
            "in": self.inner,
            "rank": self.rank,
        }
        if self.dropout:
            axes["dropout"] = self.dropout
        if self.is_compiled_only:
            axes["compiler"] = "torch.compile"
        return {**axes, "dtype": self.dtype}

    @property
    def is_compiled_only(self) -> bool:
        return self.compiled and ON_ACCELERATOR

    def implementations(self, part: str) -> list[str]:
        """Without a gradient there is no other `torch.compile`d layer: it would have to be built again."""
        if self.forms:
            return [] if part == NO_GRADIENT else [BARE, *FORMS]
        if part == NO_GRADIENT and (self.dropout or self.is_compiled_only):
            return []
        chosen = [BARE, *names.stock(self.dtype), FAST]
        if self.compiled and part != NO_GRADIENT:
            chosen += [names.COMPILED, names.COMPILED_FAST]
        return chosen


AXES = [
    *(Cell(tokens, compiled=tokens == 1024) for tokens in (128, 512, 1024, 4096)),
    *(Cell(rank=rank) for rank in (4, 64, 128)),
    *(Cell(tokens, dtype="float32", compiled=tokens == 1024) for tokens in (128, 1024)),
    *(Cell(1024, *shape) for shape in ((576, 576), (1536, 576), (576, 1536), (4096, 4096))),
    *(Cell(tokens, 576, 576, dtype="float32") for tokens in (256, 1024)),
    *(Cell(1024, 576, 576, rank=rank) for rank in (4, 128)),
    *(
        Cell(*sizes, dtype=dtype)
        for dtype in GATES
        for sizes in ((1, 576, 576), (32, 576, 576), (1, 576, 576, 128), (32, 576, 576, 128), (1,))
    ),
    *(
        Cell(*sizes, dtype=dtype, dropout=DROPOUT)
        for dtype in GATES
        for sizes in ((1024, 1536, 576), (1024, 2048, 2048), (512, 576, 576), (16, 64, 64))
    ),
    *(
        Cell(*sizes, dtype=dtype, dropout=dropout, adapter=PLAIN_LORA)
        for dtype in GATES
        for dropout in (0.0, DROPOUT)
        for sizes in ((1, 576, 576), (16, 576, 576), (512, 576, 576), (1024, 1536, 576), (1024, 2048, 2048))
    ),
]
WIDE = [(8192, 14336, 4096), (8192, 4096, 14336)]
CUDA = [
    *(Cell(tokens, 4096, 4096) for tokens in (8192, 2048, 512, 128, 1)),
    *(Cell(*sizes) for sizes in WIDE),
    *(Cell(tokens, 4096, 4096, dropout=DROPOUT) for tokens in (8192, 512)),
    *(Cell(tokens, 4096, 4096, adapter=PLAIN_LORA) for tokens in (8192, 512)),
    Cell(8192, 4096, 4096, dropout=DROPOUT, adapter=PLAIN_LORA),
    *(Cell(tokens, 4096, 4096, rank) for rank in (64, 128, 8) for tokens in (8192, 2048, 512, 1)),
    *(Cell(tokens, 4096, 4096, compiled=True) for tokens in (8192, 512)),
    *(Cell(*sizes, forms=True) for sizes in ((8192, 4096, 4096), *WIDE, (2048, 4096, 4096))),
    *(Cell(tokens, 4096, 4096, rank, forms=True) for tokens, rank in ((8192, 128), (8192, 64), (2048, 128))),
    *(Cell(tokens, 4096, 4096, forms=True) for tokens in (1024, 512, 256, 128, 32, 1)),
    Cell(512, 2048, 2048, forms=True),
    Cell(8192, 4096, 4096, forms=True, adapter=PLAIN_LORA),
]
DRY = [
    Cell(40, 48, 64),
    Cell(1, 80, 96, 64),
    Cell(200, 48, 64, dropout=DROPOUT),
    Cell(40, 48, 64, compiled=True),
    *(Cell(40, 48, 64, rank, forms=True) for rank in (16, 32)),
    Cell(40, 48, 64, adapter=PLAIN_LORA),
    Cell(40, 48, 64, forms=True, adapter=PLAIN_LORA),
]
CELLS = pick(default=AXES, cuda=CUDA, dry=DRY)
if not (ON_ACCELERATOR or has_native(torch.bfloat16)):  # there a product in bf16 may take a minute
    CELLS = [cell for cell in CELLS if cell.dtype != "bfloat16"]


@contextmanager
def form_of(word: str) -> Iterator[None]:
    """Every call inside takes this form.

    "reference" also where kernels are demanded, once they have been found to run (by the form before).
    """
    layer = tuning.Layer(tuning.Part(word), tuning.Part(word))
    not_demanded = patch.object(choose, "setting", lambda: None) if word == "reference" else nullcontext()
    with patch.object(tuning.Table, "find", lambda table, kind: layer), not_demanded:
        yield


def let_choose(layer: Layer) -> None:
    """The device measures the forms of this layer, unless it has; a run otherwise demands kernels."""
    calls = pick(default={"CALLS": tuning.CALLS}, dry={"UNTIMED": 1, "ROUNDS": 2, "CALLS": 1})
    with patch.multiple(tuning, **calls), patch.object(choose, "setting", lambda: None):
        linear_eager(layer.x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling)


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """By kernel, how many are made inside."""
    from mica.kernels.launching import Plan

    seen: Counter[str] = Counter()
    launch = Plan.__call__

    def counting(plan, *tensors):
        seen[plan.kernel.fn.__name__.strip("_").removesuffix("_kernel")] += 1
        return launch(plan, *tensors)

    with patch.object(Plan, "__call__", counting):
        yield seen


def under_compiler(module):
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False, **pick(default={}, dry={"backend": "aot_eager"}))


def builds(cell: Cell, layer: Layer) -> dict[str, Callable[[], Form]]:
    """implementation -> what makes its `Form`."""
    x = layer.x
    stock = mica.fast.disabled
    operands = (x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling)

    def adapted(dtype, context, wrap=lambda module: module) -> Form:
        module, trained = adapted_module(layer, dtype, cell.dropout)
        call = wrap(module)
        return Form(lambda: call(x), (x, *trained), context, module)

    def forced(word: str) -> Form:
        # as a layer of mica.fast calls it: without bias, and under no autocast
        call = functools.partial(linear_eager, *operands, None, None)
        return Form(call, (x, *layer.trained), lambda: form_of(word))

    makes = {
        BARE: lambda: Form(lambda: F.linear(x, layer.weight), (x,)),
        STOCK: lambda: adapted(torch.float32, stock),
        STOCK_16: lambda: adapted(x.dtype, stock),
        FAST: lambda: adapted(torch.float32, nullcontext),
        names.COMPILED: lambda: adapted(x.dtype, stock, under_compiler),
        names.COMPILED_FAST: lambda: adapted(torch.float32, nullcontext, under_compiler),
    }
    if cell.forms:
        makes |= {name: functools.partial(forced, word) for name, word in FORMS.items()}
    return makes


def checked(cell: Cell, layer: Layer, name: str, truth: dict) -> tuple[Form, dict[str, float]]:
    """The form, and its facts.

    Raises:
        AssertionError: its results are wrong, or came from another operator or form.
    """
    form = builds(cell, layer)[name]()
    is_timed_alone = name in cell.implementations(NO_GRADIENT)
    with form.context():
        if cell.forms:  # the first call may have to try several configurations of a kernel
            form.errors(layer.grad_output, truth)
        calls = mica.fast.call_counts["linear"]
        with launches() if cell.forms else nullcontext() as launched:
            errors = form.errors(layer.grad_output, truth)
        if is_timed_alone:
            with torch.no_grad():  # may take another path through the code
                errors["y without gradient"] = form.errors(layer.grad_output, truth)["y"]
        ran = mica.fast.call_counts["linear"] - calls
        saved = alive_bytes(form.forward) / 1e6
    if cell.dropout and name != BARE:
        check_dropout(errors, cell.dropout)
        form.module.eval()
        with form.context():
            errors = form.errors(layer.grad_output, truth)
        form.module.train()
    facts = check_errors(name, errors, RELATIVE[layer.x.dtype] if cell.forms else GATES[cell.dtype])
    expected = 0
    if name.startswith(FAST):
        expected = 2 if is_timed_alone else 1
    assert ran == expected, f"{ran} calls of our operator"
    if cell.forms:
        of_form = Counter(LAUNCHED[FORMS[name]] if name in FORMS else {})
        if layer.lora_B.requires_grad and of_form["grad_a"]:
            of_form["grad_a"] += 1  # computes dB too
        assert launched == of_form, f"launched {dict(launched)}, not {dict(of_form)}"
    return form, {"saved_mb": saved, **facts}


class Setting(NamedTuple):
    forms: dict[str, Form]
    grad_output: torch.Tensor
    facts: dict[str, dict[str, float]]
    iterations: dict[str, int]


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> Setting:
    torch.manual_seed(0)  # of dropout
    sizes = cell.tokens, cell.out, cell.inner, cell.rank
    layer = make_layer(*sizes, getattr(torch, cell.dtype), DEVICE, cell.adapter)
    truth = exact(layer, EXACT[cell.dtype])
    needed = dict.fromkeys([*cell.implementations(FORWARD), *cell.implementations(NO_GRADIENT)])
    built = build_all(cell.name, needed, lambda name: checked(cell, layer, name, truth))
    if cell.forms:
        let_choose(layer)
    forms = {name: form for name, (form, _) in built.items()}
    facts = {name: facts for name, (_, facts) in built.items()}
    bare = forms[BARE]
    backward = functools.partial(bare.gradients, bare.forward(), layer.grad_output)
    counts = {FORWARD: iterations(seconds(bare.forward)), BACKWARD: iterations(seconds(backward))}
    counts[NO_GRADIENT] = counts[FORWARD]
    return Setting(forms, layer.grad_output, facts, counts)


@each_part(CELLS, PASSES)
def bench_layer(cell, part):
    group = f"{cell.name}, {part}"
    layer = prepared(group, lambda: setting(cell))
    axes = {**cell.axes, "pass": part}

    def sample(once: Once, name: str) -> None:
        facts = {} if part == NO_GRADIENT else layer.facts[name]
        layer.forms[name].time(once, part, layer.grad_output, axes, layer.iterations[part], **facts)

    rounds(group, cell.implementations(part), sample)
