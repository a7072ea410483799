"""Whatever the model: each x that is computed again has the bits of the x that was there."""

import peft
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

import mica.fast
from mica.ops import recompute

BF16, FP32 = torch.bfloat16, torch.float32
IDS = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "pad_token_id": 0,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
OTHER_SIZES = {
    **dict.fromkeys(["exaone4", "gemma", "glm", "glm4", "lfm2", "mixtral"], HEADS),
    **dict.fromkeys(["nemotron", "qwen2", "qwen3", "qwen2_moe", "stablelm"], HEADS),
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 16},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96},
    "whisper": {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "codegen": {"rotary_dim": 16},
}
NAMES = """
    arcee glm glm4 granite llama mixtral phi3 qwen2 qwen2_moe t5
    apertus diffllama doge exaone4 gemma gemma2 gemma3_text lfm2 olmo2 qwen3
    bert convbert deberta-v2 distilbert mpnet roformer bert-32 gpt_neox-32
    biogpt bloom codegen ctrl falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj mpt opt phi persimmon starcoder2
    albert bart beit clip_vision_model cohere dinov2 nemotron olmo siglip_vision_model stablelm vit whisper
"""
MODELS = NAMES.split()  # "-32": in fp32; not those whose code transformers generates from one of these


def without_dropout(config):
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("_pdrop") or name == "layerdrop") and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def adapted(name, init):
    """The model, and what it is called with."""
    kind = name.removesuffix("-32")
    dtype = BF16 if kind == name else FP32
    config = without_dropout(CONFIG_MAPPING[kind](**{**SIZES, **OTHER_SIZES.get(kind, {})}))
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=dtype)
    lora = peft.LoraConfig(
        r=4, target_modules="all-linear", exclude_modules=".*shared_expert_gate", init_lora_weights=init
    )
    inputs = {"input_ids": IDS}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(1, 3, config.image_size, config.image_size, dtype=dtype)}
    if model.main_input_name == "input_features":
        features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
        inputs = {"input_features": features}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    return peft.get_peft_model(model, lora).train(), inputs


def gradients(model, output):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = output.float().sin().sum()
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


@pytest.fixture
def recomputed(monkeypatch):
    """How each x can be computed that is, and a copy of what it is."""
    stock = recompute.arrange
    found = []

    def arrange(x):
        computed = stock(x)
        if computed is not None:
            found.append((computed, x.detach().clone()))
        return computed

    monkeypatch.setattr(recompute, "arrange", arrange)
    mica.fast.enable(lora=True)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_again_is_what_was_there(name, recomputed, monkeypatch):
    """Value by value. What PyTorch's own nodes have computed again, too, shows in the gradients."""
    model, inputs = adapted(name, init="mica" if MODELS.index(name) % 2 else False)
    output = model(**inputs).last_hidden_state
    assert len(recomputed) >= 2
    for computed, x in recomputed:
        assert torch.equal(computed.value(None), x)
    ours = gradients(model, output)
    monkeypatch.setattr(recompute, "MIN_NUMBERS", 2**62)  # where all x are saved
    expected = gradients(model, model(**inputs).last_hidden_state)
    assert all(map(torch.equal, ours, expected))
