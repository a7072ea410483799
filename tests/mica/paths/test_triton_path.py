"""A layer on Triton kernels (interpreted here): its forms, its operands, and refusals."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton

from mica import ops
from mica.kernels import launching, prepared_b
from mica.ops import mica_experts_linear, mica_linear
from mica.paths import choose, triton_path
from mica.paths.operands import Operands
from tests.support import expert_cases
from tests.support.kernel_cases import BF16, DEVICE, FP16, FP32, LAYER_DTYPES, mica_and_lora, seed_of
from tests.support.linear_calls import (
    adapted,
    agree,
    by_call,
    call,
    contiguous,
    leaves,
    of_users,
    on_device,
    run,
    tensors_of,
)
from tests.support.oracle import problem, solve
from tests.support.tolerances import RELATIVE, error

pytestmark = pytest.mark.usefixtures("on_kernels")

# form -> the kernels of a forward and its backward
OTHERS = ["_down_projection_kernel", "_grad_a_kernel"]
FORMS = {
    "split": [*OTHERS, "_up_projection_kernel"],
    "first": OTHERS,
    "mixed": ["_up_projection_kernel"],
    "fused": [*OTHERS, "_fused_linear_kernel"],
    "reference": [],
}


def dense(*sizes, dtype=BF16, adapter_dtype=FP32):
    """Contiguous and aligned."""
    return contiguous(problem(*sizes, dtype, adapter_dtype))


def cases(form):
    """dtypes, dropout: each of both with each form that a layer can have, see `tuning.forms_of`."""
    for number, dtypes in enumerate(LAYER_DTYPES):
        # the vendor's fp32 products are slower than kernels, and a mask would be stored
        if form not in ("first", "mixed"):
            yield form, dtypes, 0.4 * (number % 2)
        elif FP32 not in (dtypes[0], dtypes[2]):
            yield form, dtypes, 0.0


@pytest.mark.parametrize(("form", "dtypes", "dropout_p"), [case for form in FORMS for case in cases(form)])
@mica_and_lora
@pytest.mark.whole
def test_every_form_agrees_with_the_dense_oracle(
    by_default, choose_form, launched, form, dtypes, dropout_p, trains_B
):
    dtype, adapter_dtype, compute_dtype = dtypes
    choose_form(form)
    if form == "reference":  # demanded kernels run whatever the table says
        by_default()
    p = dense((2, 9), 48, 72, 16 if form == "mixed" else 5, dtype=dtype, adapter_dtype=adapter_dtype)
    p.lora_B.requires_grad_(trains_B)
    options = {"dropout_p": dropout_p, "seed": seed_of(77)} if dropout_p else {}
    for _ in range(2):  # planned, and as planned
        agree(run(p, compute_dtype, **options), solve(p, **options), dtype)
    assert {name for name, _ in launched} == set(FORMS[form])


@pytest.mark.parametrize("function", [mica_linear, by_call, mica_experts_linear])
def test_no_copy_of_a_trained_b_is_used_again(function):
    """Fused optimizers do not count their edits: ``_version`` stays. In evaluation, too."""
    p = dense((6,), 16, 32, 3)
    if function is mica_experts_linear:
        p = on_device(expert_cases.problem("tiles", 33, 22, 5, BF16, FP32))
    lora_A, lora_B = (torch.nn.Parameter(t.detach().clone()) for t in (p.lora_A, p.lora_B))
    optimizer = torch.optim.AdamW([lora_A, lora_B], lr=0.1, fused=True)
    for _ in range(3):
        now = replace(p, lora_A=lora_A.detach().clone(), lora_B=lora_B.detach().clone())
        with torch.no_grad():
            y = call(p, function, p.x, lora_A, lora_B)
        agree({"y": y}, solve(now), BF16)
        optimizer.zero_grad()
        call(p, function, p.x, lora_A, lora_B).backward(p.grad_output)
        agree({"grad_A": lora_A.grad, "grad_B": lora_B.grad}, solve(now), BF16)
        optimizer.step()
    assert lora_B._version == 0


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_no_copy_is_kept_of_a_b_that_may_be_trained_later(kind):
    prepared_b.clear()
    p = on_device(expert_cases.problem("tiles", 33, 22, 5, BF16, FP32))
    backward, offsets = triton_path.experts_linear_backward, [p.offsets]
    if kind == "linear":
        p, backward, offsets = dense((6,), 16, 32, 3), triton_path.linear_backward, []
    operands = Operands(p.weight, p.lora_A, p.lora_B, p.scaling, trains_B=True)
    backward(p.grad_output, p.x, *offsets, operands, True)
    assert not prepared_b.entries


def test_the_output_of_a_base_layer_may_be_transposed_and_in_32_bits():
    """y is contiguous, as torch.compile is told, and B is not rounded."""
    base_output, lora_B = torch.randn(20, 24, device=DEVICE).t(), torch.randn(20, 4, device=DEVICE)
    whole = partial(torch.randint, -2, 3, device=DEVICE)  # so that h is exact in 16 bits
    x, lora_A = whole((24, 8), dtype=BF16), whole((4, 8), dtype=FP32)
    y = adapted(base_output, x, lora_A, lora_B)
    assert y.is_contiguous()
    update = x.double() @ (lora_B.double() @ lora_A.double()).t()
    assert error(y, base_output.double() + update) <= RELATIVE[FP32]


RANK, TOKENS = 64, 40  # the rule's own number of tokens would take the interpreter long


DROPPED = {"dropout_p": 0.4, "seed": seed_of(5)}
CALLS = {  # options of `run`
    "linear": {},
    "linear with dropout": DROPPED,
    "base called": {"function": by_call, **DROPPED},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_where_a_is_rounded_before_the_launches_no_bit_differs(monkeypatch, launched, call, dtype):
    """And kernels are launched with what was rounded: at first, and by the plans of the first call."""
    results = {}
    for many in (TOKENS + 1, TOKENS):
        monkeypatch.setattr(triton_path, "MANY_TOKENS", many)
        launching.clear()
        for _ in range(2):
            torch.manual_seed(0)
            p = dense((TOKENS,), 48, 40, RANK, dtype=dtype)
            launched.clear()
            results.setdefault(many, []).append([*run(p, **CALLS[call]).values()])
            kinds = {kind for _, kind in launched if kind}
            assert (FP32 in kinds) == (many > TOKENS)
            assert kinds <= {FP32, dtype}
            assert results[many][-1][2].dtype == FP32  # the gradient has the dtype of the parameter
    plain, *others = (*results[TOKENS + 1], *results[TOKENS])
    for other in others:
        assert all(map(torch.equal, plain, other))


def test_a_write_that_no_version_counts_is_seen(monkeypatch):
    monkeypatch.setattr(triton_path, "MANY_TOKENS", TOKENS)
    p = dense((TOKENS,), 48, 40, RANK)
    for _ in range(2):
        run(p)
    version = p.lora_A._version
    p.lora_A.data.mul_(-2.0)
    assert p.lora_A._version == version
    agree(run(p), solve(p), BF16)


@pytest.mark.parametrize(
    ("rank", "tokens", "a_dtype", "dtype", "is_rounded"),
    [
        (64, 2048, FP32, BF16, True),
        (256, 8192, FP32, FP16, True),
        (63, 8192, FP32, BF16, False),
        (64, 2047, FP32, BF16, False),
        (64, 8192, BF16, FP16, False),
        (64, 8192, FP32, FP32, False),
        (64, 8192, BF16, FP32, False),
    ],
)
def test_a_is_rounded_where_it_is_read_often_enough(rank, tokens, a_dtype, dtype, is_rounded):
    lora_A = torch.randn(rank, 4).to(a_dtype)
    operand = triton_path.as_operand(lora_A, tokens, dtype)
    assert operand.dtype == (dtype if is_rounded else a_dtype)
    assert (operand is not lora_A) == is_rounded


@mica_and_lora
def test_second_derivatives_and_transforms_take_the_plain_formulas(trains_B):
    p = on_device(problem((3,), 5, 4, 2, FP32, trains_B=trains_B))
    _, *factors = leaves(p)
    y = call(p, mica_linear, p.x, *factors)
    grads = torch.autograd.grad(y.square().sum(), factors, create_graph=True)
    assert ops.call_counts["linear_backward"] == 1
    assert ops.call_counts["linear_backward_kernels"] == 0
    second = torch.autograd.grad(sum(grad.sum() for grad in grads), factors)
    # MiCA's is the first backward once more; LoRA's has a gradient of h, which no kernel takes
    assert ops.call_counts["linear_backward_kernels"] == (0 if trains_B else 1)
    assert all(value.any() for value in second)
    p.lora_B.requires_grad_(False)

    def loss(lora_A):
        return (mica_linear(p.x, p.weight, lora_A, p.lora_B, p.scaling) * p.grad_output).sum()

    assert error(torch.func.grad(loss)(p.lora_A), solve(p)["grad_A"]) <= RELATIVE[FP32]
    assert ops.call_counts["linear_kernels"] == 1


PARTS = {  # what cannot be launched -> the functions that have it
    "down": {"linear", "linear_backward"},
    "up_projection_": {"linear", "linear_backward"},
    "grad_a": {"linear_backward"},
}


def fails(*args, **kwargs):
    raise triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")


@pytest.mark.parametrize("part", PARTS)
def test_a_kernel_that_cannot_be_launched(monkeypatch, by_default, choose_form, part):
    """For example too much shared memory: an error where kernels are demanded, else it gives way.

    Raised before anything ran, so the operands are unchanged. What has other kernels, another rank or other
    dtypes goes on with kernels.
    """
    p = dense((6,), 16, 32, 3)
    for operands in (p, on_device(expert_cases.problem("tiles", 33, 22, 5, BF16, FP32))):
        before = copy.deepcopy(operands)
        with monkeypatch.context() as patch:
            patch.setattr(getattr(triton_path, part), "planned", fails)
            with pytest.raises(triton.runtime.errors.OutOfResources):
                run(operands)
        assert all(map(torch.equal, tensors_of(operands), tensors_of(before)))
    monkeypatch.setenv("MICA_BACKEND", "reference")
    expected = run(p)
    by_default()
    choose_form("split")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(triton_path, part), "planned", fails)
        with pytest.warns(UserWarning, match="from now on: out of resource") as warned:
            result = run(p)
    agree(result, {name: value.double() for name, value in expected.items()}, BF16)
    assert len(of_users(warned)) == len(PARTS[part])
    ops.call_counts.clear()
    run(p)
    kernels = {f"{name}_kernels" for name in {"linear", "linear_backward"} - PARTS[part]}
    assert {name for name in ops.call_counts if name.endswith("_kernels")} == kernels
    given_up = choose.choice_of("linear_backward", p.x.device, 3, (BF16, BF16, FP32, FP32))
    assert "out of resource" in given_up.reason
    for other in (dense((6,), 16, 32, 4, adapter_dtype=BF16), dense((6,), 16, 32, 3, dtype=FP32)):
        ops.call_counts.clear()
        run(other)
        assert ops.call_counts["linear_kernels"] == ops.call_counts["linear_backward_kernels"] == 1
