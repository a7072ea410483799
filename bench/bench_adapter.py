"""What happens to an adapter once: initialisation, loading, merging. SmolLM2-135M, all linear, r = 16."""

import functools
from contextlib import nullcontext

import models
import pytest
import torch
from peft import PeftModel

import mica.fast

ROUNDS = 3
RIVALS = {"stock PEFT": mica.fast.disabled, "mica.fast": nullcontext}


@functools.cache
def saved_adapter(tmp):
    models.randomise(models.wrap(models.smollm2(), rank=16, targets="all-linear"), 0.01).save_pretrained(tmp)
    return tmp


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_initialisation(once, round_, rival):
    base = models.smollm2()
    with RIVALS[rival]():
        once(lambda: models.wrap(base, rank=16, targets="all-linear"), "get_peft_model, float32", rival)


@pytest.mark.parametrize("rival", [*RIVALS, "stock PEFT, low_cpu_mem_usage"])
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_loading(once, round_, rival, tmp_path_factory):
    adapter = saved_adapter(tmp_path_factory.getbasetemp() / "adapter")
    base, low = models.smollm2(), "low_cpu" in rival
    with RIVALS[rival.split(",")[0]]():
        once(
            lambda: PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low),
            "PeftModel.from_pretrained, float32",
            rival,
        )


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("round_", range(ROUNDS))
def bench_merge(once, round_, rival, tmp_path_factory):
    adapter = saved_adapter(tmp_path_factory.getbasetemp() / "adapter")
    base = models.smollm2(torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter)
    before = [layer.get_base_layer().weight.clone() for layer in models.adapted_layers(model).values()]

    def merge_and_unmerge():
        model.merge_adapter()
        model.unmerge_adapter()

    extra = {}
    with RIVALS[rival]():
        model.merge_adapter()
        if rival == "mica.fast":
            extra["swallowed"] = mica.fast.merge_report(model).swallowed
        model.unmerge_adapter()
        after = [layer.get_base_layer().weight for layer in models.adapted_layers(model).values()]
        changed = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
        extra["weights_changed"] = changed / sum(weight.numel() for weight in before)
        once(merge_and_unmerge, "merge + unmerge, bfloat16", rival, **extra)
