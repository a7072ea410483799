"""What Unsloth 2026.10 does around a MiCA adapter, as far as recipes/unsloth_sft.py depends on it.

Where Unsloth does it: unsloth_zoo/compiler.py (`patch_lora_forwards`, as a model is loaded),
unsloth/models/lora_init.py (`fast_lora_init`), unsloth/models/llama.py (`get_peft_model`) and
unsloth/kernels/fast_lora.py (`apply_lora_mlp_swiglu`). Scripts import this as `unsloth`, before mica.fast.
"""

import os
from types import MethodType

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from transformers import AutoModelForCausalLM, AutoTokenizer


def unsloth_forward(self, x, *args, **kwargs):
    """The rewritten forward of a layer: for one adapter."""
    (adapter,) = self.active_adapters
    update = self.lora_B[adapter](self.lora_A[adapter](x.to(self.lora_A[adapter].weight.dtype)))
    return self.base_layer(x) + update.to(x.dtype) * self.scaling[adapter]


def _mica_init(self, adapter_name):
    """All eigenvectors of the Gram matrix in fp64; B is rounded to the dtype of the weight."""
    weight = self.get_base_layer().weight
    _, vectors = torch.linalg.eigh(weight.double() @ weight.double().T)
    rank = self.r[adapter_name]
    self.lora_B[adapter_name].weight.data = vectors[:, :rank].flip(1).to(weight.dtype)
    self.lora_A[adapter_name].weight.data = weight.new_zeros(rank, weight.shape[1])


def _mlp_forward(self, x):
    """Unsloth's kernels decline variants of LoRA, such as MiCA, and call the layers."""
    for layer in (self.gate_proj, self.up_proj, self.down_proj):
        assert layer.lora_variant, "Unsloth's own kernel"
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, load_in_4bit):
        assert not load_in_4bit
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
        lora.Linear.forward = unsloth_forward
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, **options):
        assert use_gradient_checkpointing == "unsloth"
        config = LoraConfig(task_type="CAUSAL_LM", bias="none", **options)
        original = lora.LoraLayer.mica_init
        if os.environ.get("UNSLOTH_FAST_LORA_INIT", "1") != "0":
            lora.LoraLayer.mica_init = _mica_init
        try:
            model = get_peft_model(model, config)
        finally:
            lora.LoraLayer.mica_init = original
        for layer in model.get_base_model().model.layers:
            layer.mlp.forward = MethodType(_mlp_forward, layer.mlp)
        return model
