"""What happens to an adapter once: initialisation, loading, merging. SmolLM2-135M, all linear, r = 16."""

import functools
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel

import mica.fast
from bench.results.names import FAST, STOCK
from bench.suites.harness import DEVICE, peak_growth, pick
from tests.support import models

# Stock PEFT's initialisation takes most of a minute with its loading, which runs every SVD, too.
ROUNDS = pick(quick=1, default=2, full=3)
MERGE_ROUNDS = pick(quick=2, default=5)
RIVALS = {STOCK: mica.fast.disabled, FAST: nullcontext}
LOW_CPU = "stock PEFT, low_cpu_mem_usage"
AXES = {"model": "SmolLM2-135M", "rank": 16}


@functools.cache
def saved_adapter(tmp):
    models.randomise(models.wrap(models.smollm2(), rank=16, targets="all-linear"), 0.01).save_pretrained(tmp)
    return tmp


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_initialisation(once, round_, rival):
    base = models.smollm2().to(DEVICE)
    axes = {"suite": "initialisation", **AXES, "dtype": "float32"}
    with RIVALS[rival](), peak_growth() as growth:
        model = once(
            lambda: models.wrap(base, rank=16, targets="all-linear"), "get_peft_model, float32", rival, axes
        )
    if growth() is not None:
        once.note(peak_mb=growth() / 1e6)
    for name, basis in models.bases(model).items():
        error = (basis.detach().T @ basis.detach() - torch.eye(16, device=basis.device)).abs().max()
        assert error <= 1e-5, f"{name}: BᵀB is off by {error:.1e}"


@pytest.mark.parametrize("rival", [*RIVALS, LOW_CPU])
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_loading(once, round_, rival, tmp_path_factory):
    adapter = saved_adapter(tmp_path_factory.getbasetemp() / "adapter")
    base, low = models.smollm2().to(DEVICE), rival == LOW_CPU
    with RIVALS[STOCK if low else rival]():
        model = once(
            lambda: PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low),
            "PeftModel.from_pretrained, float32",
            rival,
            {"suite": "loading", **AXES, "dtype": "float32"},
        )
    assert all(layer.lora_A["default"].weight.any() for layer in models.adapted_layers(model).values())


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("round_", range(MERGE_ROUNDS))
def bench_merge(once, round_, rival, tmp_path_factory):
    adapter = saved_adapter(tmp_path_factory.getbasetemp() / "adapter")
    base = models.smollm2(torch.bfloat16).to(DEVICE)
    model = PeftModel.from_pretrained(base, adapter)
    before = [layer.get_base_layer().weight.clone() for layer in models.adapted_layers(model).values()]

    def merge_and_unmerge():
        model.merge_adapter()
        model.unmerge_adapter()

    facts = {}
    with RIVALS[rival]():
        model.merge_adapter()
        if rival == FAST:
            facts["swallowed"] = mica.fast.merge_report(model).swallowed
        model.unmerge_adapter()
        after = [layer.get_base_layer().weight for layer in models.adapted_layers(model).values()]
        changed = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
        facts["weights_changed"] = changed / sum(weight.numel() for weight in before)
        axes = {"suite": "merge", **AXES, "dtype": "bfloat16"}
        once(merge_and_unmerge, "merge + unmerge, bfloat16", rival, axes, **facts)
