"""When PEFT's own forward of experts runs, and the reason that is given."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import NemotronHConfig
from transformers.integrations import moe
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import mica.fast
from mica.fast.forward import expert_params, experts
from tests.support import moe_models
from tests.support.moe_models import tokens, wrap_experts
from tests.support.moe_steps import adapted, filled, gradients, loss_of, outermost, ran
from tests.support.tolerances import RELATIVE, error


def base_of(model):
    return outermost(model).get_base_layer()


def disable_adapters(model):
    model.base_model.disable_adapter_layers()


def merge(model):
    model.merge_adapter()


def train_weight(model):
    base_of(model).down_proj.requires_grad_(True)


def train_bias(model):
    base_of(model).down_proj_bias.requires_grad_(True)


def train_lora_b(model):
    outermost(model).lora_B["default"].weight.requires_grad_(True)


def hook(model):
    base_of(model).register_forward_hook(lambda *args: None)


def hook_inner(model):
    outermost(model).base_layer.register_forward_pre_hook(lambda *args: None)


def own_forward(model):
    base = base_of(model)
    base.forward = type(base).forward.__get__(base)


def expert_parallel(model):
    base_of(model)._is_expert_parallel = True


def tensor_parallel(model):
    base_of(model)._hf_tp_plan = "moe_tp_experts"


def other_implementation(model):
    base_of(model).config._experts_implementation = "sonicmoe"


def replaced_class_forward(model):
    base = base_of(model)
    base.__class__ = type("Replaced", (type(base),), {"forward": type(base).forward.__wrapped__})


def scaled_by_a_tensor(model):
    outermost(model).scaling["default"] = torch.tensor(2.0)


def adapter_dtypes(model):
    layer = outermost(model)
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.double()


REASONS = {
    disable_adapters: "adapters are disabled",
    merge: "the adapter is merged",
    train_weight: "the down_proj is trainable",
    train_bias: "the down_proj_bias is trainable",
    train_lora_b: "the lora_B is trainable",
    hook: "hooks on the experts",
    hook_inner: "hooks on the experts",
    own_forward: "hooks on the experts, or a forward of their own",
    expert_parallel: "expert parallelism",
    tensor_parallel: "tensor parallelism",
    other_implementation: "experts_implementation='sonicmoe'",
    replaced_class_forward: "Replaced does not use transformers' experts interface",
    scaled_by_a_tensor: "its scaling is not a number",
    adapter_dtypes: "lora_A and lora_B differ in dtype",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_why_not(change):
    model = adapted("gpt_oss")
    assert type(experts.decide(outermost(model))) is experts.Experts
    change(model)
    assert REASONS[change] in experts.decide(outermost(model)).reason


RUNNABLE = (disable_adapters, merge, train_weight, train_bias, train_lora_b, hook, hook_inner, own_forward)


@pytest.mark.parametrize("change", [*RUNNABLE, replaced_class_forward], ids=lambda change: change.__name__)
def test_pefts_own_forward_runs_then(change):
    model, ids = adapted("gpt_oss"), tokens()
    change(model)
    loss, counts = ran(lambda: loss_of(model, ids))
    assert counts[0] == (0 if change in (disable_adapters, merge) else 2)  # the second layer is not changed
    with mica.fast.disabled():
        assert error(loss, loss_of(model, ids)) <= RELATIVE[torch.float32]


def test_lora_without_mica_is_pefts():
    model = filled(wrap_experts(moe_models.mixtral(), stock=True))
    assert "is not MiCA" in experts.decide(outermost(model)).reason
    assert ran(lambda: loss_of(model, tokens()))[1] == (0, 0)


def test_several_active_adapters_are_pefts():
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert "several active adapters" in experts.decide(outermost(model)).reason


def test_an_active_adapter_that_is_not_on_the_experts():
    model, ids = adapted(), tokens()
    model.add_adapter("other", LoraConfig(init_lora_weights="mica", r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert "none of the active adapters ['other'] is on this layer" in experts.decide(outermost(model)).reason
    assert ran(lambda: loss_of(model, ids))[1] == (0, 0)
    rows = [row for row in mica.fast.explain(model).rows if ".experts." in row.name]
    assert len(rows) == 4
    assert {row.path for row in rows} == {"peft"}


def test_switching_the_adapter_is_seen_at_the_next_call():
    model, ids = adapted(), tokens()
    first = loss_of(model, ids)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    second, counts = ran(lambda: loss_of(model, ids))
    with model.disable_adapter():
        bare = loss_of(model, ids)
    assert counts[0] == 4
    assert error(second, bare) <= RELATIVE[torch.float32]  # its A is 0
    assert first != second
    model.set_adapter("default")
    assert torch.equal(loss_of(model, ids), first)


def test_a_router_keeps_peft_s_path_and_does_not_stop_the_experts():
    model = adapted("qwen3_moe", target_parameters=[*moe_models.STACKS, moe_models.ROUTER["qwen3_moe"]])
    loss, _, counts = gradients(model, tokens())
    assert counts == (4, 4)
    with mica.fast.disabled():
        assert error(loss, loss_of(model, tokens())) <= RELATIVE[torch.float32]
    rows = {row.name.rsplit("mlp.")[1]: row for row in mica.fast.explain(model).rows}
    assert rows["gate.weight"].path == "peft"
    assert "not a stack of experts" in rows["gate.weight"].reason
    assert rows["experts.down_proj"].path == "reference"


def test_explain_has_a_row_for_each_stack():
    model = adapted()
    rows = mica.fast.explain(model).rows
    assert [row.name.rsplit("layers.")[1] for row in rows] == [
        f"{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")
    ]
    assert {(row.path, row.layer, row.calls) for row in rows} == {("reference", "MixtralExperts", None)}
    loss_of(model, tokens())
    assert {row.calls for row in mica.fast.explain(model).rows} == {1}
    hook(model)
    loss_of(model, tokens())
    rows = mica.fast.explain(model).rows
    assert [row.path for row in rows] == ["peft", "peft", "reference", "reference"]
    assert {row.calls for row in rows} == {1}
    assert "hooks on the experts" in rows[1].reason


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

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Own()

        def forward(self, *args):
            return self.experts(*args)

    model = filled(wrap_experts(Around(), target_parameters=["experts.weight"], rank=2))
    assert "does not use transformers' experts interface" in experts.decide(outermost(model)).reason
    x, index, weights = torch.randn(5, 4), torch.zeros(5, 1, dtype=torch.int64), torch.rand(5, 3)
    y = model(x, index, weights)
    layer = outermost(model)
    lora_A, lora_B = expert_params.lora_A_of(layer, "default"), expert_params.lora_B_of(layer, "default")
    dense = layer.get_base_layer().weight + layer.scaling["default"] * lora_B @ lora_A
    assert error(y, torch.einsum("ti,eoi,te->to", x, dense, weights)) <= RELATIVE[torch.float32]


def test_the_registry_is_read_at_every_call(monkeypatch):
    """Whoever registers a function under a known name expects it to run."""
    model, calls = adapted(), []
    stock = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def own(*args):
        calls.append(1)
        return stock(*args)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", own)
    assert "experts_implementation='grouped_mm'" in experts.decide(outermost(model)).reason
    loss_of(model, tokens())
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------
# other classes of transformers, alone
# ---------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def nemotron_h():
    """Up and down projections only, and a squared ReLU."""
    config = NemotronHConfig(
        n_routed_experts=4, hidden_size=16, moe_intermediate_size=24, moe_latent_size=None
    )
    return NemotronHExperts(config)


def muse_spark():
    """A norm after each expert."""
    config = MuseSparkTextConfig(num_local_experts=4, moe_hidden_size=16, moe_intermediate_size=24)
    return MuseSparkExperts(config)


def block(build, implementation):
    base = build()
    for weight in base.parameters():
        nn.init.normal_(weight, std=0.3)
    base.config._experts_implementation = implementation
    first = "up_proj" if build is nemotron_h else "gate_up_proj"
    return filled(wrap_experts(_Block(base), target_parameters=[f"experts.{first}", "experts.down_proj"]))


def call_of(dtype=torch.float32):
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    return torch.randn(7, 16).to(dtype), index, torch.rand(7, 2).to(dtype)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("build", [nemotron_h, muse_spark])
def test_experts_without_a_gate_and_with_a_norm(build, implementation):
    model, call = block(build, implementation), call_of()
    y, counts = ran(lambda: model(*call))
    assert counts[0] == 2
    with mica.fast.disabled():
        assert error(y, model(*call)) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("build", [nemotron_h, muse_spark])
def test_weights_in_fp32_over_16_bit_experts(build, implementation):
    """Their sums are in fp32, and the result in the dtype of the input."""
    model = block(build, implementation).bfloat16()
    x, index, weights = call_of(torch.bfloat16)
    y, counts = ran(lambda: model(x, index, weights.float()))
    assert counts[0] == 2
    with mica.fast.disabled():
        expected = model(x, index, weights.float())
    assert y.dtype == expected.dtype == torch.bfloat16
    assert error(y, expected) <= RELATIVE[torch.bfloat16]


def test_weights_of_all_experts_are_pefts():
    """As some models passed them to transformers before 5.4."""
    model = block(muse_spark, "eager")
    x, index, _ = call_of()
    _, counts = ran(lambda: model(x, index, torch.rand(7, 4)))
    assert counts == (0, 0)
    reason = "in the last forward: router weights that are not one for each expert of a token"
    assert [(row.path, row.reason) for row in mica.fast.explain(model).rows] == [("peft", reason)] * 2


def test_an_input_of_another_dtype_is_cast_by_grouped_products_alone():
    model, call = block(muse_spark, "grouped_mm").double(), call_of()
    assert ran(lambda: model(*call))[1][0] == 2
    outermost(model).get_base_layer().config._experts_implementation = "batched_mm"
    with pytest.raises(RuntimeError, match="expected scalar type"):  # as from stock
        model(*call)


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_fp64_within_autocast_is_pefts_and_fails_there(implementation):
    """Autocast leaves fp64 alone, and casts the weights."""
    layer = outermost(adapted("qwen3_moe"))
    layer.get_base_layer().config._experts_implementation = implementation
    x, index, weights = torch.randn(5, 32).double(), torch.arange(10).view(5, 2) % 6, torch.rand(5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=r"(?i)double"):
        layer(x, index, weights)


def test_one_registry_as_before_transformers_5_4(monkeypatch):
    """Then a class's forward has no registry in its closure, and experts have no ``has_gate``."""
    model, call = block(muse_spark, "grouped_mm"), call_of()
    base = outermost(model).get_base_layer()
    original = type(base).forward.__wrapped__

    def dispatching(self, *args):
        if self.config._experts_implementation != "eager":
            return moe.ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation](self, *args)
        return original(self, *args)

    monkeypatch.setattr(experts, "_DISPATCHING", dispatching.__code__)
    monkeypatch.setattr(type(base), "forward", dispatching)
    del base.has_gate
    y, counts = ran(lambda: model(*call))
    assert counts[0] == 2
    base.has_gate = True
    with mica.fast.disabled():
        assert error(y, model(*call)) <= RELATIVE[torch.float32]
