"""``python -m bench.kinds``: what kinds of models keep for their backward, with an adapter and without.

Counted as `mica fits` counts, in seconds and without weights, of three layers by the configuration that
transformers has for each class.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    ViTConfig,
)

import mica.fast
from bench import pages
from mica.cli.step_memory import ATTENTION, kept_bytes

TOKENS = 4096
IMAGES = 16
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = {
    "Llama": LlamaConfig(),
    "Mistral": MistralConfig(),
    "Qwen3": Qwen3Config(),
    "Gemma3": Gemma3TextConfig(),
    "Phi3": Phi3Config(),
    "Phi": PhiConfig(),
    "GPT-2": GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "GPT-NeoX": GPTNeoXConfig(),
    "BERT": BertConfig(max_position_embeddings=TOKENS, **_NO_DROPOUT),
    "ViT": ViTConfig(**_NO_DROPOUT),
}
METHODS = {"LoRA": {}, "MiCA": {"init_lora_weights": "mica"}, "DoRA": {"use_dora": True}}


def counted(config: PreTrainedConfig) -> dict[str, int]:
    """Bytes that a forward in bf16 keeps, by the way to train."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:3]
    config.use_cache = False  # which would copy k and v
    with torch.device("meta"):
        base = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    base.train().requires_grad_(False)
    found = {pages.WITHOUT: kept_bytes(base, _forward(base))}
    for method, options in METHODS.items():
        adapter = LoraConfig(r=16, target_modules="all-linear", **options)
        for way in pages.FITS[:3]:
            with nullcontext() if way == "here" else mica.fast.disabled():
                model = get_peft_model(copy.deepcopy(base), adapter, low_cpu_mem_usage=True)
                if way == "PEFT's best setting":
                    model.to(torch.bfloat16)
                found[f"{method}, {way}"] = kept_bytes(model, _forward(model))
    return found


def _forward(model: nn.Module) -> Callable[[], torch.Tensor]:
    """A call with a first hidden state, or image, that needs a gradient."""
    config = model.config
    if config.model_type == "vit":
        size = IMAGES, config.num_channels, config.image_size, config.image_size
        name = "pixel_values"
    else:
        size = 1, TOKENS, config.hidden_size
        name = "inputs_embeds"
    x = torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return lambda: model(**{name: x}).last_hidden_state


def main() -> None:
    """Write the results, and the pages that show them."""
    mica.fast.enable(lora=True)
    found = {name: counted(config) for name, config in KINDS.items()}
    (pages.RESULTS / "kinds.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    pages.write()


if __name__ == "__main__":
    main()
