"""Every operand changes the results of every path; a new one is red until all take it, or a list names it."""

import pytest
import torch

from mica import native
from mica.ops.linear import linear_eager
from mica.paths import reference_path, triton_path
from mica.paths.operands import Operands
from tests.support import expert_cases
from tests.support.kernel_cases import BF16, FP32, seed_of
from tests.support.linear_calls import on_device
from tests.support.oracle import problem
from tests.support.processor import has_instructions

# Another value of each field; a tensor is another one of its shape.
OTHER = {
    "scaling": 3.0,
    "compute_dtype": FP32,
    "dropout_p": 0.25,
    "seed": seed_of(2),
    "autocast_dtype": BF16,
    "trains_B": False,
}


def on(path):
    def results(p, operands):
        name, rows = "linear", ()
        if p.offsets is not None:
            name, rows = "experts_linear", (p.offsets,)
        forward, backward = getattr(path, name), getattr(path, f"{name}_backward")
        return *forward(p.x, *rows, operands), *backward(p.grad_output, p.x, *rows, operands, True)

    return results


def from_cpp(p, operands):
    leaves = p.x.requires_grad_(), operands.lora_A.requires_grad_()
    y = linear_eager(p.x, *operands)
    return y, *torch.autograd.grad(y, leaves, p.grad_output)


NOT_OF_EXPERTS = {"dropout_p", "seed", "autocast_dtype", "base_output"}
# path -> its results, and the fields that do not change them
PATHS = {
    "reference": (on(reference_path), {"trains_B"}),
    "C++": (from_cpp, {"trains_B"}),
    "kernels": (on(triton_path), {"autocast_dtype"}),
    "experts": (on(reference_path), {"trains_B", *NOT_OF_EXPERTS}),
    "experts on kernels": (on(triton_path), NOT_OF_EXPERTS),
}
CASES = [
    (path, field) for path, (_, same) in PATHS.items() for field in Operands._fields if field not in same
]


@pytest.mark.parametrize(("path", "field"), CASES)
def test_a_path_takes_every_field(monkeypatch, path, field):
    if path == "C++" and native.module() is None:
        pytest.skip(native.why_not())
    has_instructions(True, monkeypatch)
    if "experts" in path:
        p, dropout = expert_cases.problem("all to the second", 24, 16, 4, BF16, FP32), {}
    else:
        p, dropout = problem((40,), 24, 16, 4, BF16, FP32), {"dropout_p": 0.5, "seed": seed_of(1)}
    p, (results, _) = on_device(p), PATHS[path]
    operands = Operands(p.weight, p.lora_A, p.lora_B, p.scaling, p.bias, **dropout, trains_B=True)
    other = {**OTHER, "base_output": torch.randn_like(p.grad_output)}
    value = other[field] if field in other else torch.randn_like(getattr(operands, field))
    before, after = (results(p, o) for o in (operands, operands._replace(**{field: value})))
    assert not all(b is not None and torch.equal(a, b) for a, b in zip(before, after, strict=True))
