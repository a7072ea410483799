"""What `mica.fast.explain` reports: its table in print, and the frameworks that bypass layers."""

import functools
import itertools
import re
import types
from collections import Counter

import pytest
import torch
from accelerate import hooks
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mica.fast
from mica.fast.explain import patterns
from mica.fast.frameworks import REMEDIES, replaced_by
from mica.paths import choose
from tests.support import stand_ins
from tests.support.models import TARGETS, net, tiny_llama, wrap
from tests.support.stock import uninstalled
from tests.support.training import llama


def test_one_row_per_layer_in_a_table_that_aligns(monkeypatch):
    model = net()
    explanation = mica.fast.explain(model)
    assert [row.name.rsplit(".", 1)[1] for row in explanation.rows] == TARGETS
    assert [row.layer for row in explanation.rows] == ["Embedding", "Linear", "Conv1D", "Linear"]
    assert {row.adapter for row in explanation.rows} == {"default (MiCA)"}
    assert explanation.counts() == {"reference": 4}
    model.base_model.model.down.base_layer.weight.requires_grad_()
    *lines, totals = str(mica.fast.explain(model)).splitlines()
    assert len(lines) == 6
    assert lines[4].endswith("; base layer called: the base weight is trainable")
    assert len({line.index("default") for line in lines[1:5]}) == 1
    assert lines[0].split() == ["layer", "base", "adapter", "path", "calls", "reason"]
    assert lines[1].endswith(" reference  -      embeddings have no kernels")
    assert all(line.endswith(" reference  -      [1]") for line in lines[2:4])
    # what two lines share stands once
    assert lines[5] == "[1] TRITON_INTERPRET=1, and interpreted kernels run only with MICA_BACKEND=triton"
    assert totals == "4 layers: 4 reference"
    monkeypatch.setenv("MICA_BACKEND", "reference")
    assert str(mica.fast.explain(model)).count("  MICA_BACKEND=reference") == 3  # a short reason stays
    assert str(mica.fast.explain(nn.Linear(2, 2))) == "no adapted layers"


def test_on_a_cpu_the_table_shows_what_needs_no_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    choose.clear()
    model = net()
    explanation = mica.fast.explain(model)
    assert {row.path for row in explanation.rows} == {"reference"}
    *lines, totals = str(explanation).splitlines()
    assert [line.endswith("  operators (CPU)  -") for line in lines] == [False, True, True, True, True]
    assert totals == "4 layers: 4 operators (CPU)"
    model.base_model.model.down.base_layer.weight.requires_grad_()
    assert "  operators (CPU)  -      base layer called: the base weight is trainable\n" in str(
        mica.fast.explain(model)
    )
    choose.clear()


@pytest.mark.parametrize("call", ["explain", "merge_report"])
@pytest.mark.parametrize("model", ["tiny", None, torch.zeros(2)])
def test_what_is_no_model_is_named(call, model):
    kind = type(model).__name__
    with pytest.raises(
        TypeError, match=rf"^mica\.fast\.{call}\(model\) needs a .*Module, .* model is a {kind}\.$"
    ):
        getattr(mica.fast, call)(model)


def test_kernels_that_cannot_be_had_are_an_error_where_they_are_demanded(monkeypatch):
    model, reason = net(torch.float64), "no Triton kernels for float64"
    monkeypatch.setenv("MICA_BACKEND", "triton")
    rows = [(row.path, row.reason) for row in mica.fast.explain(model).rows]
    assert rows == [("reference", "embeddings have no kernels"), *3 * [("error", reason)]]
    with pytest.raises(RuntimeError, match=reason):
        model(torch.tensor([[1, 5]]))
    monkeypatch.setenv("MICA_BACKEND", "auto")
    assert mica.fast.explain(model).counts() == {"reference": 4}


def test_only_adapters_that_the_layer_has_are_listed():
    model = net(targets=["up", "down"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["down"]))
    model.base_model.set_adapter(["default", "second"])
    up, down = mica.fast.explain(model).rows
    assert (up.adapter, down.adapter) == ("default (MiCA)", "default (MiCA), second")
    model.set_adapter("second")
    up, down = mica.fast.explain(model).rows
    assert (up.adapter, down.adapter) == ("", "second")


def test_other_adapters_and_off_are_said():
    mica.fast.enable(lora=True)
    embedding, *others = mica.fast.explain(net(init_lora_weights=True)).rows
    assert (embedding.path, embedding.reason) == ("peft", "adapter 'default' is LoRA on an embedding")
    assert {row.path for row in others} == {"reference"}
    conv = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), LoraConfig(target_modules=["0"]))
    assert "are not covered" in mica.fast.explain(conv).rows[0].reason
    model = net()
    with mica.fast.disabled():
        assert {row.reason for row in mica.fast.explain(model).rows} == {"mica.fast is disabled"}
    with uninstalled():
        assert {row.reason for row in mica.fast.explain(model).rows} == {"mica.fast is not installed"}


def test_a_forward_kept_from_before_the_import_is_seen():
    """accelerate's hooks put the old bound forward into the instance."""
    model = wrap(nn.Sequential(nn.Linear(4, 4)), rank=2, targets=["0"])
    layer = model.base_model.model[0]
    with uninstalled():
        layer._old_forward = layer.forward
    layer.forward = functools.wraps(layer._old_forward)(lambda x: layer._old_forward(x))
    assert "before mica.fast" in mica.fast.explain(model).rows[0].reason
    before = mica.fast.call_counts["linear"]
    layer(torch.randn(2, 4))
    assert mica.fast.call_counts["linear"] == before


def test_a_layer_that_differs_is_a_line_of_its_own():
    model = wrap(tiny_llama(num_hidden_layers=4), targets=["q_proj"])
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj.base_layer.weight.requires_grad_()
    layers[3].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    _, *lines, totals = str(mica.fast.explain(model)).splitlines()
    assert len(lines) == 3
    assert [re.match(r"\S*layers\.(\S*)\.self", line)[1] for line in lines] == ["{0,2}", "1", "3"]
    assert "  ×2  " in lines[0]
    assert "base weight is trainable" in lines[1]
    assert totals == "4 layers: 3 reference, 1 peft"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fc"], [("fc", 1)]),
        (["h.7.fc"], [("h.7.fc", 1)]),
        ([f"h.{n}.fc" for n in (0, 1, 3, 10, 11, 12)], [("h.{0-1,3,10-12}.fc", 6)]),
        ([f"h.{a}.e.{b}" for a, b in itertools.product(range(3), range(8))], [("h.{0-2}.e.{0-7}", 24)]),
        (["h.0.e.0", "h.1.e.1"], [("h.0.e.0", 1), ("h.1.e.1", 1)]),  # not h.{0-1}.e.{0-1}
        (
            ["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1", "h.2.e.0"],
            [("h.0.e.{0-1}", 2), ("h.1.e.{0-1}", 2), ("h.2.e.0", 1)],
        ),
    ],
)
def test_a_pattern_stands_for_its_names_and_no_others(names, expected):
    assert Counter(patterns(names)) == Counter(expected)


# -- frameworks that compute LoRA layers themselves are named. They are imitated as they patch -------


TOKENS = torch.tensor([[1, 2, 3]])
MLP = ("gate_proj", "up_proj", "down_proj")


def forward_of(module, result="x", arguments="self, x"):
    """A function of a module of that name."""
    return stand_ins.of_module(module, f"def forward({arguments}):\n    return {result}")["forward"]


def patch(owner, *arguments):
    owner.forward = types.MethodType(forward_of(*arguments), owner)


def blocks(model):
    return model.base_model.model.model.layers


def bypassed(model) -> dict[str, str | None]:
    """The last part of each uncalled layer's name, and who is named."""
    model(input_ids=TOKENS)
    rows = mica.fast.explain(model).rows
    return {row.name.rpartition(".")[2]: row.bypassed_by for row in rows if row.calls == 0}


def test_a_loss_that_reads_the_weight_of_the_head_and_unknown_code():
    model = wrap(tiny_llama(), targets=["lm_head", "q_proj"])
    head = "self.model(input_ids)[0] @ self.lm_head.weight.T", "self, input_ids, **_"
    patch(model.base_model.model, "liger_kernel.transformers.model.llama", *head)
    assert bypassed(model) == {"lm_head": "liger_kernel"}
    model = llama()
    patch(blocks(model)[0].mlp, "their_patches.mlp")
    assert bypassed(model) == dict.fromkeys(MLP, "their_patches.mlp")
    assert str(mica.fast.explain(model)).splitlines()[-1] == "their_patches.mlp bypasses 3 layers"


class Block(nn.Module):
    """One that leaves a part to a function that it holds, as fused models of frameworks do."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.apply_up = self.up.forward

    def forward(self, x):
        return self.down(self.apply_up(x))


@pytest.mark.parametrize(
    ("module", "who"),
    [
        ("axolotl.kernels.lora", "axolotl"),
        ("unsloth_compiled_module_llama", "unsloth"),
        ("unsloth_zoo.patches", "unsloth"),
        ("theirs", "theirs"),
        # libraries whose forwards call the layers
        ("accelerate.hooks", None),
        ("peft.helpers", None),
        ("transformers.utils", None),
        ("mica.fast.forward.decide", None),
    ],
)
def test_functions_in_the_place_of_a_layer(module, who):
    model = wrap(Block(), targets=["up", "down"])
    model.base_model.model.apply_up = forward_of(module, "x", "x")
    model(torch.ones(2, 8))
    explanation = mica.fast.explain(model)
    up, down = explanation.rows
    assert (up.calls, up.bypassed_by, down.calls, down.bypassed_by) == (0, who, 1, None)
    if who in REMEDIES:
        assert str(explanation).splitlines()[-1] == f"{who} bypasses 1 layer: {REMEDIES[who]}"
    linear = nn.Linear(2, 2)
    patch(linear, module)
    assert replaced_by(linear) == who


def test_ordinary_models_hooks_and_compilation_are_not_reported():
    model = llama()
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        assert bypassed(model) == {}
        assert {replaced_by(module) for module in model.modules()} == {None}
    block = blocks(model)[0]
    hooks.add_hook_to_module(block.mlp, hooks.ModelHook())
    hooks.add_hook_to_module(block.mlp.up_proj, hooks.ModelHook())
    block.self_attn.forward = torch.compile(block.self_attn.forward, backend="eager")
    model.forward = convert_outputs_to_fp32(model.forward)
    for module in (block.mlp, block.mlp.up_proj, block.self_attn, model):
        assert "forward" in vars(module)
        assert replaced_by(module) is None
    rows = mica.fast.explain(torch.compile(model, backend="eager")).rows
    assert {row.bypassed_by for row in rows} == {None}


def test_layers_that_are_checkpointed_are_counted():
    """By a flag or by torch's wrapper; not those without an adapter, nor the model, which has a flag, too."""
    model = wrap(tiny_llama(num_hidden_layers=4), targets=["q_proj"], layers_to_transform=[0, 1, 2])
    assert mica.fast.explain(model).checkpointed == 0
    model.gradient_checkpointing_enable()
    assert mica.fast.explain(model).checkpointed == 3
    blocks(model)[0].gradient_checkpointing = blocks(model)[1].gradient_checkpointing = False
    blocks(model)[0] = checkpoint_wrapper(blocks(model)[0])
    *_, totals, line = str(mica.fast.explain(model)).splitlines()
    assert totals == "3 layers: 3 reference"
    assert line.startswith("gradient checkpointing is on in 2 layers: what this backend saves is discarded")


def test_foreign_objects_do_no_harm():
    class Hostile:
        def __call__(self, x):
            return x

        def __getattr__(self, name):
            raise RuntimeError(name)

    class Endless:
        __call__ = Hostile.__call__

    endless = Endless()
    endless.__wrapped__ = endless
    for call in (Hostile(), endless, len, functools.partial(len), None, 3):
        module = nn.Linear(2, 2)
        module.forward = module.apply_qkv = call
        assert replaced_by(module) in (None, __name__)
