"""Frameworks that compute LoRA layers themselves: `explain` names them. They are imitated as they patch."""

import functools
import types

import pytest
import torch
from peft.tuners import lora
from torch import nn

import mica.fast
from mica.fast.explain import REMEDIES, replaced_by
from tests.support.models import tiny_llama, wrap

TOKENS = torch.tensor([[1, 2, 3]])


def module_of(name: str, source: str) -> types.SimpleNamespace:
    """What ``source`` defines when it is the text of a module of that name."""
    scope = types.ModuleType(name).__dict__ | {"torch": torch}
    exec(source, scope)
    return types.SimpleNamespace(**scope)


FUSED = """
def product(layer, x):
    return torch.nn.functional.linear(x, layer.base_layer.weight)

def apply_qkv(self, x):
    return product(self.q_proj, x), product(self.k_proj, x), product(self.v_proj, x)

def apply_o(self, x):
    return product(self.o_proj, x)

def apply_mlp(self, x, inplace=True):
    gate = torch.nn.functional.silu(product(self.gate_proj, x))
    return product(self.down_proj, gate * product(self.up_proj, x))

def original_apply_qkv(self, x):
    return self.q_proj(x), self.k_proj(x), self.v_proj(x)

def original_apply_o(self, x):
    return self.o_proj(x)

def attention(self, hidden_states, *args, **kwargs):
    q, k, v = self.apply_qkv(hidden_states)
    return self.apply_o(q), None

def unbound_attention(self, hidden_states, *args, **kwargs):
    q, k, v = self.apply_qkv(self, hidden_states)
    return self.apply_o(self, q), None
"""


def llama():
    return wrap(tiny_llama(), targets="all-linear")


def blocks(model):
    return model.base_model.model.model.layers


def axolotl(model, monkeypatch, qkv=True, o=True, mlp=True):
    """The attention's forward compiled and put on the class, the parts bound to each instance."""
    code = module_of("axolotl.monkeypatch.lora_kernels", FUSED)
    kernels = module_of("axolotl.kernels.lora", FUSED)
    monkeypatch.setattr(type(blocks(model)[0].self_attn), "forward", code.attention)
    for block in blocks(model):
        attention = block.self_attn
        attention.apply_qkv = types.MethodType(
            kernels.apply_qkv if qkv else code.original_apply_qkv, attention
        )
        attention.apply_o = types.MethodType(kernels.apply_o if o else code.original_apply_o, attention)
        if mlp:
            block.mlp.forward = types.MethodType(kernels.apply_mlp, block.mlp)


def unsloth(model, monkeypatch, inplace=True):
    """Plain functions as attributes of the attention; the MLP's may be a partial."""
    code = module_of("unsloth.models.llama", FUSED)
    kernels = module_of("unsloth.kernels.fast_lora", FUSED)
    monkeypatch.setattr(type(blocks(model)[0].self_attn), "forward", code.unbound_attention)
    mlp = kernels.apply_mlp if inplace else functools.partial(kernels.apply_mlp, inplace=False)
    for block in blocks(model):
        block.self_attn.apply_qkv, block.self_attn.apply_o = kernels.apply_qkv, kernels.apply_o
        block.mlp.forward = types.MethodType(mlp, block.mlp)


def bypassed(model) -> dict[str, str | None]:
    """The last part of each uncalled layer's name, and who is named."""
    model(input_ids=TOKENS)
    return {
        row.name.rpartition(".")[2]: row.bypassed_by
        for row in mica.fast.explain(model).rows
        if row.calls == 0
    }


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({}, ATTENTION + MLP),
        ({"mlp": False}, ATTENTION),
        ({"mlp": False, "qkv": False}, ("o_proj",)),
        ({"qkv": False, "o": False}, MLP),
    ],
)
def test_axolotl_is_named_where_it_has_fused_layers(parts, names, monkeypatch):
    model = llama()
    axolotl(model, monkeypatch, **parts)
    assert bypassed(model) == dict.fromkeys(names, "axolotl")
    *table, totals, remedy = str(mica.fast.explain(model)).splitlines()
    count = len(names) * len(blocks(model))
    assert totals.endswith(f"; {count} not called in the last forward")
    assert remedy == f"axolotl bypasses {count} layers: {REMEDIES['axolotl']}"
    for key in ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel"):
        assert key in remedy
    named = [line for line in table if line.endswith("not called in the last forward, bypassed by axolotl")]
    assert len(named) == len(names)


def test_axolotl_without_kernels_bypasses_nothing(monkeypatch):
    model = llama()
    axolotl(model, monkeypatch, qkv=False, o=False, mlp=False)
    assert bypassed(model) == {}
    assert "axolotl" not in str(mica.fast.explain(model))


def test_axolotl_at_an_embedding():
    """It replaces the forward of PEFT's own layer."""
    model = wrap(tiny_llama(), targets=["embed_tokens", "q_proj"])
    embedding = model.base_model.model.model.embed_tokens
    code = "def apply_embedding(self, x):\n    return self.base_layer(x)"
    embedding.forward = types.MethodType(module_of("axolotl.kernels.lora", code).apply_embedding, embedding)
    model(input_ids=TOKENS)
    explanation = mica.fast.explain(model)
    (row,) = [row for row in explanation.rows if row.path == "peft"]
    assert (row.name, row.bypassed_by, row.calls) == (
        "base_model.model.model.embed_tokens",
        "axolotl",
        None,
    )
    assert row.reason == "axolotl has replaced the layer's forward"
    assert str(explanation).splitlines()[-1].startswith("axolotl bypasses 1 layer: ")


@pytest.mark.parametrize("inplace", [True, False])
def test_unsloth_is_named(inplace, monkeypatch):
    model = llama()
    unsloth(model, monkeypatch, inplace)
    assert bypassed(model) == dict.fromkeys(ATTENTION + MLP, "unsloth")
    assert (
        str(mica.fast.explain(model)).splitlines()[-1] == f"unsloth bypasses 14 layers: {REMEDIES['unsloth']}"
    )


def test_unsloth_in_place_of_the_class_forward(monkeypatch):
    """unsloth_zoo compiles PEFT's forwards anew when a model is loaded, also after this backend's import."""
    model = llama()
    code = "def unsloth_forward(self, x, *args, **kwargs):\n    return self.base_layer(x)"
    monkeypatch.setattr(lora.Linear, "forward", module_of("Linear_peft_forward", code).unsloth_forward)
    model(input_ids=TOKENS)
    rows = mica.fast.explain(model).rows
    assert {(row.path, row.calls, row.bypassed_by) for row in rows} == {("peft", None, "unsloth")}
    monkeypatch.undo()
    model(input_ids=TOKENS)
    assert {(row.path, row.calls) for row in mica.fast.explain(model).rows} == {("reference", 1)}


def test_a_loss_that_reads_the_weight_of_the_head():
    model = wrap(tiny_llama(), targets=["lm_head", "q_proj"])
    head = (
        "def lce_forward(self, input_ids, **_):\n    return self.model(input_ids)[0] @ self.lm_head.weight.T"
    )
    inner = model.base_model.model
    inner.forward = types.MethodType(
        module_of("liger_kernel.transformers.model.llama", head).lce_forward, inner
    )
    assert bypassed(model) == {"lm_head": "liger_kernel"}


def test_unknown_code_is_named_by_its_module():
    model = llama()
    mlp = blocks(model)[0].mlp
    mlp.forward = types.MethodType(module_of("their_patches.mlp", FUSED).apply_mlp, mlp)
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
        ("accelerate.hooks", None),
    ],
)
def test_functions_that_a_forward_calls(module, who):
    model = wrap(Block(), targets=["up", "down"])
    model.base_model.model.apply_up = module_of(module, "def apply_up(x):\n    return x").apply_up
    model(torch.ones(2, 8))
    up, down = mica.fast.explain(model).rows
    assert (up.calls, up.bypassed_by, down.calls, down.bypassed_by) == (0, who, 1, None)


@pytest.mark.parametrize(
    "module", ["accelerate.hooks", "peft.helpers", "transformers.utils", "mica.fast.forward.decide"]
)
def test_libraries_whose_forwards_call_the_layers_are_not_named(module):
    linear = nn.Linear(2, 2)
    linear.forward = types.MethodType(
        module_of(module, "def forward(self, x):\n    return x").forward, linear
    )
    assert replaced_by(linear) is None


def test_a_decorated_forward_is_still_the_module_s_own(monkeypatch):
    code = "import functools\ndef logged(f):\n    return functools.wraps(f)(lambda *args: f(*args))"
    logged = module_of("their_logs", code).logged
    block = Block()
    block.forward = logged(block.forward)
    monkeypatch.setattr(nn.Linear, "forward", logged(nn.Linear.forward))
    assert [replaced_by(module) for module in block.modules()] == [None, None, None]


def test_what_is_around_layers_that_ran_is_not_to_blame():
    """A whole model's replaced forward does not explain one layer of a block that was skipped."""
    model = llama()
    inner = model.base_model.model
    code = "def forward(self, input_ids=None, **kwargs):\n    return self.model(input_ids)"
    inner.forward = types.MethodType(module_of("their_patches.model", code).forward, inner)
    mlp = blocks(model)[0].mlp
    mlp.forward = torch.zeros_like  # one that is not to be named
    assert bypassed(model) == dict.fromkeys(MLP, None)
    assert "bypass" not in str(mica.fast.explain(model))
    inner.forward = types.MethodType(module_of("their_patches.model", code).forward, inner)
    inner.model.forward = torch.zeros_like
    assert set(bypassed(model).values()) == {"their_patches.model"}


def test_ordinary_models_are_not_reported():
    model = llama()
    assert bypassed(model) == {}
    assert {replaced_by(module) for module in model.modules()} == {None}
    model.gradient_checkpointing_enable()
    model.train()
    model(input_ids=TOKENS)
    assert {replaced_by(module) for module in model.modules()} == {None}


def test_hooks_and_compilation_are_not_reported():
    hooks = pytest.importorskip("accelerate.hooks")
    operations = pytest.importorskip("accelerate.utils.operations")
    model = llama()
    block = blocks(model)[0]
    hooks.add_hook_to_module(block.mlp, hooks.ModelHook())
    hooks.add_hook_to_module(block.mlp.up_proj, hooks.ModelHook())
    block.self_attn.forward = torch.compile(block.self_attn.forward, backend="eager")
    model.forward = operations.convert_outputs_to_fp32(model.forward)
    for module in (block.mlp, block.mlp.up_proj, block.self_attn, model):
        assert "forward" in vars(module)
        assert replaced_by(module) is None
    assert {row.bypassed_by for row in mica.fast.explain(torch.compile(model, backend="eager")).rows} == {
        None
    }


def test_foreign_objects_do_no_harm():
    class Hostile:
        def __call__(self, x):
            return x

        def __getattr__(self, name):
            raise RuntimeError(name)

    class Endless:
        def __call__(self, x):
            return x

    endless = Endless()
    endless.__wrapped__ = endless
    for call in (Hostile(), endless, len, functools.partial(len), None, 3):
        module = nn.Linear(2, 2)
        module.forward = call
        module.apply_qkv = call
        assert replaced_by(module) in (None, __name__)
