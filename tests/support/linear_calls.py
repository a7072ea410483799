"""A linear layer's forward and backward through an operator, and its operands on the tested device."""

from mica.ops import mica_linear
from tests.support.kernel_cases import DEVICE
from tests.support.oracle import Problem
from tests.support.tolerances import RELATIVE, error


def on_device(p: Problem) -> Problem:
    for name in ("x", "weight", "lora_A", "lora_B", "bias", "grad_output"):
        value = getattr(p, name)
        if value is not None:
            setattr(p, name, value.to(DEVICE))
    return p


def run(p: Problem, compute_dtype=None, function=mica_linear, **options) -> dict:
    """y, dx and dA of ``function``, which takes what `mica_linear` takes."""
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    y = function(x, p.weight, lora_A, p.lora_B, p.scaling, p.bias, compute_dtype=compute_dtype, **options)
    y.backward(p.grad_output)
    return {"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}


def agree(actual: dict, expected: dict, dtype) -> None:
    for name, value in actual.items():
        assert error(value, expected[name]) <= RELATIVE[dtype], name
