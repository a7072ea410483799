"""COUNTED from shapes, not measured: bytes that adapters move (``python -m bench.model.traffic``).

A group is the linear layers of a block that read the same x (q/k/v, gate/up; the others are groups of one).
Every product reads its operands and writes its result once, an update in place reads what it adds to, and a
frozen weight is read by the forward and by dx. Activations, h and g are bf16. The MiCA adapters of mica.fast
are fp32 masters, so A, B and dA are fp32; stock PEFT's launches are those of `roofline.stock`. Left out:
biases, caches, partial sums, casts of A and B.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from bench.model import roofline
from bench.model.roofline import BF16, FP32

TOKENS, RANK = 1024, 16


class Group(NamedTuple):
    """x (tokens × in_features) and the widths of the layers that read it."""

    tokens: int
    in_features: int
    out_features: tuple[int, ...]
    rank: int = RANK


def _decoder(width: int, kv_width: int, inner: int) -> dict[str, Group]:
    """The linear layers of one of its blocks."""
    return {
        "q/k/v": Group(TOKENS, width, (width, kv_width, kv_width)),
        "o": Group(TOKENS, width, (width,)),
        "gate/up": Group(TOKENS, width, (inner, inner)),
        "down": Group(TOKENS, inner, (width,)),
    }


BLOCKS = {  # from the models' published configurations
    "Llama-3.2-1B": _decoder(2048, 512, 8192),
    "Qwen2.5-0.5B": _decoder(896, 128, 4864),
    "GPT-2": {
        "c_attn": Group(TOKENS, 768, (2304,)),
        "attn.c_proj": Group(TOKENS, 768, (768,)),
        "c_fc": Group(TOKENS, 768, (3072,)),
        "mlp.c_proj": Group(TOKENS, 3072, (768,)),
    },
}


def bare(group: Group) -> int:
    """y_i = x W_iᵀ; dx = dy_i W_i in one tensor per layer, which autograd adds up."""
    m, k, outs, _ = group
    x = BF16 * m * k
    products = sum(2 * (x + BF16 * n * k + BF16 * m * n) for n in outs)
    return products + (len(outs) - 1) * 3 * x


def ungrouped(group: Group) -> int:
    """Layer by layer: every adapter reads x for its h and for its dA, and updates its own dx."""
    m, k, outs, rank = group
    x, h, A = BF16 * m * k, BF16 * m * rank, FP32 * rank * k
    total = bare(group)
    for n in outs:
        y, B = BF16 * m * n, FP32 * n * rank
        total += (x + A + h) + (y + h + B + y)  # h = x Aᵀ; y += h Bᵀ
        total += (y + B + h) + (h + x + A) + (x + h + A + x)  # g = dy B; dA = gᵀ x; dx += g A
    return total


def grouped(group: Group) -> int:
    """Once per group: one product makes all h, one all dA, one updates dx. The GEMMs sum dx."""
    m, k, outs, rank = group
    count = len(outs)
    x, h, A = BF16 * m * k, BF16 * m * rank, FP32 * rank * k
    # a GEMM that adds to dx reads it, once; autograd's sum, which that replaces, moves three times as much
    total = bare(group) - (count - 1) * (3 * x - x)
    total += x + count * (A + h)  # [h₁ … h_g] = x [A₁; …; A_g]ᵀ
    total += (count * h + x + count * A) + (x + count * (h + A) + x)  # dA = [g₁ … g_g]ᵀ x; dx += [g₁ …] A
    for n in outs:
        y, B = BF16 * m * n, FP32 * n * rank
        total += (y + h + B + y) + (y + B + h)  # y += h Bᵀ; g = dy B
    return total


def stock(group: Group, adapter: int) -> int:
    """result + lora_B(lora_A(x))·scaling layer by layer, with its casts where the adapters are fp32."""
    m, k, outs, rank = group
    costs = [roofline.stock(roofline.Layer(m, n, k, rank, "sm_90"), adapter) for n in outs]
    launches = [kernel for cost in costs for kernel in (*cost.forward, *cost.backward)]
    return sum(kernel.bytes for kernel in launches) + (len(outs) - 1) * 3 * BF16 * m * k


FORMS: dict[str, Callable[[Group], int]] = {
    "bare frozen model": bare,
    "stock PEFT": partial(stock, adapter=FP32),
    "stock PEFT, bf16 adapters": partial(stock, adapter=BF16),
    "mica.fast, ungrouped": ungrouped,
    "mica.fast, grouped": grouped,
}


def over_bare(form: str, groups: list[Group]) -> float:
    """Bytes of a form, forward and backward of all these groups, over those of the bare layers."""
    return sum(map(FORMS[form], groups)) / sum(map(bare, groups))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    print(f"COUNTED from shapes, not measured: {TOKENS} tokens, rank {RANK}, bytes over the bare layers'")
    for name, groups in BLOCKS.items():
        columns = {**{part: [group] for part, group in groups.items()}, "block": [*groups.values()]}
        print(f"\n{name:<27}", *(f"{column:>12}" for column in columns))
        print(f"  {'bare, MB':<25}", *(f"{sum(map(bare, part)) / 1e6:>12.1f}" for part in columns.values()))
        for form in list(FORMS)[1:]:
            print(f"  {form:<25}", *(f"{over_bare(form, part):>12.3f}" for part in columns.values()))


if __name__ == "__main__":
    main()
