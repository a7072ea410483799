"""Every public function, called as by a user. mypy --strict and pyright accept it (tests/test_typing.py)."""

from collections import Counter

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import Module
from typing_extensions import assert_type

import mica
import mica.fast
import mica.ops
from mica import MinorSubspace, minor_subspace
from mica.ops import (
    mica_experts_linear,
    mica_linear,
)


def subspace(weight: Tensor) -> MinorSubspace:
    result = assert_type(minor_subspace(weight, 4), MinorSubspace)
    same = assert_type(mica.minor_subspace(weight, rank=4), mica.MinorSubspace)
    assert_type(result.basis, Tensor)
    assert_type(same.singular_values, Tensor)
    assert_type(result.method, str)
    assert_type(result.certified, bool)
    assert_type(result.energy_excess + result.resolution + result.null_count, float)
    assert_type(mica.__version__, str)
    return result


def operators(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    seed = torch.randint(2**31, (1,))
    y = assert_type(mica_linear(x, weight, lora_A, lora_B, 2.0, dropout_p=0.1, seed=seed), Tensor)
    ends, experts = torch.tensor([len(x)]), (weight[None], lora_A[None], lora_B[None])
    y = y + assert_type(mica_experts_linear(x, ends, *experts, bias=None), Tensor)
    assert_type(mica.ops.call_counts, Counter[str])
    return y if mica.fast.call_counts["linear"] else x


def backend(base: Module) -> float:
    model = get_peft_model(base, LoraConfig(init_lora_weights="mica", r=4, target_modules="all-linear"))
    device = torch.device("cpu")
    mica.fast.enable(compute_dtype=torch.float32, device=device)
    mica.fast.enable(device="cpu", recompute="activations")
    explanation = assert_type(mica.fast.explain(model), mica.fast.Explanation)
    for row in explanation.rows:
        assert_type([row.name, row.layer, row.adapter, row.path, row.reason], list[str])
        assert_type((row.calls, row.bypassed_by), tuple[int | None, str | None])
    assert_type(explanation.counts(), dict[str, int])
    with mica.fast.disabled():
        assert_type(mica.fast.is_enabled(), bool)
    mica.fast.clear_caches()
    mica.fast.disable()
    mica.fast.enable()
    report = assert_type(mica.fast.merge_report(model), mica.fast.MergeReport)
    for name, stats in report.layers.items():
        print(name, assert_type(stats.dtype, torch.dtype), stats.swallowed, stats.weights, stats.unchanged)
    print(explanation, report, assert_type(report.total.swallowed, float))
    mica.fast.uninstall()
    return report.swallowed
