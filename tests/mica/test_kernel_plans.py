"""The plans of all launches of a layer, looked up together: never another call's (interpreted here)."""

import pytest
import torch

from mica import backend, kernel_path
from mica.kernels import launching, tuning
from tests.support.linear_calls import on_device, run
from tests.support.oracle import problem, solve
from tests.support.tolerances import RELATIVE, error


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    monkeypatch.setenv("MICA_BACKEND", "triton")
    backend.forget_verdicts()
    yield
    backend.forget_verdicts()


def strided(tensor, dim):
    """The same numbers with gaps in memory along a dimension."""
    sizes = list(tensor.shape)
    sizes[dim] *= 2
    return torch.zeros(sizes, dtype=tensor.dtype, device=tensor.device).index_copy_(
        dim, torch.arange(0, sizes[dim], 2, device=tensor.device), tensor
    )[tuple(slice(None, None, 2) if d == dim else slice(None) for d in range(2))]


# What differs from a call before it, whose plans must not be taken: (change of the problem, options).
DIFFERENT = {
    "tokens": lambda p: problem((33,), 40, 24, 12, torch.bfloat16),
    "in_features": lambda p: problem((70,), 48, 24, 12, torch.bfloat16),
    "out_features": lambda p: problem((70,), 40, 32, 12, torch.bfloat16),
    "rank": lambda p: problem((70,), 40, 24, 5, torch.bfloat16),
    "dtype of x": lambda p: problem((70,), 40, 24, 12, torch.float16),
    "dtype of A": lambda p: _with(p, lora_A=p.lora_A.bfloat16()),
    "dtype of B": lambda p: _with(p, lora_B=p.lora_B.bfloat16()),
    "strides of x": lambda p: _with(p, x=strided(p.x, 1)),
    "strides of A": lambda p: _with(p, lora_A=strided(p.lora_A, 1)),
    "strides of dy": lambda p: _with(p, grad_output=strided(p.grad_output, 1)),
    "scaling": lambda p: _with(p, scaling=-0.75),
    "dtype of the products": lambda p: p,
    "no bias": lambda p: _with(p, bias=None),
}


def _with(p, **changed):
    for name, value in changed.items():
        setattr(p, name, value)
    return p


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_plans_of_another_call_are_not_taken(name):
    base = on_device(problem((70,), 40, 24, 12, torch.bfloat16))
    run(base)
    run(base)
    calls = len(kernel_path.forward_plans), len(kernel_path.backward_plans)
    other = on_device(DIFFERENT[name](problem((70,), 40, 24, 12, torch.bfloat16)))
    dtype = torch.float32 if name == "dtype of the products" else None
    actual = run(other, dtype)
    launching.forget()
    alone = run(other, dtype)
    expected = solve(other)
    for what in actual:
        assert torch.equal(actual[what], alone[what]), what
        assert error(actual[what], expected[what]) <= RELATIVE[torch.bfloat16], what
    assert min(calls) >= 1


def test_the_setting_for_fp32_products_is_seen():
    p = on_device(problem((5,), 40, 24, 12, torch.float32))
    launching.forget()
    run(p)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee" if before == "tf32" else "tf32"
    try:
        run(p)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(kernel_path.forward_plans) == len(kernel_path.backward_plans) == 2


def test_a_layer_s_plans_are_found_together(monkeypatch):
    """From the second call on none of its kernels looks up its own plan."""
    p = on_device(problem((5,), 40, 24, 12, torch.float32))
    expected = run(p)
    for kernel in (kernel_path.down_kernel, kernel_path.up_kernel, kernel_path.grad_a_kernel):
        monkeypatch.delattr(kernel, "key_of")
    for name, value in run(p).items():
        assert torch.equal(value, expected[name])


def test_plans_are_not_kept_where_a_kernel_s_own_is_not(monkeypatch):
    launching.forget()
    monkeypatch.setattr(tuning, "is_settled", lambda device: False)
    run(on_device(problem((5,), 40, 24, 12, torch.float32)))
    assert not len(kernel_path.forward_plans)
    assert not len(kernel_path.backward_plans)
