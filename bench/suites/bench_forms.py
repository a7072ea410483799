"""Other forms of one layer that could be faster than the split one, which `mica.fast` runs.

*Fused*: base product and up-projection in one kernel, by pointers or by tensor descriptors. Every form is
forced, and checked by its y, dx and dA against `mica.paths.torch_path` in fp64, and by what was launched.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure.machine import DEVICE
from bench.results.names import ATEN, BACKWARD, BARE, DESCRIPTOR, FAST, FORWARD, FUSED, MIXED, PYTORCH
from bench.suites.bench_layer import Cell
from bench.suites.harness import build_all, needs_accelerator, pick, turns
from bench.suites.layer import AtenControl, Form, Layer, check_errors, exact, make_layer
from mica.kernels import configs
from mica.ops import call_counts, mica_linear
from mica.paths import choose
from tests.support.tolerances import RELATIVE

triton_path = pytest.importorskip("mica.paths.triton_path")  # imports Triton

pytestmark = needs_accelerator

ROUNDS, ITERATIONS = pick(default=1, cuda=5), pick(default=1, cuda=10)
DTYPE = torch.bfloat16
# implementation -> how often a forward and its backward call the fused kernel, by whether with descriptors
LAUNCHED = {FAST: {}, MIXED: {}, FUSED: {False: 2}, DESCRIPTOR: {True: 2}, PYTORCH: {}}
IMPLEMENTATIONS = (BARE, FAST, MIXED, FUSED, DESCRIPTOR, PYTORCH, ATEN)


SHAPES = (4096, 4096), (14336, 4096), (4096, 14336)
CELLS = pick(quick=[Cell(40, 48, 64)], default=[], cuda=[Cell(8192, *shape) for shape in SHAPES])


def name_of(cell: Cell) -> str:
    return f"forms of a {cell.name}"


@contextmanager
def form_of(form: str) -> Iterator[None]:
    """Every call inside takes this form, whatever the table says.

    "aten" also where kernels are demanded, once they have been found to run (by the form before).
    """
    rows = {triton_path.device_name(torch.device(DEVICE, 0)): (configs.Forms(0, 256, form, form),)}
    demanded = patch.object(choose, "requested", lambda: "auto") if form == "aten" else nullcontext()
    with patch.dict(configs.FORMS, rows), demanded:
        yield


@contextmanager
def counted() -> Iterator[Counter[bool]]:
    """How often the fused kernel is called, by whether with descriptors."""
    seen, fused = Counter(), triton_path.fused_linear

    def counting(*args, descriptor: bool = False, **options) -> Tensor:
        seen[descriptor] += 1
        return fused(*args, descriptor=descriptor, **options)

    with patch.object(triton_path, "fused_linear", counting):
        yield seen


def builds(layer: Layer) -> dict[str, Callable[[], Form]]:
    """implementation -> what makes its `Form`."""
    x, lora_A = layer.x, layer.lora_A
    operands = x, layer.weight, lora_A, layer.lora_B, layer.scaling

    def ours(form: str) -> Callable[[], Form]:
        return lambda: Form(lambda: mica_linear(*operands), (x, lora_A), lambda: form_of(form))

    return {
        BARE: lambda: Form(lambda: F.linear(x, layer.weight), (x,)),
        FAST: ours("split"),
        MIXED: ours("mixed"),
        FUSED: ours("fused"),
        DESCRIPTOR: ours("descriptor"),
        PYTORCH: ours("aten"),
        ATEN: lambda: Form(lambda: AtenControl.apply(*operands), (x, lora_A)),
    }


def checked(name: str, build: Callable[[], Form], layer: Layer, truth: dict[str, Tensor]):
    """The form and its errors; raises where its results are wrong or came from another form."""
    form, before = build(), call_counts["linear_kernels"]
    with form.context(), counted() as launched:
        errors = form.errors(layer.grad_output, truth)
    assert launched == LAUNCHED.get(name, {}), f"calls of the fused kernel, by descriptors or not: {launched}"
    ran = call_counts["linear_kernels"] - before
    assert ran == (name in LAUNCHED), f"{ran} calls of our operator ran kernels"
    return form, check_errors(name, errors, RELATIVE[DTYPE])


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> tuple[dict[str, tuple[Form, dict[str, float]]], Tensor]:
    """implementation -> (form, facts), and the gradient of y."""
    layer = make_layer(cell.tokens, cell.out, cell.inner, cell.rank, DTYPE, DEVICE)
    truth = exact(layer)
    makes = builds(layer)
    forms = build_all(name_of(cell), makes, lambda name: checked(name, makes[name], layer, truth))
    return forms, layer.grad_output


@turns(CELLS, (FORWARD, BACKWARD), lambda cell: ROUNDS, lambda *_: IMPLEMENTATIONS)
def bench_forms(once, gated, cell, round_, part, implementation):
    group = f"{name_of(cell)}, {part}"
    forms, grad_output = gated(group, lambda: setting(cell), implementation)
    form, facts = forms[implementation]
    axes = {**cell.axes, "suite": "forms", "pass": part}
    form.time(once, part, grad_output, group, implementation, axes, ITERATIONS, **facts)
