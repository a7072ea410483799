"""Layers on one x as one operator: each as if alone, on the reference and on kernels."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from mica import ops
from mica.ops import mica_linear, mica_linear_group
from mica.ops.group import start_group
from tests.support.oracle import DTYPES, problem, solve
from tests.support.tolerances import RELATIVE, error

BACKENDS = ["reference", "triton"]
CASES = [
    (b, *d) for b in BACKENDS for d in DTYPES if (b, d[0]) != ("triton", torch.float64)
]  # no such kernels
SIZES = [(14, 3), (8, 8), (20, 16)]  # (out_features, rank) of three layers


def one_by_one(*operands, compute_dtype=None):
    first, *calls = start_group(*operands, compute_dtype)
    return [first, *(call() for call in calls)]


FORMS = pytest.mark.parametrize("function", [mica_linear_group, one_by_one])


def problems(tokens, in_features, dtype, adapter_dtype=None, sizes=SIZES):
    layers = [problem(tokens, in_features, out, rank, dtype, adapter_dtype) for out, rank in sizes]
    for number, p in enumerate(layers):
        p.x, p.scaling = layers[0].x, 0.5 + number
    layers[-1].bias = None
    return layers


def operands(layers):
    return (
        [p.weight for p in layers],
        [p.lora_A for p in layers],
        [p.lora_B for p in layers],
        [p.scaling for p in layers],
        [p.bias for p in layers],
    )


def run(layers, used=(0, 1, 2), function=mica_linear_group, **options):
    x = layers[0].x.detach().requires_grad_()
    lora_As = [p.lora_A.detach().requires_grad_() for p in layers]
    weights, _, lora_Bs, scalings, biases = operands(layers)
    ys = function(x, weights, lora_As, lora_Bs, scalings, biases, **options)
    torch.autograd.backward([ys[i] for i in used], [layers[i].grad_output for i in used])
    return ys, x.grad, [A.grad for A in lora_As]


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("backend", "dtype", "adapter_dtype", "compute_dtype"), CASES)
@pytest.mark.parametrize("tokens", [(), (3, 5), (70,)])
@FORMS
def test_agrees_with_the_dense_oracle(
    monkeypatch, backend, dtype, adapter_dtype, compute_dtype, tokens, function
):
    monkeypatch.setenv("MICA_BACKEND", backend)
    ops.call_counts.clear()
    layers = problems(tokens, 33, dtype, adapter_dtype)
    expected = [solve(p) for p in layers]
    ys, grad_x, grad_As = run(layers, function=function, compute_dtype=compute_dtype)
    for y, grad_A, e in zip(ys, grad_As, expected, strict=True):
        assert error(y, e["y"]) <= RELATIVE[dtype]
        assert error(grad_A, e["grad_A"]) <= RELATIVE[dtype]
        assert (y.dtype, grad_A.dtype) == (dtype, adapter_dtype)
    assert error(grad_x, sum(e["grad_x"] for e in expected)) <= RELATIVE[dtype]
    for name in ("linear_group", "linear_group_backward"):
        assert ops.call_counts[name] == 1
        assert ops.call_counts[f"{name}_kernels"] == (backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [(0,), (2,), (0, 2)])
@FORMS
def test_an_output_that_is_not_used_has_no_gradient(monkeypatch, backend, used, function):
    monkeypatch.setenv("MICA_BACKEND", backend)
    layers = problems((6,), 9, torch.float32)
    _, grad_x, grad_As = run(layers, used, function)
    expected = [solve(p) for p in layers]
    assert error(grad_x, sum(expected[i]["grad_x"] for i in used)) <= RELATIVE[torch.float32]
    for i, grad_A in enumerate(grad_As):
        if i in used:
            assert error(grad_A, expected[i]["grad_A"]) <= RELATIVE[torch.float32]
        else:
            assert grad_A is None


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@FORMS
def test_computes_and_saves_only_what_a_gradient_needs(needs, function):
    layers = problems((6,), 9, torch.bfloat16, torch.float32)
    weights, lora_As, lora_Bs, scalings, biases = operands(layers)
    x = layers[0].x.detach().clone().requires_grad_(needs[0])
    lora_As = [A.detach().clone().requires_grad_(needs[1]) for A in lora_As]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = function(x, weights, lora_As, lora_Bs, scalings, biases)
    expected = {t.data_ptr() for t in (*lora_As, *lora_Bs)}
    expected |= {x.data_ptr()} if needs[1] else set()
    expected |= {W.data_ptr() for W in weights} if needs[0] else set()
    assert {t.data_ptr() for t in saved if t is not None} == expected
    torch.autograd.backward(ys, [p.grad_output for p in layers])
    assert (x.grad is not None) == needs[0]
    assert all((A.grad is not None) == needs[1] for A in lora_As)


@FORMS
def test_derivatives(function):
    layers = problems((3,), 5, torch.float64, sizes=[(4, 2), (3, 1)])
    weights, _, lora_Bs, scalings, biases = operands(layers)
    inputs = [layers[0].x.detach().requires_grad_(), *(p.lora_A.detach().requires_grad_() for p in layers)]

    def outputs(x, *lora_As):
        return tuple(function(x, weights, list(lora_As), lora_Bs, scalings, biases))

    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


def test_function_transforms():
    layers = problems((3,), 5, torch.float64)
    batch = torch.stack([layers[0].x, 2 * layers[0].x])
    mapped = torch.func.vmap(lambda x: mica_linear_group(x, *operands(layers))[1])(batch)
    p = layers[1]
    expected = mica_linear(batch, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias)
    assert error(mapped, expected) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@FORMS
def test_autocast(autocast_dtype, function):
    layers = problems((16,), 12, torch.float32)
    for p in layers:
        p.grad_output = p.grad_output.to(autocast_dtype)
    with torch.autocast("cpu", autocast_dtype):
        ys, grad_x, grad_As = run(layers, function=function)
    expected = [solve(p) for p in layers]
    assert all(y.dtype == autocast_dtype for y in ys)
    assert error(grad_x, sum(e["grad_x"] for e in expected)) <= RELATIVE[autocast_dtype]
    for y, grad_A, e in zip(ys, grad_As, expected, strict=True):
        assert error(y, e["y"]) <= RELATIVE[autocast_dtype]
        assert error(grad_A, e["grad_A"]) <= RELATIVE[autocast_dtype]
        assert grad_A.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    layers = problems((2, 3), 5, dtype, torch.float32)
    weights, lora_As, lora_Bs, scalings, biases = operands(layers)
    x = layers[0].x.detach().requires_grad_()
    trained = [A.detach().requires_grad_() for A in lora_As]
    opcheck(torch.ops.mica.linear_group.default, (x, weights, trained, lora_Bs, scalings, biases, None))
    grads = [layers[0].grad_output, None, layers[2].grad_output]
    for x, kept in ((layers[0].x, weights), (None, weights), (layers[0].x, [])):
        arguments = (grads, x, kept, lora_As, lora_Bs, scalings, dtype)
        opcheck(torch.ops.mica.linear_group_backward.default, arguments)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch.compiler.reset()
    layers = problems((2, 3), 5, torch.bfloat16, torch.float32)
    compiled = torch.compile(mica_linear_group, fullgraph=True, backend=backend)
    expected, actual = run(layers), run(layers, function=compiled)
    pairs = zip((*expected[0], expected[1], *expected[2]), (*actual[0], actual[1], *actual[2]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_forward_mode_with_dual_tensors():
    layers = problems((6,), 9, torch.float64)
    weights, lora_As, lora_Bs, scalings, biases = operands(layers)
    lora_As = [lora_A.detach() for lora_A in lora_As]
    x, tangent = layers[0].x.detach(), torch.randn(6, 9, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        ys = mica_linear_group(dual, weights, lora_As, lora_Bs, scalings, biases)
        tangents = [forward_ad.unpack_dual(y).tangent for y in ys]
    for actual, weight, A, B, s in zip(tangents, weights, lora_As, lora_Bs, scalings, strict=True):
        assert error(actual, tangent @ (weight + s * B @ A).t()) <= RELATIVE[torch.float64]
