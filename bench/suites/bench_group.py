"""Three layers on one x (q/k/v) as one operator, each alone, as stock PEFT, and the bare products.

Without `mica.fast`, which finds groups by itself: both of our implementations are the operators that it
calls. Every y, dx and dA is checked against `mica.reference` in fp64, and that it came from kernels.
"""

import functools
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mica.fast
from bench.measure.machine import DEVICE
from bench.results.names import BACKWARD, BARE, FORWARD, GROUPED, STOCK_16, UNGROUPED
from bench.suites.bench_layer import Cell
from bench.suites.harness import build_all, needs_accelerator, pick, turns
from bench.suites.layer import Form, Layer, adapted_module, check_errors, make_layer
from mica import reference
from mica.ops import mica_linear, mica_linear_group
from tests.support.tolerances import RELATIVE, error

pytestmark = needs_accelerator

ROUNDS, ITERATIONS = pick(default=1, cuda=5), pick(default=1, cuda=10)
COUNT, DTYPE = 3, torch.bfloat16
KERNELS = {  # how often which operator runs on kernels, forward and backward
    UNGROUPED: {"linear_kernels": COUNT, "linear_backward_kernels": COUNT},
    GROUPED: {"linear_group_kernels": 1, "linear_group_backward_kernels": 1},
}
IMPLEMENTATIONS = (BARE, STOCK_16, UNGROUPED, GROUPED)
CELLS = pick(quick=[Cell(40, 48, 64)], default=[], cuda=[Cell(tokens, 4096, 4096) for tokens in (8192, 512)])


def name_of(cell: Cell) -> str:
    return cell.name.replace("layer", f"{COUNT} layers on one x", 1)


def make_layers(cell: Cell) -> list[Layer]:
    """From one seed: different, but of the same scale."""
    layers = [make_layer(cell.tokens, cell.out, cell.inner, cell.rank, DTYPE, DEVICE) for _ in range(COUNT)]
    for number, layer in enumerate(layers):
        layer.x = layers[0].x
        layer.weight, layer.grad_output = layer.weight.roll(number, 0), layer.grad_output.roll(number, 0)
        layer.lora_A = layer.lora_A.detach().roll(number, 1).requires_grad_()
    return layers


def operands(layers: list[Layer]) -> tuple[list, ...]:
    names = "weight", "lora_A", "lora_B", "scaling"
    return tuple([getattr(layer, name) for layer in layers] for name in names)


def builds(layers: list[Layer]) -> dict[str, Callable[[], Form]]:
    """implementation -> what makes its `Form`, whose forward gives a list."""
    x, (weights, lora_As, lora_Bs, scalings) = layers[0].x, operands(layers)

    def stock() -> Form:
        modules = [adapted_module(layer, DTYPE, init="mica") for layer in layers]
        inputs = x, *(lora_A for _, lora_A in modules)
        return Form(lambda: [module(x) for module, _ in modules], inputs, mica.fast.disabled)

    each_alone = [*zip(weights, lora_As, lora_Bs, scalings, strict=True)]
    return {
        BARE: lambda: Form(lambda: [F.linear(x, weight) for weight in weights], (x,)),
        STOCK_16: stock,
        UNGROUPED: lambda: Form(lambda: [mica_linear(x, *one) for one in each_alone], (x, *lora_As)),
        GROUPED: lambda: Form(
            lambda: mica_linear_group(x, weights, lora_As, lora_Bs, scalings), (x, *lora_As)
        ),
    }


def exact(layers: list[Layer]) -> dict[str, list[Tensor]]:
    """The y of each layer, dx, and the dA of each, in fp64."""
    x, *kinds = (
        [tensor.detach().double() for tensor in kind]
        for kind in ([layers[0].x], *operands(layers)[:3], [layer.grad_output for layer in layers])
    )
    *factors, grad_outputs = kinds
    scalings = operands(layers)[3]
    ys = reference.linear_group(*x, *factors, scalings, [None] * COUNT)
    dx, dAs = reference.linear_group_backward(grad_outputs, *x, *factors, scalings, torch.float64)
    return {"y": ys, "dx": [dx], "dA": dAs}


def checked(
    name: str, build: Callable[[], Form], layers: list[Layer], truth: dict[str, list[Tensor]]
) -> tuple[Form, dict[str, float]]:
    """The form and its errors, each the largest over the layers; raises where its results are wrong."""
    form, grad_outputs = build(), [layer.grad_output for layer in layers]
    before = Counter(mica.fast.call_counts)
    with form.context():
        ys = form.forward()
        dx, *dAs = form.gradients(ys, grad_outputs)
    ran = {key: n for key, n in (mica.fast.call_counts - before).items() if key.endswith("_kernels")}
    assert ran == KERNELS.get(name, {}), f"on kernels ran {ran or 'nothing'}"
    errors = {
        what: max(error(*pair) for pair in zip(values, truth[what], strict=True))
        for what, values in (("y", ys), ("dx", [dx]), ("dA", dAs))
        if values
    }
    return form, check_errors(name, errors, RELATIVE[DTYPE])


@functools.lru_cache(maxsize=1)
def setting(cell: Cell) -> tuple[dict[str, tuple[Form, dict[str, float]]], list[Tensor]]:
    """implementation -> (form, facts), and the gradients of the outputs."""
    layers = make_layers(cell)
    truth = exact(layers)
    makes = builds(layers)
    forms = build_all(name_of(cell), makes, lambda name: checked(name, makes[name], layers, truth))
    return forms, [layer.grad_output for layer in layers]


@turns(CELLS, (FORWARD, BACKWARD), lambda cell: ROUNDS, lambda *_: IMPLEMENTATIONS)
def bench_group(once, gated, cell, round_, part, implementation):
    group = f"{name_of(cell)}, {part}"
    forms, grad_outputs = gated(group, lambda: setting(cell), implementation)
    form, facts = forms[implementation]
    axes = {**cell.axes, "suite": "group", "layers": COUNT, "pass": part}
    form.time(once, part, grad_outputs, group, implementation, axes, ITERATIONS, **facts)
