"""The fp64 oracle: `tests.support.definition` on the operands of a problem, with dropout's own mask."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mica.paths.dropout import dropout_keep
from tests.support import definition

# dtype of x and the weight, dtype of the adapter, compute_dtype
DTYPES = [
    (torch.float64, torch.float64, None),
    (torch.float32, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.bfloat16, torch.float32, None),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, None),
    (torch.float16, torch.float32, torch.float32),
]


@dataclass
class Problem:
    """Operands of a layer, or with ``offsets`` of a stack of experts: then each has a dimension more.

    LoRA's where lora_B requires a gradient, else MiCA's. x and dy, and every matrix of a layer, are strided
    views into a buffer full of NaN (see `guard`).
    """

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    grad_output: torch.Tensor
    scaling: float
    offsets: torch.Tensor | None = None


@functools.cache
def guard(dtype: torch.dtype) -> float:
    """What lies between rows: NaN, or the largest number where this CPU's own products let a NaN through.

    With AMX, oneDNN reads bf16 rows of odd length by pairs and multiplies what lies behind them by zero,
    which leaves a NaN a NaN (https://github.com/uxlfoundation/oneDNN/issues/5717).
    """
    buffer = torch.full((33, 66), float("nan"), dtype=dtype)
    buffer[:, :65] = 1.0
    leaks = F.linear(buffer[:, :65], torch.ones(16, 65, dtype=dtype)).isnan().any()
    return torch.finfo(dtype).max if leaks else float("nan")


def padded(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Random matrices whose rows lie in a wider buffer, with `guard` between and around them."""
    buffer = torch.full((*shape[:-1], shape[-1] + 3), guard(dtype), dtype=dtype)
    buffer[..., 1:-2] = (torch.randn(shape) * scale).to(dtype)
    return buffer[..., 1:-2]


def problem(
    tokens: tuple[int, ...],
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    scaling: float = 0.75,
    trains_B: bool = False,
) -> Problem:
    adapter_dtype = adapter_dtype or dtype
    return Problem(
        x=padded(*tokens, in_features, dtype=dtype),
        weight=padded(out_features, in_features, dtype=dtype, scale=in_features**-0.5),
        lora_A=padded(rank, in_features, dtype=adapter_dtype, scale=in_features**-0.5),
        lora_B=padded(out_features, rank, dtype=adapter_dtype, scale=rank**-0.5).requires_grad_(trains_B),
        bias=torch.randn(out_features).to(dtype) if bias else None,
        grad_output=padded(*tokens, out_features, dtype=dtype),
        scaling=scaling,
    )


def dropout_mask(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """keep / (1 - p) in fp64, row by row of the last dimension: what x is multiplied by."""
    if not dropout_p:
        return torch.ones_like(x, dtype=torch.float64)
    keep = dropout_keep(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p)
    return keep.view(x.shape).double() / (1 - dropout_p)


def dropped(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """x with its mask, in fp64; a NaN that is dropped is 0."""
    mask = dropout_mask(x, dropout_p, seed)
    return (mask * x.double()).where(mask != 0, 0)


def solve(p: Problem, dropout_p: float = 0.0, seed: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """y, dx, dA and dB by `tests.support.definition` in fp64, from the operands as they are stored."""
    trained = [tensor.detach().double().requires_grad_() for tensor in (p.x, p.lora_A, p.lora_B)]
    x, lora_A, lora_B = trained
    weight = p.weight.detach().double()
    factors = weight, lora_A, lora_B, p.scaling
    bias = weight.new_zeros(weight.shape[:-1]) if p.bias is None else p.bias.double()
    if p.offsets is not None:
        y = definition.experts_linear(x, p.offsets, *factors, bias)
    else:
        y = definition.linear(x, *factors, bias, dropout_mask(p.x, dropout_p, seed))
    gradients = torch.autograd.grad(y, trained, p.grad_output.double())
    return dict(zip(("y", "grad_x", "grad_A", "grad_B"), (y.detach(), *gradients), strict=True))
