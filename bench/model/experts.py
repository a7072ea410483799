"""COUNTED and MODELLED, not measured: MiCA on a stack of experts.

The two stacks of a block of Qwen3-30B-A3B in bf16, the sizes of PEFT's pull request 3577: launches and bytes
counted from shapes, the time by `bench.model.roofline` for an H100. All experts have tokens. PEFT folds
W' = W + s·B·A of the whole stack in every forward, keeps it for the backward, and forms dW' to get dA. It is
counted in its favour: a product reads each operand once and writes its result once; copies of B that its
layout needs are left out, as is a gradient of B, which MiCA has frozen. Ours is `mica.paths.triton_path`, B
prepared once. A grouped product of the base is one launch in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.model.roofline import BF16, FP32, H100, Cost, Kernel
from mica.kernels.common import padded_rank
from mica.kernels.limits import padded_columns


class Stack(NamedTuple):
    """x (rows × in_features), sorted by expert; W (experts × out_features × in_features)."""

    rows: int
    experts: int
    in_features: int
    out_features: int
    rank: int
    top_k: int = 1  # x are tokens, each in so many rows

    @property
    def w_numbers(self) -> int:
        return self.experts * self.out_features * self.in_features

    @property
    def a_numbers(self) -> int:
        return self.experts * self.rank * self.in_features

    @property
    def b_numbers(self) -> int:
        return self.experts * self.out_features * self.rank


ROWS = 4096 * 8  # tokens, experts of each
BLOCK = [Stack(ROWS, 128, 2048, 2 * 768, 16, 8), Stack(ROWS, 128, 768, 2048, 16)]  # gate_up, down


def grouped(stack: Stack) -> Kernel:
    """x_e W_eᵀ, or dy_e W_e, or dy_eᵀ x_e: three operands and results of the same sizes."""
    rows, _, k, n, *_ = stack
    return Kernel(BF16 * (rows * (k + n) + stack.w_numbers), 2.0 * rows * k * n)


def bare(stack: Stack) -> Cost:
    return Cost([grouped(stack)], [grouped(stack)], 0)


def ours(stack: Stack, adapter: int) -> Cost:
    """Adapters of ``adapter`` bytes per number; only x is kept for the backward, tokens rather than rows.

    All forms gather the rows of tokens in the forward, which is not counted. This one does so again.
    """
    rows, experts, k, n, rank, top_k = stack
    x, y, h = BF16 * rows * k, BF16 * rows * n, BF16 * rows * padded_columns(rank)
    A, B = adapter * stack.a_numbers, BF16 * experts * n * padded_columns(rank)

    def skinny(width: int, moved: int) -> Kernel:
        return Kernel(moved, 2.0 * rows * width * padded_rank(rank))

    forward = [skinny(k, x + A + h), grouped(stack), skinny(n, 2 * y + h + B)]
    backward = [skinny(n, y + B + h), skinny(k, h + x + A), grouped(stack), skinny(k, 2 * x + h + A)]
    if top_k > 1:
        backward.append(Kernel(x // top_k + x))
    return Cost(forward, backward, x // top_k)


def stock(stack: Stack, adapter: int) -> Cost:
    """PEFT's folding; casts where the adapters are not bf16. W' is kept for the backward."""
    A, B, W = BF16 * stack.a_numbers, BF16 * stack.b_numbers, BF16 * stack.w_numbers
    wide = adapter != BF16
    casts = [Kernel(numbers * (adapter + BF16)) for numbers in (stack.a_numbers, stack.b_numbers)] * wide
    flops = 2.0 * stack.w_numbers * stack.rank
    forward = [*casts, Kernel(2 * W + A + B, flops), grouped(stack)]
    backward = [grouped(stack), grouped(stack), Kernel(W + B + A, flops), *casts[:1]]  # dx, dW', dA
    return Cost(forward, backward, BF16 * stack.rows * stack.in_features + W)


FORMS = {
    "bare experts": bare,
    "mica, bf16 adapters": lambda stack: ours(stack, BF16),
    "mica, fp32 adapters": lambda stack: ours(stack, FP32),
    "stock PEFT, bf16 adapters": lambda stack: stock(stack, BF16),
    "stock PEFT, fp32 adapters": lambda stack: stock(stack, FP32),
}


def table() -> Iterator[list[str]]:
    """A row a form: launches, bytes and time of the forward, and of forward and backward; bytes kept."""
    for form, count in FORMS.items():
        costs = [count(stack) for stack in BLOCK]
        forward = [kernel for cost in costs for kernel in cost.forward]
        both = forward + [kernel for cost in costs for kernel in cost.backward]
        cells = [form]
        for kernels in (forward, both):
            moved, seconds = sum(one.bytes for one in kernels), sum(one.seconds(H100) for one in kernels)
            cells += [str(len(kernels)), f"{moved / 1e9:.2f} GB", f"{seconds * 1e3:.2f} ms"]
        yield [*cells, f"{sum(cost.saved for cost in costs) / 1e9:.2f} GB"]
