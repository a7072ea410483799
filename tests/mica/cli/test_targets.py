"""Which layers and stacks of experts are adapted, against what PEFT makes of its configuration."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import mica.fast  # noqa: F401 (MiCA on parameters)
from mica.cli.targets import features, find_targets, saved_parameters
from mica.errors import UsageError
from tests.support import models, moe_models
from tests.support.tables import rows
from tests.support.unchanged import unchanged


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_llama])
@pytest.mark.parametrize(
    "names", ["all-linear", "embed_tokens,down_proj,wte,attn.c_proj", "0.mlp.c_fc,q_proj"]
)
def test_targets_are_those_of_peft(make, names):
    model = make()
    known = [name for name in names.split(",") if any(key.endswith(name) for key, _ in model.named_modules())]
    names = ",".join(known) or "all-linear"
    with unchanged(model):
        targets = find_targets(model, names)
    wrapped = models.wrap(model, targets=names if names == "all-linear" else known, task_type="CAUSAL_LM")
    assert list(targets.modules) == wrapped.base_model.targeted_module_names


SIZES = {
    # shared experts, with a gate that is a layer of one output
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "intermediate_size": 24},
    # a dense layer, shared experts, and a family whose gate_proj, up_proj and down_proj PEFT renames
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
    },
}
SHARED_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def mixture(kind):
    if kind in moe_models.BUILDERS:
        return moe_models.BUILDERS[kind]()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHARED_SIZES | SIZES[kind]))


# The model, --target-modules, --experts, and what is adapted: modules and parameters
MIXTURES = """
gpt_oss => all-linear => true => SELF => STACKS
gpt_oss => router => null =>  => mlp.router.weight
qwen2_moe => all-linear => true => SHARED SELF => STACKS
qwen2_moe => shared_expert_gate => null => shared_expert_gate =>
deepseek_v3 => all-linear => true => LOW_RANK => DENSE STACKS
deepseek_v3 => all-linear => false => LOW_RANK => DENSE
mixtral => q_proj,v_proj => true => q_proj v_proj => STACKS
mixtral => q_proj,down_proj => null => q_proj => mlp.experts.down_proj
mixtral => q_proj,down_proj => false => q_proj =>
mixtral => gate => null =>  => mlp.gate.weight
gpt_oss => 0.mlp.experts.down_proj => null =>  => model.layers.0.mlp.experts.down_proj
"""
SEVERAL = {
    "SELF": "self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj",
    "SHARED": "mlp.shared_expert.down_proj mlp.shared_expert.gate_proj mlp.shared_expert.up_proj",
    "LOW_RANK": "self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj self_attn.q_a_proj "
    "self_attn.q_b_proj",
    "DENSE": "mlp.down_proj.weight mlp.gate_proj.weight mlp.up_proj.weight "
    "mlp.shared_experts.down_proj.weight mlp.shared_experts.gate_proj.weight "
    "mlp.shared_experts.up_proj.weight",
    "STACKS": "mlp.experts.down_proj mlp.experts.gate_up_proj",
}
for word, several in SEVERAL.items():
    MIXTURES = MIXTURES.replace(word, several)


@pytest.mark.parametrize(("kind", "names", "experts", "modules", "parameters"), rows(MIXTURES))
@pytest.mark.whole
def test_targets_in_a_mixture(kind, names, experts, modules, parameters):
    """PEFT adapts these and nothing else, and saves them under the names that `saved_parameters` gives."""
    model = mixture(kind)
    with unchanged(model):
        targets = find_targets(model, names, json.loads(experts))
        saved = saved_parameters(model, targets.parameters)
    modules, parameters = sorted(modules.split()), sorted(parameters.split())
    assert targets.config == {"target_modules": modules, "target_parameters": parameters or None}
    shapes = {name: features(module) for name, module in targets.modules.items()}
    shapes |= {name: shape[-2:] for name, (_, shape) in saved.items()}
    assert {name for name, _ in saved.values()} == set(targets.parameters)
    config = LoraConfig(init_lora_weights="mica", r=1, task_type="CAUSAL_LM", **targets.config)
    wrapped = get_peft_model(model, config)
    found = {}
    for name, weight in wrapped.named_parameters():
        if ".lora_B." in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_B.")[0]
            lora_A = wrapped.get_parameter(name.replace("lora_B", "lora_A"))
            found[layer] = (weight.shape[0], lora_A.shape[1])
            experts = saved[layer][1][0] if len(saved.get(layer, (0, ()))[1]) == 3 else 1
            assert lora_A.shape[0] == experts
    assert found == shapes


def test_names_that_match_nothing():
    with pytest.raises(UsageError, match=r"no layer of the model is called 'experts\.w1'"):
        find_targets(mixture("mixtral"), "experts.w1")
    with pytest.raises(UsageError, match=r"'q_porj'; did you mean q_proj\?$"):
        find_targets(mixture("mixtral"), "q_porj")


class Routed(torch.nn.Module):
    """A mixture as other code has it: every expert a module, the router a layer."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 3)
        self.experts = torch.nn.ModuleList(models.Net() for _ in range(3))
        self.gate_proj = torch.nn.Linear(8, 8)


def test_experts_that_are_modules():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": Routed()})])})
    names = {experts: set(find_targets(model, "all-linear", experts).modules) for experts in (True, False)}
    assert names[False] == {"layers.0.mlp.gate_proj"}
    assert set(find_targets(model, "gate_proj", True).modules) == names[True]
    assert {name for name in names[True] if "experts" not in name} == names[False]
    assert sum(".experts." in name for name in names[True]) == sum(
        isinstance(module, (torch.nn.Linear, Conv1D)) for module in model.layers[0].mlp.experts.modules()
    )
