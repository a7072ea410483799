"""One table: a layer, its factors and a stack of experts, on every path, against one oracle in fp64."""

import copy

import pytest
import torch

from mica import ops
from mica.ops import mica_experts_linear, mica_linear
from tests.support import expert_cases, oracle
from tests.support.expert_cases import EVERY_ROUTE
from tests.support.kernel_cases import seed_of
from tests.support.linear_calls import (
    NATIVE,
    OWN,
    PATHS,
    WAYS,
    agree,
    by_call,
    on_device,
    run,
    same_bits,
    tensors_of,
)
from tests.support.oracle import DTYPES, solve

# what is called; before it may stand "LoRA, "
FUNCTIONS = {"linear": mica_linear, "base called": by_call, "experts": mica_experts_linear}
# rows, in_features, out_features, rank: on both sides of the number up to which masters are not rounded, more
# rows than `grad_a` casts at a time, none
SIZES = [
    ((), 9, 14, 3),
    ((1,), 1, 1, 1),
    ((3, 5), 33, 8, 8),
    ((2, 1, 7), 9, 14, 3),
    ((33,), 17, 65, 5),
    ((70,), 40, 24, 24),
    ((2, 50), 96, 136, 16),
    (MANY_ROWS := ((1100,), 19, 23, 16)),
    ((0,), 4, 3, 2),
]
DROPOUT = {"dropout_p": 0.4}
# kind, operands, with bias, options of the call
CASES = [
    *(("linear", sizes, True, {}) for sizes in SIZES),
    *(("linear", sizes, False, {}) for sizes in SIZES[::2]),
    *(("linear", sizes, True, DROPOUT) for sizes in SIZES[1::2]),
    *(("base called", sizes, True, {}) for sizes in SIZES[::2]),
    *(("base called", sizes, True, DROPOUT) for sizes in SIZES[1::2]),
    *(("LoRA, linear", sizes, True, {}) for sizes in SIZES[1::2]),
    *(("LoRA, linear", sizes, True, DROPOUT) for sizes in SIZES[::2]),
    *(("LoRA, base called", sizes, True, {}) for sizes in SIZES[::2]),
    *(("LoRA, experts", (route, 9, 14, 3), True, {}) for route in EVERY_ROUTE),
    *(("experts", (route, 9, 14, 3), True, {}) for route in ("tiles", "none at all")),
    # with the weight transposed
    *(("experts", (route, 33, 22, 5), False, {}) for route in ("first and last idle", "rows of none")),
]


def marked(case):
    """Interpreted kernels take 3 s for that many rows: once among the fast tests."""
    if MANY_ROWS not in case or case == ("linear", MANY_ROWS, True, {}):
        return case
    return pytest.param(*case, marks=pytest.mark.slow)


# path, dtypes: without kernels in fp64, and without what only 16-bit products do
DTYPES_ON = [
    (path, *dtypes)
    for path in PATHS
    for dtypes in DTYPES
    if dtypes[0].itemsize <= {"triton": 4, OWN: 8, NATIVE: 8}.get(path, 2)
]


@pytest.mark.parametrize(("path", "dtype", "adapter_dtype", "compute_dtype"), DTYPES_ON, indirect=["path"])
@pytest.mark.parametrize(("kind", "sizes", "bias", "options"), [*map(marked, CASES)], ids=str)
def test_agrees_with_the_oracle(path, kind, sizes, bias, options, dtype, adapter_dtype, compute_dtype):
    function, is_lora = FUNCTIONS[kind.removeprefix("LoRA, ")], "LoRA" in kind
    operator = "experts_linear" if "experts" in kind else "linear"
    if "experts" in kind:
        p = expert_cases.problem(*sizes, dtype, adapter_dtype, bias, transposed=not bias, trains_B=is_lora)
    else:
        p = oracle.problem(*sizes, dtype, adapter_dtype, bias, trains_B=is_lora)
    p, options = on_device(p), {**options, "seed": seed_of(-3)} if options else {}
    before = copy.deepcopy(p)
    result = run(p, compute_dtype, function, **options)
    agree(result, solve(p, **options), dtype)
    assert result["y"].dtype == result["grad_x"].dtype == dtype
    assert {value.dtype for name, value in result.items() if name in ("grad_A", "grad_B")} == {adapter_dtype}
    assert ("grad_B" in result) == is_lora
    assert all(map(torch.equal, tensors_of(p), tensors_of(before)))
    same_bits(run(p, compute_dtype, function, **options), result)
    for name in (operator, f"{operator}_backward"):
        assert ops.call_counts[name] == 2
        assert ops.call_counts[f"{name}_kernels"] == (2 if path == "triton" else 0)


def test_layouts(path):
    """A weight and an x that are transposed, and a gradient of stride 0, as that of a sum."""
    for p in (
        oracle.problem((5, 40), 24, 40, 5, torch.float32),
        expert_cases.problem("tiles", 24, 16, 5, torch.float32, transposed=True),
    ):
        p = on_device(p)
        p.weight = p.weight.mT.contiguous().mT
        p.x = p.x.transpose(0, 1).contiguous().transpose(0, 1)
        agree(run(p), solve(p), torch.float32)
        p.grad_output = torch.ones((), device=p.x.device).expand(p.grad_output.shape)
        agree(run(p), solve(p), torch.float32)


@pytest.mark.parametrize("trains_B", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_fp32_products_over_16_bit_round_no_gradient_of_a_factor(path, kind, trains_B):
    """In the backward too: x and dy are exact in fp32, and neither g nor h is rounded."""
    problem, rows = (expert_cases.problem, "tiles") if kind == "experts" else (oracle.problem, (70,))
    p = problem(rows, 40, 30, 3, torch.bfloat16, torch.float32, trains_B=trains_B)
    result = run(on_device(p), torch.float32, FUNCTIONS[kind])
    factors = {name: result[name] for name in ("grad_A", "grad_B") if name in result}
    agree(factors, solve(p), torch.float32)


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("path", [NATIVE, *WAYS], indirect=True)
def test_all_of_an_update_arrives_that_is_smaller_than_what_y_is_rounded_to(path, rows):
    """The share of it in y, by regression; a y that is rounded before it is added has 0.2 of it."""
    p = oracle.problem((rows,), 32, 60_000 // rows, 8, torch.bfloat16, torch.float32)
    p.bias.mul_(0.05)
    p.lora_A.mul_(3e-4 * p.weight.float().norm() / (p.scaling * p.lora_B @ p.lora_A).norm())
    expected = solve(p)["y"]
    p.lora_A, lora_A = torch.zeros_like(p.lora_A), p.lora_A
    base = solve(p)["y"]
    p.lora_A = lora_A
    update, arrived = expected - base, run(p)["y"].detach().double() - base
    share = (arrived * update).sum() / update.square().sum()
    assert abs(share - 1.0) <= 0.15


def test_only_experts_with_rows_are_read(path):
    """Those without have NaN in every operand, and get exact zeros."""
    p = expert_cases.problem("first and last idle", 5, 4, 2, torch.float32)
    idle = [0, 2, 5]
    for operand in (p.weight, p.lora_A, p.lora_B, p.bias):
        operand[idle] = float("nan")
    result = run(on_device(p))
    assert result["y"].isfinite().all()
    assert result["grad_x"].isfinite().all()
    assert (result["grad_A"][idle] == 0).all()
    assert (result["grad_A"][[1, 3, 4]] != 0).any(dim=2).all()
