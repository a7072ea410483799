"""The plans of all launches of a layer, looked up together: never another call's (interpreted here)."""

import warnings
from dataclasses import replace

import pytest
import torch

from mica import ops
from mica.kernels import launching
from mica.paths import choose, triton_path
from tests.support import expert_cases
from tests.support.kernel_cases import mica_and_lora, seed_of
from tests.support.linear_calls import agree, of_users, on_device, run, same_bits
from tests.support.oracle import problem, solve
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("on_kernels")

BF16, FP32 = torch.bfloat16, torch.float32


def strided(matrix):
    """The same numbers with gaps in memory between columns."""
    return matrix.repeat_interleave(2, 1)[:, ::2]


def layer(tokens=9, in_features=40, out_features=24, rank=12, dtype=BF16):
    return problem((tokens,), in_features, out_features, rank, dtype)


def stack(out_features=22, bias=True):
    return expert_cases.problem("rows of none", 33, out_features, 5, BF16, FP32, bias)


def without_bias(p):
    return replace(p, bias=None)


# What differs from a call before it, whose plans must not be taken: the first call, the other
DIFFERENT = {
    "tokens": (lambda: layer(tokens=35), lambda p: layer(tokens=18)),
    "in_features": (layer, lambda p: layer(in_features=48)),
    "out_features": (layer, lambda p: layer(out_features=32)),
    "rank": (layer, lambda p: layer(rank=5)),
    "dtype of x": (layer, lambda p: layer(dtype=torch.float16)),
    "dtype of A": (layer, lambda p: replace(p, lora_A=p.lora_A.float())),
    "dtype of B": (layer, lambda p: replace(p, lora_B=p.lora_B.float())),
    "strides of x": (layer, lambda p: replace(p, x=strided(p.x))),
    "strides of A": (layer, lambda p: replace(p, lora_A=strided(p.lora_A))),
    "strides of dy": (layer, lambda p: replace(p, grad_output=strided(p.grad_output))),
    "scaling": (layer, lambda p: replace(p, scaling=-0.75)),
    "dtype of the products": (layer, lambda p: p),
    "no bias": (layer, without_bias),
    "experts: no bias": (stack, without_bias),
    # of another type, and with gaps in memory
    "experts: ends": (stack, lambda p: replace(p, offsets=torch.stack([p.offsets.long()] * 2, dim=1)[:, 0])),
    "experts: scaling": (stack, lambda p: replace(p, scaling=2.0)),
    # without a bias, which would show it too
    "experts: out_features": (lambda: stack(bias=False), lambda p: stack(40, bias=False)),
    "experts: A": (stack, lambda p: replace(p, lora_A=p.lora_A.bfloat16().mT.contiguous().mT)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_plans_of_another_call_are_not_taken(name):
    first, other = DIFFERENT[name]
    p = on_device(first())
    for _ in range(2):
        run(p)
    assert len(triton_path.recorded_forward) >= 1 <= len(triton_path.recorded_backward)
    p, dtype = on_device(other(p)), FP32 if name == "dtype of the products" else None
    actual = run(p, dtype)
    if p.offsets is not None:  # the interpreter takes ends of any type
        assert len(triton_path.recorded_forward) == 2
    launching.clear()
    same_bits(actual, run(p, dtype))
    agree(actual, solve(p), BF16)


def test_the_setting_for_fp32_products_is_seen():
    p = on_device(layer(5, dtype=FP32))
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
    p = on_device(layer(5, dtype=FP32))
    options = {"dropout_p": dropout_p, "seed": seed_of(3)} if dropout_p else {}
    expected = run(p, **options)
    monkeypatch.setattr(launching.Launcher, "key", None)
    same_bits(run(p, **options), expected)


# The kernels of a layer, as they are met, and the formulas that run on the reference where one is not loaded
LAYER = ("linear", "linear_backward")
KERNELS = {"_down_projection_kernel": LAYER, "_up_projection_kernel": LAYER, "_grad_a_kernel": LAYER[1:]}
PREFIX = {False: "", True: choose.LORA}  # by whether B is trained: of their names as choices


@mica_and_lora
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_a_capture_cannot_load_is_missed_once(
    monkeypatch, by_default, choose_form, kernel, trains_B
):
    """The first of a formula's kernels or a later one: that call alone runs on the reference; one warning."""
    formulas, missed = {*LAYER}, {*KERNELS[kernel]}
    if trains_B:
        formulas.add("grad_b")
        missed |= {"grad_b"} if kernel == "_grad_a_kernel" else set()
    p = layer(in_features=48, out_features=32)
    p = on_device(replace(p, x=p.x.contiguous(), grad_output=p.grad_output.contiguous()))
    p.lora_B.requires_grad_(trains_B)
    monkeypatch.setenv("MICA_BACKEND", "reference")
    expected = run(p)
    by_default()
    choose_form("split")
    ops.call_counts.clear()
    with monkeypatch.context() as capture, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        capture.setattr(launching, "is_capturing", lambda device: True)
        capture.setattr(launching.Launch, "_is_loaded", lambda launch: launch.kernel.__name__ != kernel)
        for _ in range(2):
            for name, value in run(p).items():
                assert error(value, expected[name].double()) <= RELATIVE[BF16], name
    functions = {name: name if name == "grad_b" else PREFIX[trains_B] + name for name in formulas}
    messages = of_users(warned)
    assert all("in a CUDA graph on cpu: a kernel for this kind" in message for message in messages)
    assert {message.split()[2] for message in messages} == {functions[name] for name in missed}
    assert len(messages) == len(missed)
    for name in formulas:
        assert ops.call_counts[f"{name}_kernels"] == (0 if name in missed else 2), name
        choice = choose.choice_of(functions[name], p.x.device, 12, (BF16, BF16, FP32, FP32))
        assert choice.form == choose.KERNELS
    ops.call_counts.clear()
    run(p)  # after the capture
    assert all(ops.call_counts[f"{name}_kernels"] == 1 for name in formulas)


@mica_and_lora
@pytest.mark.parametrize("demanded", ["triton", "auto"])
def test_where_a_capture_cannot_run_the_reference_the_reason_is_raised(
    monkeypatch, by_default, demanded, trains_B
):
    """Where kernels are demanded; and of experts, because the reference waits for the device."""
    by_default()
    monkeypatch.setenv("MICA_BACKEND", demanded)
    monkeypatch.setattr(launching, "is_capturing", lambda device: True)
    launching.clear()
    p = on_device(problem((6,), 16, 24, 4, FP32))
    p.lora_B.requires_grad_(trains_B)
    stacks = [tensor.unsqueeze(0) for tensor in (p.weight, p.lora_A, p.lora_B)]
    calls = {
        "triton": lambda: run(p),
        "auto": lambda: ops.mica_experts_linear(p.x, torch.tensor([6], device=p.x.device), *stacks),
    }
    with pytest.raises(triton_path.NotLoadedError, match="make such a call once before the capture"):
        calls[demanded]()
