"""When PEFT's own forward of experts runs, and the reason that is said; whose classes are ours."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import NemotronHConfig
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import mica.fast
from mica.fast.forward import experts
from mica.fast.forward.eligibility import OnPeft
from tests.support import moe_models
from tests.support.layer_changes import changed
from tests.support.models import factors, randomise
from tests.support.moe_models import second, tokens, wrap_experts
from tests.support.moe_steps import Block, adapted, as_stock_s, block, call_of, loss_of, outermost, ran, use
from tests.support.stock import as_stock
from tests.support.tolerances import RELATIVE, error

FP32 = RELATIVE[torch.float32]


def reason(model):
    """Why PEFT's code runs the first layer's experts; "" if it does not."""
    row = mica.fast.explain(outermost(model)).rows[0]
    return row.reason if row.path == "peft" else ""


def hook(model):
    outermost(model).get_base_layer().register_forward_hook(lambda *args: None)


def hook_inner(model):
    outermost(model).base_layer.register_forward_pre_hook(lambda *args: None)


def base_with(path, value):
    """``value(what was there)`` as an attribute of the experts."""
    return lambda model: changed(path, value)(outermost(model).get_base_layer())


def layer_with(path, value):
    return lambda model: changed(path, value)(outermost(model))


def undecorated(kind):
    return type("Replaced", (kind,), {"forward": kind.forward.__wrapped__})


def activate_both(model):
    second(model).base_model.set_adapter(["default", "second"])


def activate_another(model):
    second(model, target_modules=["q_proj"], target_parameters=None).set_adapter("second")


def yes(before):
    return True


IMPLEMENTATION, TENSOR = "config._experts_implementation", {"default": torch.tensor(2.0)}
UNDECORATED, HOOKS = "Replaced does not use transformers' experts interface", "hooks on the experts"
# name: (change of the model, reason, operators of a forward then; None for what cannot run here)
REASONS = {
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled", 0),
    "merged": (lambda model: model.merge_adapter(), "the adapter is merged", 0),
    "another": (activate_another, "none of the active adapters ['second'] is on this layer", 0),
    "two": (activate_both, "several active adapters", None),
    "weight": (base_with("down_proj.requires_grad", yes), "the down_proj is trainable", 2),
    "bias": (base_with("down_proj_bias.requires_grad", yes), "the down_proj_bias is trainable", 2),
    "lora_B": (layer_with("lora_B.default.weight.requires_grad", yes), "the lora_B is trainable", 2),
    "hook": (hook, HOOKS, 2),
    "inner hook": (hook_inner, HOOKS, 2),
    "own forward": (base_with("forward", lambda own: own), f"{HOOKS}, or a forward of their own", 2),
    "class": (base_with("__class__", undecorated), UNDECORATED, 2),
    "one process's": (base_with("_is_expert_parallel", yes), "expert parallelism", None),
    "a shard": (base_with("_hf_tp_plan", lambda _: "moe_tp_experts"), "tensor parallelism", None),
    "sonicmoe": (base_with(IMPLEMENTATION, lambda _: "sonicmoe"), "experts_implementation='sonicmoe'", None),
    "scaling": (layer_with("scaling", lambda _: TENSOR), "its scaling is not a number", None),
    "dtype": (
        layer_with("lora_A.default.weight.data", torch.Tensor.double),
        "lora_A and lora_B differ in dtype",
        None,
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_pefts_own_forward_runs_and_the_reason_is_said(name):
    change, said, operators = REASONS[name]
    model, ids = adapted("gpt_oss"), tokens()
    assert not reason(model)
    change(model)
    assert said in reason(model)
    assert isinstance(experts.decide(outermost(model)), OnPeft)
    if operators is not None:  # those of the second layer, which is not changed
        _, counts = ran(lambda: as_stock(lambda: loss_of(model, ids), FP32))
        assert counts[0] == operators
    if operators == 0:
        rows = [row for row in mica.fast.explain(model).rows if ".experts." in row.name]
        assert [row.path for row in rows] == 4 * ["peft"]


def test_lora_is_pefts_unless_it_is_included():
    model = randomise(wrap_experts(moe_models.mixtral(), stock=True))
    assert "is LoRA, which mica.fast.enable(lora=True) includes" in reason(model)
    assert ran(lambda: loss_of(model, tokens()))[1] == (0, 0)


def test_a_router_keeps_peft_s_path_and_does_not_stop_the_experts():
    model = adapted("qwen3_moe", target_parameters=[*moe_models.STACKS, moe_models.ROUTER["qwen3_moe"]])
    assert as_stock_s(model, tokens()) == (4, 4)
    rows = {row.name.rsplit("mlp.")[1]: row for row in mica.fast.explain(model).rows}
    assert rows["gate.weight"].path == "peft"
    assert "not a stack of experts" in rows["gate.weight"].reason
    assert rows["experts.down_proj"].path == "reference"


def test_explain_has_a_row_for_each_stack():
    model = adapted()
    rows = mica.fast.explain(model).rows
    names = [f"{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")]
    assert [row.name.rsplit("layers.")[1] for row in rows] == names
    assert {(row.path, row.layer, row.calls) for row in rows} == {("reference", "MixtralExperts", None)}
    loss_of(model, tokens())
    assert {row.calls for row in mica.fast.explain(model).rows} == {1}
    hook(model)
    loss_of(model, tokens())
    rows = mica.fast.explain(model).rows
    assert [row.path for row in rows] == ["peft", "peft", "reference", "reference"]
    assert {row.calls for row in rows} == {2}
    assert HOOKS in rows[1].reason


def test_a_stack_within_a_merged_one_runs_alone_and_is_said_to():
    """As a refused safe_merge leaves them: the outer wrapper is PEFT's, and calls the inner one."""
    model = adapted().eval()
    outermost(model).merge()
    with torch.no_grad():
        _, counts = ran(lambda: model(input_ids=tokens()))
    assert counts[0] == 3  # one in the first layer, whose other one is merged, and two in the second
    paths = [row.path for row in mica.fast.explain(model).rows if "layers.0" in row.name]
    assert paths == ["peft", "reference"]


def test_a_module_that_is_none_of_transformers_is_pefts():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x, index, weights):
            return torch.einsum("ti,eoi,te->to", x, self.weight, weights)

    model = randomise(wrap_experts(Block(Own()), target_parameters=["experts.weight"], rank=2))
    assert "does not use transformers' experts interface" in reason(model)
    x, index, weights = torch.randn(5, 4), torch.zeros(5, 1, dtype=torch.int64), torch.rand(5, 3)
    layer = outermost(model)
    lora_A, lora_B = factors(layer)
    dense = layer.get_base_layer().weight + layer.scaling["default"] * lora_B @ lora_A
    assert error(model(x, index, weights), torch.einsum("ti,eoi,te->to", x, dense, weights)) <= FP32


def test_the_registry_is_read_at_every_call(monkeypatch):
    """Whoever registers a function under a known name expects it to run."""
    model, calls = adapted(), []
    stock = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def own(*args):
        calls.append(1)
        return stock(*args)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", own)
    assert "experts_implementation='grouped_mm'" in reason(model)
    loss_of(model, tokens())
    assert len(calls) == 2


# -- other classes of transformers, alone ------------------------------------------------------------


def nemotron_h():
    """Up and down projections only, and a squared ReLU."""
    sizes = {"n_routed_experts": 4, "hidden_size": 16, "moe_intermediate_size": 24}
    return NemotronHExperts(NemotronHConfig(**sizes, moe_latent_size=None))


def muse_spark():
    """A norm after each expert."""
    muse = pytest.importorskip("transformers.models.muse_spark", reason="newer than transformers 5.17")
    sizes = {"num_local_experts": 4, "moe_hidden_size": 16, "moe_intermediate_size": 24}
    return muse.modeling_muse_spark.MuseSparkExperts(muse.MuseSparkTextConfig(**sizes))


def filled(base):
    for weight in base.parameters():
        nn.init.normal_(weight, std=0.3)
    return base


def block_of(build, implementation):
    return block(filled(build()), implementation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("build", [nemotron_h, muse_spark])
def test_experts_without_a_gate_and_with_a_norm(build, implementation, dtype):
    """Weights in fp32 over 16-bit experts: their sums are in fp32, the result in the dtype of the input."""
    model = block_of(build, implementation).to(dtype)
    x, index, weights = call_of(dtype)
    y, counts = ran(lambda: as_stock(lambda: model(x, index, weights.float()), RELATIVE[dtype]))
    assert counts[0] == 2
    assert y.dtype == dtype


def test_weights_of_all_experts_are_pefts():
    """As some models passed them to transformers before 5.4."""
    model = block_of(nemotron_h, "eager")
    x, index, _ = call_of()
    _, counts = ran(lambda: model(x, index, torch.rand(7, 4)))
    assert counts == (0, 0)
    reason = "in its last call: router weights that are not one for each expert of a token"
    assert [(row.path, row.reason) for row in mica.fast.explain(model).rows] == [("peft", reason)] * 2


def test_an_input_of_another_dtype_is_cast_by_grouped_products_alone():
    model, call = block_of(nemotron_h, "grouped_mm").double(), call_of()
    assert ran(lambda: model(*call))[1][0] == 2
    use(outermost(model), "batched_mm")
    with pytest.raises(RuntimeError, match="expected scalar type"):  # as from stock
        model(*call)


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_fp64_within_autocast_is_pefts_and_fails_there(implementation):
    """Autocast leaves fp64 alone, and casts the weights."""
    layer = use(outermost(adapted("qwen3_moe")), implementation)
    x, *routing = call_of(width=32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=r"(?i)double"):
        layer(x.double(), *routing)


# -- whose classes compute the formula in eager: all of transformers'. Those of others need not ------

EXPERTS, HIDDEN, INNER = 4, 16, 12


def is_ours(model):
    """Whether a call runs on the operators; its result is stock PEFT's in any case, and explain says it."""
    arguments = call_of()
    _, counts = ran(lambda: as_stock(lambda: model(*arguments), FP32))
    ours = counts[0] == 2
    assert {row.path == "peft" for row in mica.fast.explain(model).rows} == {not ours}
    return ours


def _classes():
    """(module, name) of every class of transformers that dispatches."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", source, re.MULTILINE):
            yield pytest.param(f"transformers.models.{path.parent.name}.{path.stem}", name, id=name)


class _Config:
    """The config of experts of any class: small sizes, a SiLU, and numbers for what limits it."""

    def __getattr__(self, name):
        sizes = {"expert": EXPERTS, "intermediate": INNER, "act": "silu", "latent": None, "hidden": HIDDEN}
        sizes["limits"] = [0.5]  # one for each layer
        return next((size for part, size in sizes.items() if part in name), 0.5)


def small(cls):
    takes_layer = "layer_idx" in inspect.signature(cls.__init__).parameters
    return filled(cls(_Config(), layer_idx=0) if takes_layer else cls(_Config()))


@pytest.mark.parametrize(("module", "name"), list(_classes()))
def test_every_class_of_transformers_computes_the_formula_in_eager(module, name):
    cls = vars(importlib.import_module(module))[name]
    if name == "ErgoExpertProjections":  # one expert a row, unweighted: only a part of ErgoExperts
        (cls,) = cls.__subclasses__()
        assert not is_ours(block(small(cls), "eager"))
        return
    assert is_ours(block(small(cls), "eager"))


@moe.use_experts_implementation
class Clamped(nn.Module):
    """Decorated, with a forward of its own that clamps what the grouped function does not."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.num_experts, self.act_fn = EXPERTS, nn.SiLU()

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, place = torch.where(index == expert)
            gate, up = nn.functional.linear(x[token], self.gate_up_proj[expert]).chunk(2, -1)
            rows = nn.functional.linear(self.act_fn(gate.clamp(max=0.1)) * up, self.down_proj[expert])
            out.index_add_(0, token, rows * weights[token, place, None])
        return out


class OtherGate(MixtralExperts):
    """Its gate is the grouped function's alone: Mixtral's own forward states another."""

    def _apply_gate(self, gate_up):
        return gate_up.chunk(2, -1)[0]


class Renamed(MixtralExperts):
    pass


FORMULA = {  # whether the operators run it: in eager, and in grouped_mm
    Clamped: (False, True),
    moe.use_experts_implementation(type("Again", (Clamped,), {})): (False, True),
    OtherGate: (False, True),
    Renamed: (True, True),
}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("cls", FORMULA, ids=lambda cls: cls.__name__)
def test_a_forward_of_somebody_else_s_own_runs(cls, implementation):
    assert is_ours(block(small(cls), implementation)) == FORMULA[cls][implementation == "grouped_mm"]


def test_a_forward_replaced_behind_the_decorator_runs(monkeypatch):
    """Or a function that somebody registers as "eager": both are what transformers would call."""
    model = block(small(MixtralExperts), "eager")
    assert is_ours(model)
    with monkeypatch.context() as patch:
        patch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "eager", lambda self, x, *args: 2 * x)
        assert not is_ours(model)
    forward = MixtralExperts.forward
    cell = forward.__closure__[forward.__code__.co_freevars.index("original_forward")]
    monkeypatch.setattr(cell, "cell_contents", lambda self, x, *args: 3 * x)
    assert not is_ours(model)
    monkeypatch.undo()
    assert is_ours(model)


def test_a_gate_of_the_instance_that_its_forward_does_not_call():
    model = block(small(MixtralExperts), "eager")
    layer = outermost(model)
    layer.get_base_layer()._apply_gate = lambda gate_up: gate_up.chunk(2, -1)[0]
    assert "an _apply_gate that MixtralExperts's forward does not call" in experts.decide(layer).reason
    assert not is_ours(model)
