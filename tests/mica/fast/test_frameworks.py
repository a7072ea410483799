"""Other code in the place of this backend's functions: it is noticed, named, and the remedy works."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora

import mica.fast
from mica.fast.frameworks import REMEDIES
from tests.support import stand_ins
from tests.support.models import Net, net
from tests.support.moe_models import assert_exact, qwen3_moe, wrap_experts
from tests.support.stock import warned

# As theirs: fp64, by the Gram matrix, rounded to the dtype of the base; other layers get PEFT's.
INITIALISATION = """
def replacement(self, adapter_name):
    if not isinstance(self.get_base_layer(), torch.nn.Linear):
        return original(self, adapter_name)
    weight = self.get_base_layer().weight
    rank = self.r[adapter_name]
    _, vectors = torch.linalg.eigh(weight.double() @ weight.double().T)
    self.lora_B[adapter_name].weight.data = vectors[:, :rank].flip(1).to(weight.dtype)
    self.lora_A[adapter_name].weight.data = weight.new_zeros(rank, weight.shape[1])
"""


@pytest.mark.parametrize("build", [net, lambda: wrap_experts(qwen3_moe())], ids=["layers", "experts"])
def test_another_initialisation_does_not_run(build, monkeypatch):
    """Unsloth's rounds B to the dtype of the base, and knows neither experts nor packed weights."""
    scope = stand_ins.of_module("unsloth.models.lora_init", INITIALISATION)
    scope["original"] = lora.LoraLayer.mica_init
    monkeypatch.setattr(lora.LoraLayer, "mica_init", scope["replacement"])
    model, said = warned(build)
    assert said == []
    assert_exact(model)


def test_a_forward_that_was_replaced_before_is_under_this_package_s():
    """Unsloth's remedy: it rewrites the forwards as it loads a model, and the backend comes after that."""
    model, indices = net(), torch.tensor([[1, 2, 3]])
    expected = model(indices)
    source = "def unsloth_forward(self, x, *args, **kwargs): return self.base_layer(x) + 1"
    theirs = stand_ins.of_module("Linear_peft_forward", source)["unsloth_forward"]
    lora.Linear.forward = theirs
    assert {row.bypassed_by for row in mica.fast.explain(model).rows} == {None, "unsloth"}
    assert "mica.fast.uninstall() and mica.fast.enable()" in REMEDIES["unsloth"]
    mica.fast.uninstall()
    stock = lora.Linear.forward
    assert stock is not theirs
    lora.Linear.forward = theirs
    try:
        mica.fast.enable()
        explanation = mica.fast.explain(model)
        assert {(row.path, row.bypassed_by) for row in explanation.rows} == {("reference", None)}
        assert torch.equal(model(indices), expected)
        assert lora.Linear.forward.__name__ == "unsloth_forward"  # by which unsloth knows that it was there
    finally:
        mica.fast.uninstall()
        lora.Linear.forward = stock


def test_wrappers_of_ms_swift_that_were_there_before_leave_peft_as_it_is():
    """One has a signature that this package does not know. (Its recipe imports mica.fast first.)"""
    mica.fast.uninstall()
    with stand_ins.swift_imported():
        with pytest.warns(UserWarning, match="mica.fast leaves PEFT") as said:
            mica.fast.enable()
        assert {row.path for row in mica.fast.explain(net()).rows} == {"peft"}
    (text,) = [str(warning.message) for warning in said if "leaves PEFT" in str(warning.message)]
    assert "PeftModel.load_adapter takes (self model_id *args **kwargs)" in text
    assert text.count(" takes (") == 1


def test_ms_swift_s_constructor_keeps_layers_from_the_fast_path_until_it_is_undone():
    def paths():
        config = stand_ins.LoraConfig(init_lora_weights="mica", r=4, target_modules=["up", "down"])
        return {(row.path, row.reason) for row in mica.fast.explain(get_peft_model(Net(), config)).rows}

    with stand_ins.swift_imported():
        ((path, reason),) = paths()
        assert path == "peft"
        assert reason.startswith("the lora_A has a forward of its own")
        lora.LoraModel.__init__ = lora.LoraModel.__init_origin__
        ((path, _),) = paths()
        assert path == "reference"
