"""The fp64 oracle of a stack of experts: a dense weight per row and autograd, no formula of `mica` shared."""

from dataclasses import dataclass

import torch

from tests.support.oracle import padded

# (rows, ends): without rows at the start, in the middle and at the end, all to one expert, some to none
ROUTES = {
    "idle ones": (12, [0, 3, 3, 9, 12, 12]),
    "one expert": (7, [7]),
    "all to the second": (20, [0, 20, 20]),
    "rows of none": (15, [4, 4, 10]),
    "none at all": (5, [0, 0]),
    "no rows": (0, [0, 0, 0]),
    "one each": (4, [1, 2, 3, 4]),
}


@dataclass
class Problem:
    """Operands of one projection of a layer of experts; B strided as PEFT's, x and dy in buffers of NaN."""

    x: torch.Tensor  # (rows, in_features)
    offsets: torch.Tensor
    weight: torch.Tensor  # (num_experts, out_features, in_features)
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    grad_output: torch.Tensor
    scaling: float


def problem(
    route, in_features, out_features, rank, dtype, adapter_dtype=None, bias=True, transposed=False
) -> Problem:
    (rows, ends), adapter_dtype = ROUTES[route], adapter_dtype or dtype
    experts = len(ends)
    shape = (experts, in_features, out_features) if transposed else (experts, out_features, in_features)
    weight = (torch.randn(shape) * in_features**-0.5).to(dtype)
    lora_B = (torch.randn(out_features, rank, experts) * rank**-0.5).to(adapter_dtype)
    return Problem(
        x=padded(rows, in_features, dtype=dtype),
        offsets=torch.tensor(ends, dtype=torch.int32),
        weight=weight.transpose(1, 2) if transposed else weight,
        lora_A=(torch.randn(experts, rank, in_features) * in_features**-0.5).to(adapter_dtype),
        lora_B=lora_B.permute(2, 0, 1),
        bias=torch.randn(experts, out_features).to(dtype) if bias else None,
        grad_output=padded(rows, out_features, dtype=dtype),
        scaling=0.75,
    )


def solve(p: Problem) -> dict[str, torch.Tensor]:
    """y, dx and dA in fp64, from the operands as they are stored."""
    x, lora_A = (t.detach().double().requires_grad_() for t in (p.x, p.lora_A))
    dense = p.weight.double() + p.scaling * (p.lora_B.double() @ lora_A)
    bias = p.weight.new_zeros(p.weight.shape[:2]) if p.bias is None else p.bias
    ids = torch.searchsorted(p.offsets, torch.arange(len(x)), right=True)
    rows = []
    for row, expert in enumerate(ids.tolist()):
        if expert < len(p.offsets):
            rows.append(dense[expert] @ x[row] + bias[expert].double())
        else:
            rows.append(x[row].new_zeros(p.weight.shape[1]))
    y = torch.stack(rows) if rows else x.new_zeros(0, p.weight.shape[1])
    inputs = (x, lora_A)
    grads = (None, None)
    if y.requires_grad:
        grads = torch.autograd.grad(y, inputs, p.grad_output.double(), allow_unused=True)
    grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(inputs, grads, strict=True)]
    return {"y": y.detach(), "grad_x": grads[0], "grad_A": grads[1]}


def run(p: Problem, function, **options) -> dict[str, torch.Tensor]:
    """y, dx and dA of ``function``, which takes what `mica.ops.mica_experts_linear` takes."""
    x, lora_A = p.x.detach().requires_grad_(), p.lora_A.detach().requires_grad_()
    y = function(x, p.offsets, p.weight, lora_A, p.lora_B, p.scaling, p.bias, **options)
    y.backward(p.grad_output)
    return {"y": y, "grad_x": x.grad, "grad_A": lora_A.grad}
