"""The plans of all launches of a layer, looked up together: never another call's (interpreted here)."""

import warnings

import pytest
import torch

from mica import ops
from mica.kernels import launching
from mica.paths import choose, triton_path
from tests.support.linear_calls import on_device, run
from tests.support.oracle import problem, solve
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("on_kernels")


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
    calls = len(triton_path.recorded_forward), len(triton_path.recorded_backward)
    other = on_device(DIFFERENT[name](problem((70,), 40, 24, 12, torch.bfloat16)))
    dtype = torch.float32 if name == "dtype of the products" else None
    actual = run(other, dtype)
    launching.clear()
    alone = run(other, dtype)
    expected = solve(other)
    for what in actual:
        assert torch.equal(actual[what], alone[what]), what
        assert error(actual[what], expected[what]) <= RELATIVE[torch.bfloat16], what
    assert min(calls) >= 1


def test_the_setting_for_fp32_products_is_seen():
    p = on_device(problem((5,), 40, 24, 12, torch.float32))
    launching.clear()
    run(p)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee" if before == "tf32" else "tf32"
    try:
        run(p)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(triton_path.recorded_forward) == len(triton_path.recorded_backward) == 2


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_layer_s_plans_are_found_together(monkeypatch, dropout_p):
    """From the second call on none of its kernels looks up its own plan."""
    p, options = on_device(problem((5,), 40, 24, 12, torch.float32)), {"dropout_p": dropout_p}
    options["seed"] = torch.tensor([3], device=p.x.device) if dropout_p else None
    expected = run(p, **options)
    monkeypatch.setattr(launching.Launcher, "key", None)
    for name, value in run(p, **options).items():
        assert torch.equal(value, expected[name])


# The kernels of a layer, as they are met; the operators that run on the reference where they are not loaded
KERNELS = {"_down_projection_kernel": 2, "_up_projection_kernel": 2, "_grad_a_kernel": 1}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_a_capture_cannot_load_is_missed_once(monkeypatch, kernel):
    """The first of a formula's kernels or a later one: that call alone runs on the reference; one warning."""
    p = on_device(problem((70,), 40, 24, 12, torch.bfloat16))
    monkeypatch.setenv("MICA_BACKEND", "reference")
    expected = run(p)
    monkeypatch.setenv("MICA_BACKEND", "auto")
    monkeypatch.setattr(choose.runtime, "is_interpreting", lambda: False)
    monkeypatch.setattr(choose.runtime, "why_unavailable", lambda device: None)
    launching.clear()
    ops.call_counts.clear()
    with monkeypatch.context() as capture, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        capture.setattr(launching, "is_capturing", lambda device: True)
        capture.setattr(launching.Launch, "_is_loaded", lambda launch: launch.kernel.__name__ != kernel)
        for _ in range(2):
            for name, value in run(p).items():
                assert error(value, expected[name].double()) <= RELATIVE[torch.bfloat16], name
    assert len(warned) == KERNELS[kernel]
    assert all("in a CUDA graph on cpu: a kernel for this kind" in str(each.message) for each in warned)
    kernels = ("linear_kernels", "linear_backward_kernels")
    assert sum(ops.call_counts[name] for name in kernels) == 2 * (2 - KERNELS[kernel])
    assert choose.why_not_kernels(p.x.device, 12, torch.bfloat16) is None
    ops.call_counts.clear()
    run(p)  # after the capture
    assert all(ops.call_counts[name] == 1 for name in kernels)


@pytest.mark.parametrize("demanded", ["triton", "auto"])
def test_where_a_capture_cannot_run_the_reference_the_reason_is_raised(monkeypatch, demanded):
    """Where kernels are demanded; and of experts, because the reference waits for the device."""
    monkeypatch.setattr(choose, "use_kernels", lambda *args, **kwargs: True)
    monkeypatch.setenv("MICA_BACKEND", demanded)
    monkeypatch.setattr(launching, "is_capturing", lambda device: True)
    launching.clear()
    p = on_device(problem((6,), 16, 24, 4, torch.float32))
    stacks = [tensor.unsqueeze(0) for tensor in (p.weight, p.lora_A, p.lora_B)]
    calls = {
        "triton": lambda: run(p),
        "auto": lambda: ops.mica_experts_linear(p.x, torch.tensor([6], device=p.x.device), *stacks),
    }
    with pytest.raises(triton_path.NotLoadedError, match="make the call once before the capture"):
        calls[demanded]()
