"""Which layers are targets, and the dtype in which a model is loaded."""

import pytest
import torch

from mica.cli.loading import find_targets, suit_processor
from tests.support import models
from tests.support.tiny_cli import tiny_llama


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_llama])
@pytest.mark.parametrize(
    "names", ["all-linear", "embed_tokens,down_proj,wte,attn.c_proj", "0.mlp.c_fc,q_proj"]
)
def test_targets_are_those_of_peft(make, names):
    model = make()
    known = [name for name in names.split(",") if any(key.endswith(name) for key, _ in model.named_modules())]
    names = ",".join(known) or "all-linear"
    before = {name: type(module) for name, module in model.named_modules()}
    modules = find_targets(model, names)
    assert {name: type(module) for name, module in model.named_modules()} == before
    wrapped = models.wrap(model, targets=names if names == "all-linear" else known, task_type="CAUSAL_LM")
    assert list(modules) == wrapped.base_model.targeted_module_names


def test_a_quantised_checkpoint_keeps_its_dtype(monkeypatch):
    monkeypatch.setattr("mica.cli.loading.has_native", lambda dtype: False)
    model = tiny_llama().bfloat16()
    model.is_quantized = True
    assert "quantised and computes in bfloat16" in suit_processor(model, "auto")
    assert model.dtype == torch.bfloat16
