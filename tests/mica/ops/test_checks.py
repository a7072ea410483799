"""What the operators refuse, and what the message says: argument, what it is, what is allowed."""

import pytest
import torch

from mica.ops import mica_experts_linear, mica_linear
from tests.support import expert_cases
from tests.support.oracle import problem

randn = torch.randn


def test_without_gradients_no_operand_must_be_frozen():
    p = problem((3,), 4, 5, 2, torch.float32)
    with torch.no_grad():
        operands = (t.requires_grad_() for t in (p.x, p.weight, p.lora_A, p.lora_B))
        mica_linear(*operands, 1.0, p.bias.requires_grad_())


def test_autocast_takes_a_weight_and_a_bias_of_another_dtype_than_x():
    """As the output of a layer before it: 16-bit activations over a 32-bit model."""
    p = problem((3,), 4, 5, 2, torch.float32)
    x = p.x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = mica_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling, p.bias)
        as_cast = (p.weight.bfloat16(), p.lora_A, p.lora_B, p.scaling, p.bias.bfloat16())
        assert torch.equal(y, mica_linear(x, *as_cast))


def operands_of_experts():
    operands = vars(expert_cases.problem("one each", 5, 4, 2, torch.float32))
    return {name: operands[name] for name in ("x", "offsets", "weight", "lora_A", "lora_B", "bias")}


# operator -> operands that are right, and changes with what is said of each
CASES = {
    mica_linear: (
        lambda: (
            {"x": randn(3, 4), "weight": randn(5, 4), "lora_A": randn(2, 4), "lora_B": randn(5, 2)}
            | {"bias": randn(5)}
        ),
        [
            (
                {"x": randn(3, 5)},
                ValueError,
                r"where in_features is 4, but it is \(3, 5\)",
            ),
            ({"x": randn(())}, ValueError, r"x must be .*, but it is \(\)"),
            (
                {"weight": randn(5, 4, 1)},
                ValueError,
                r"weight must be .*it is \(5, 4, 1\)",
            ),
            ({"lora_A": randn(2, 5)}, ValueError, r"lora_A must be \(rank, in_features\)"),
            ({"lora_A": randn(())}, ValueError, r"lora_A must be .*, but it is \(\)"),
            ({"lora_B": randn(5, 3)}, ValueError, r"where rank is 2, but it is \(5, 3\)"),
            (
                {"bias": randn(4)},
                ValueError,
                r"where out_features is 5, but it is \(4,\)",
            ),
            ({"x": randn(3, 4).bfloat16()}, TypeError, "weight must have the dtype of x.*torch.float32"),
            ({"bias": randn(5).half()}, TypeError, "bias must have the dtype of x"),
            ({"x": randn(3, 4).cfloat()}, TypeError, "x must be of dtype .*complex64"),
            ({"lora_A": torch.ones(2, 4, dtype=torch.int8)}, TypeError, "lora_A must be of dtype"),
            ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, but it is 1.0"),
            ({"dropout_p": 0.1}, ValueError, "seed must be an int64 tensor.*it is None"),
            ({"dropout_p": 0.1, "seed": torch.tensor(1)}, ValueError, r"it is torch.int64 of shape \(\)"),
        ],
    ),
    mica_experts_linear: (
        operands_of_experts,
        [
            ({"x": randn(4, 3, 5)}, ValueError, r"x must be \(rows, in_features\).*it is \(4, 3, 5\)"),
            ({"x": randn(4, 6)}, ValueError, r"where in_features is 5, but it is \(4, 6\)"),
            ({"weight": randn(4, 5)}, ValueError, r"weight must be .*, but it is \(4, 5\)"),
            (
                {"offsets": torch.tensor([4])},
                ValueError,
                r"where num_experts is 4, but it is \(1,\)",
            ),
            ({"offsets": torch.rand(4)}, TypeError, "offsets must be of dtype int32, int64"),
            ({"lora_A": randn(3, 2, 5)}, ValueError, r"lora_A must be .*, but it is \(3, 2, 5\)"),
            ({"lora_A": randn(8, 5)}, ValueError, r"lora_A must be .*, but it is \(8, 5\)"),
            ({"lora_B": randn(4, 2, 4)}, ValueError, r"lora_B must be .*, but it is \(4, 2, 4\)"),
            (
                {"bias": randn(4)},
                ValueError,
                r"bias must be .*, but it is \(4,\)",
            ),
        ],
    ),
}


FROZEN = "weight", "bias"


def bad_input():
    """(operator, what is changed, the error, what it says)"""
    for operator, (operands, cases) in CASES.items():
        yield from ((operator, *case) for case in cases)
        for name, right in operands().items():
            yield operator, {name: right.to("meta")}, ValueError, f"one device, but found .*{name} on meta"
        for name in FROZEN:
            yield operator, {name: operands()[name].requires_grad_()}, ValueError, f"{name} must be frozen"
        yield operator, {"compute_dtype": torch.int8}, TypeError, "compute_dtype must be a floating dtype"


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize(("operator", "change", "kind", "message"), list(bad_input()))
def test_bad_input_is_named(monkeypatch, backend, operator, change, kind, message):
    monkeypatch.setenv("MICA_BACKEND", backend)
    operands, _ = CASES[operator]
    with pytest.raises(kind, match=message):
        operator(**{**operands(), **change})


@pytest.mark.parametrize("operator", CASES)
def test_all_other_operands_may_be_trained(operator):
    operands = CASES[operator][0]()
    for name, operand in operands.items():
        operand.requires_grad_(operand.is_floating_point() and name not in FROZEN)
    result = operator(**operands)
    assert result.requires_grad
