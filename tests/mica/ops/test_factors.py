"""The factors next to a called base layer: as the fused operator, on the reference and on kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from mica import ops
from mica.ops import mica_down_projection, mica_linear, mica_up_projection
from tests.support.oracle import DTYPES, problem, solve
from tests.support.tolerances import RELATIVE, error

SEED = torch.tensor([-11])
BACKENDS = ["reference", "triton"]
CASES = [
    (b, *d) for b in BACKENDS for d in DTYPES if (b, d[0]) != ("triton", torch.float64)
]  # no such kernels


def by_factors(x, weight, lora_A, lora_B, scaling, bias, *, compute_dtype=None, dropout_p=0.0, seed=None):
    h = mica_down_projection(x, lora_A, scaling, compute_dtype=compute_dtype, dropout_p=dropout_p, seed=seed)
    return mica_up_projection(F.linear(x, weight, bias), h, lora_B)


def run(p, function=by_factors, **options):
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    y = function(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, **options)
    y.backward(p.grad_output)
    return {"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize(("backend", "dtype", "adapter_dtype", "compute_dtype"), CASES)
@pytest.mark.parametrize("shape", [((), 9, 14, 3), ((3, 5), 33, 8, 8), ((70,), 40, 24, 16)])
def test_agrees_with_the_dense_oracle(monkeypatch, backend, dtype, adapter_dtype, compute_dtype, shape):
    monkeypatch.setenv("MICA_BACKEND", backend)
    ops.call_counts.clear()
    p = problem(*shape, dtype, adapter_dtype)
    expected, actual = solve(p), run(p, compute_dtype=compute_dtype)
    for name, value in actual.items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name
    assert actual["y"].dtype == actual["grad_x"].dtype == dtype
    assert actual["grad_A"].dtype == adapter_dtype
    for name in ("down_projection", "up_projection"):
        for operator in (name, f"{name}_backward"):
            assert ops.call_counts[operator] == 1
            assert ops.call_counts[f"{operator}_kernels"] == (backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_what_the_fused_operator_drops(monkeypatch, backend, dtype):
    monkeypatch.setenv("MICA_BACKEND", backend)
    p = problem((40,), 33, 20, 4, dtype, torch.float32)
    options = {"dropout_p": 0.4, "seed": SEED}
    expected, actual = run(p, mica_linear, **options), run(p, **options)
    for name, value in actual.items():
        assert error(value, expected[name]) <= 2 * RELATIVE[dtype], name
    assert error(actual["grad_A"], run(p)["grad_A"]) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_y_keeps_its_dtype_and_its_precision(monkeypatch, backend):
    """A base layer may return fp32 next to 16-bit products: the sum is not rounded to theirs."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    y, h = torch.randn(6, 20), torch.randn(6, 4).bfloat16()
    lora_B = torch.randn(20, 4)
    out = mica_up_projection(y, h, lora_B)
    assert out.dtype == torch.float32
    expected = y.double() + h.double() @ lora_B.double().t()
    assert error(out, expected) <= RELATIVE[torch.float32]


def test_saves_x_as_it_came_and_the_operands():
    p = problem((6,), 5, 4, 2, torch.bfloat16, torch.float32)
    x, lora_A = p.x.detach().clone().requires_grad_(), p.lora_A.detach().requires_grad_()
    y = torch.randn(6, 4, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = mica_down_projection(x, lora_A, 0.5, dropout_p=0.5, seed=SEED)
        mica_up_projection(y, h, p.lora_B)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, lora_A, SEED, p.lora_B)}


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needs):
    p = problem((3,), 5, 4, 2, torch.float32)
    x, lora_A = p.x.detach().requires_grad_(needs[0]), p.lora_A.detach().requires_grad_(needs[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = mica_down_projection(x, lora_A, 0.5)
    assert (x.data_ptr() in {t.data_ptr() for t in saved}) == needs[1]
    mica_up_projection(F.linear(x, p.weight, p.bias), h, p.lora_B).backward(p.grad_output)
    assert (x.grad is not None, lora_A.grad is not None) == needs


def test_derivatives():
    p = problem((6,), 5, 4, 2, torch.float64)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()

    def function(x, lora_A):
        return by_factors(x, p.weight, lora_A, p.lora_B, 0.5, p.bias, dropout_p=0.5, seed=SEED)

    assert torch.autograd.gradcheck(function, (x, lora_A))
    assert torch.autograd.gradgradcheck(function, (x, lora_A))
    batch = torch.stack([p.x, 2 * p.x])
    mapped = torch.func.vmap(lambda x: by_factors(x, p.weight, p.lora_A, p.lora_B, 0.5, p.bias))(batch)
    expected = by_factors(batch, p.weight, p.lora_A, p.lora_B, 0.5, p.bias)
    assert error(mapped, expected) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(autocast_dtype):
    p = problem((16,), 12, 10, 3, torch.float32)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    with torch.autocast("cpu", autocast_dtype):
        h = mica_down_projection(x, lora_A, p.scaling)
        assert h.dtype == autocast_dtype
        y = mica_up_projection(F.linear(x, p.weight, p.bias), h, p.lora_B)
        assert y.dtype == autocast_dtype
        assert mica_up_projection(torch.zeros(16, 10), h, p.lora_B).dtype == torch.float32
        dropped = mica_down_projection(x, lora_A, p.scaling, dropout_p=0.5, seed=SEED)
        assert error(dropped, h.detach()) > 0.1
    y.backward(p.grad_output.to(autocast_dtype))
    expected = solve(p)
    for name, value in {"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}.items():
        assert error(value, expected[name]) <= RELATIVE[autocast_dtype], name
    assert (lora_A.grad != lora_A.grad.to(autocast_dtype).float()).any()


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_opcheck(compute_dtype):
    p = problem((2, 3), 5, 7, 2, torch.bfloat16, torch.float32)
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    opcheck(torch.ops.mica.down_projection.default, (x, lora_A, 0.5, compute_dtype, 0.3, SEED))
    h = torch.randn(2, 3, 2).bfloat16().requires_grad_()
    y = torch.randn(2, 3, 7).bfloat16().requires_grad_()
    opcheck(torch.ops.mica.up_projection.default, (y, h, p.lora_B))
    opcheck(torch.ops.mica.up_projection_backward.default, (y.detach(), p.lora_B, torch.bfloat16))
    for mask in ([True, True], [True, False], [False, True]):
        grad_h = torch.randn(2, 3, 2).to(compute_dtype or torch.bfloat16)
        arguments = (grad_h, p.x, p.lora_A, 0.5, torch.bfloat16, mask, 0.3, SEED)
        opcheck(torch.ops.mica.down_projection_backward.default, arguments)


@pytest.mark.usefixtures("sixteen_bit_products")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch.compiler.reset()
    p = problem((2, 3), 5, 7, 2, torch.bfloat16, torch.float32)
    expected = run(p)
    for name, value in run(p, torch.compile(by_factors, fullgraph=True, backend=backend)).items():
        assert torch.equal(value, expected[name]), name
