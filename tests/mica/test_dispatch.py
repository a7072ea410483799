"""What all operators share: an output belongs to the caller, who may change it in place."""

import pytest
import torch
from oracle import problem

from mica import ops
from mica.ops import (
    mica_down_projection,
    mica_embedding,
    mica_linear,
    mica_linear_group,
    mica_up_projection,
)

P = problem((2, 3), 8, 6, 2, torch.float32)
INDICES, TABLE = torch.tensor([[0, 4, 1], [4, 2, 3]]), torch.randn(2, 5)

CALLS = {  # name -> (function of the operand that needs a gradient, that operand)
    "linear": (lambda A: mica_linear(P.x, P.weight, A, P.lora_B, 0.5, P.bias), P.lora_A),
    "linear, x alone": (lambda x: mica_linear(x, P.weight, P.lora_A, P.lora_B, 0.5, P.bias), P.x),
    "linear, one token": (lambda A: mica_linear(P.x[0, 0], P.weight, A, P.lora_B), P.lora_A),
    "linear, matrix": (lambda A: mica_linear(P.x[0], P.weight, A, P.lora_B), P.lora_A),
    "group": (
        lambda A: mica_linear_group(
            P.x, [P.weight, P.weight], [A, P.lora_A], [P.lora_B, P.lora_B], [1.0, 0.5]
        )[0],
        P.lora_A,
    ),
    "down_projection": (lambda A: mica_down_projection(P.x, A, 0.5), P.lora_A),
    "up_projection": (lambda h: mica_up_projection(P.grad_output, h, P.lora_B), torch.randn(2, 3, 2)),
    "embedding": (lambda A: mica_embedding(INDICES, A, P.lora_B), TABLE),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_an_output_may_be_changed_in_place(monkeypatch, backend, name):
    monkeypatch.setenv("MICA_BACKEND", backend)
    function, operand = CALLS[name]
    results = []
    for in_place in (False, True):
        leaf = operand.detach().clone().requires_grad_()
        y = function(leaf)
        assert not y._is_view()
        y = y.mul_(2.0).relu_() if in_place else (y * 2.0).relu()
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for plain, changed in zip(*results, strict=True):
        assert torch.equal(plain, changed)


def test_an_output_of_a_compiled_call_may_be_changed_in_place():
    torch.compiler.reset()
    A = P.lora_A.detach().clone().requires_grad_()

    def function(A):
        return mica_linear(P.x, P.weight, A, P.lora_B).mul_(2.0).relu_()

    expected = torch.autograd.grad(function(A).square().sum(), A)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(A).square().sum(), A)[0], expected)
    assert ops.call_counts["linear"]
