"""The factors next to a called base layer, beyond what test_operators.py asks of them."""

import pytest
import torch
from torch.library import opcheck

from mica.ops import mica_down_projection, mica_linear, mica_up_projection
from tests.support.linear_calls import addresses, by_factors, leaves, run, saved_by
from tests.support.oracle import problem
from tests.support.tolerances import RELATIVE, error

SEED = torch.tensor([-11])
on_each_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_what_the_fused_operator_drops(monkeypatch, backend, dtype):
    monkeypatch.setenv("MICA_BACKEND", backend)
    p = problem((40,), 33, 20, 4, dtype, torch.float32)
    options = {"dropout_p": 0.4, "seed": SEED}
    expected, actual = (run(p, function=function, **options) for function in (mica_linear, by_factors))
    for name, value in actual.items():
        assert error(value, expected[name]) <= 2 * RELATIVE[dtype], name
    assert error(actual["grad_A"], run(p, function=by_factors)["grad_A"]) > 0.1


@on_each_backend
def test_y_keeps_its_dtype_and_its_precision(monkeypatch, backend):
    """A base layer may return fp32 next to 16-bit products: the sum is not rounded to theirs."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    y, h, lora_B = torch.randn(6, 20), torch.randn(6, 4).bfloat16(), torch.randn(20, 4)
    out = mica_up_projection(y, h, lora_B)
    assert out.dtype == torch.float32
    assert error(out, y.double() + h.double() @ lora_B.double().t()) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_saves_x_as_it_came_and_the_operands_that_gradients_need(needs):
    p = problem((6,), 5, 4, 2, torch.bfloat16, torch.float32)
    x, lora_A = leaves(p, needs)
    saved, h = saved_by(lambda: mica_down_projection(x, lora_A, 0.5, dropout_p=0.5, seed=SEED))
    assert saved == addresses(lora_A, SEED, *([x] if needs[1] else []))
    saved, y = saved_by(lambda: mica_up_projection(torch.zeros_like(p.grad_output), h, p.lora_B))
    assert saved == addresses(p.lora_B)
    y.backward(p.grad_output)
    assert (x.grad is not None, lora_A.grad is not None) == needs


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_h_and_of_a_wider_y(autocast_dtype):
    p = problem((16,), 12, 10, 3, torch.float32)
    with torch.autocast("cpu", autocast_dtype):
        h = mica_down_projection(p.x, p.lora_A, p.scaling)
        assert h.dtype == autocast_dtype
        assert mica_up_projection(torch.zeros(16, 10), h, p.lora_B).dtype == torch.float32
        dropped = mica_down_projection(p.x, p.lora_A, p.scaling, dropout_p=0.5, seed=SEED)
    assert error(dropped, h) > 0.1


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_opcheck(compute_dtype):
    p = problem((2, 3), 5, 7, 2, torch.bfloat16, torch.float32)
    opcheck(torch.ops.mica.down_projection.default, (*leaves(p), 0.5, compute_dtype, 0.3, SEED))
    h = torch.randn(2, 3, 2).bfloat16().requires_grad_()
    y = torch.randn(2, 3, 7).bfloat16().requires_grad_()
    opcheck(torch.ops.mica.up_projection.default, (y, h, p.lora_B))
    opcheck(torch.ops.mica.up_projection_backward.default, (y.detach(), p.lora_B, torch.bfloat16))
    for mask in ([True, True], [True, False], [False, True]):
        grad_h = torch.randn(2, 3, 2).to(compute_dtype or torch.bfloat16)
        arguments = (grad_h, p.x, p.lora_A, 0.5, torch.bfloat16, mask, 0.3, SEED)
        opcheck(torch.ops.mica.down_projection_backward.default, arguments)
