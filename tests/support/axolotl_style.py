"""What axolotl 0.19 does with the keys of recipes/axolotl.yaml, on transformers' Trainer: a stand-in for it.

A key that it does not read is an error. Where axolotl does it: cli/config.py (plugins),
utils/schemas/config.py (its own kernels), loaders/adapter.py (LoraConfig), loaders/model.py (hooks).
"""

import importlib
import sys
import types
from typing import Any
from unittest.mock import patch

import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel")


class BasePlugin:
    """axolotl.integrations.base.BasePlugin: hooks that do nothing."""

    def pre_model_load(self, cfg):
        pass

    def post_model_load(self, cfg, model):
        pass

    def post_train(self, cfg, model):
        pass


def load_plugin(name: str) -> BasePlugin:
    """An instance of "module.Class"."""
    module, _, cls = name.rpartition(".")
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    parents = {name: types.ModuleType(name) for name in ("axolotl", "axolotl.integrations")}
    with patch.dict(sys.modules, {**parents, base.__name__: base}):
        return getattr(importlib.import_module(module), cls)()


def lora_config(cfg: dict[str, Any], model: nn.Module) -> LoraConfig:
    output = model.get_output_embeddings()
    linear = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not output
    ]
    return LoraConfig(
        r=cfg.pop("lora_r"),
        lora_alpha=cfg.pop("lora_alpha"),
        lora_dropout=cfg.pop("lora_dropout"),
        init_lora_weights=cfg.pop("peft_init_lora_weights"),
        target_modules=sorted({name.rpartition(".")[2] for name in linear if cfg["lora_target_linear"]}),
        bias="none",
        task_type="CAUSAL_LM",
    )


def train(config: dict[str, Any]) -> Trainer:
    """From the loaded YAML file to the saved adapter."""
    cfg = dict(config)
    plugins = [load_plugin(name) for name in cfg.pop("plugins")]
    if all(cfg.get(name) is None for name in KERNELS):
        cfg.update(dict.fromkeys(KERNELS, True))
    for plugin in plugins:
        plugin.pre_model_load(cfg)
    if any(cfg.pop(name) for name in KERNELS):
        raise NotImplementedError("axolotl's own kernels")

    name = cfg.pop("base_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **cfg.pop("special_tokens"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype="auto", attn_implementation=cfg.pop("attn_implementation")
    )
    model.enable_input_require_grads()
    model = get_peft_model(model, lora_config(cfg, model))
    for plugin in plugins:
        plugin.post_model_load(cfg, model)

    (source,) = cfg.pop("datasets")
    assert source.pop("type") == "completion"
    length = cfg.pop("sequence_len")
    rows = load_dataset(source.pop("ds_type"), data_files=source.pop("path"), split="train")
    assert not source
    tokens = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in rows["text"]]
    blocks = [ids[start : start + length] for ids in tokens for start in range(0, len(ids), length)]

    output = cfg.pop("output_dir")
    trainer = Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output,
            per_device_train_batch_size=cfg.pop("micro_batch_size"),
            gradient_accumulation_steps=cfg.pop("gradient_accumulation_steps"),
            num_train_epochs=cfg.pop("num_epochs"),
            optim=cfg.pop("optimizer"),
            learning_rate=cfg.pop("learning_rate"),
            lr_scheduler_type=cfg.pop("lr_scheduler"),
            logging_steps=cfg.pop("logging_steps"),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[{"input_ids": ids} for ids in blocks],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    assert cfg.pop("adapter") == "lora"
    assert cfg.pop("val_set_size") == 0
    assert cfg.pop("lora_target_linear") is True
    assert cfg.pop("merge_method") == "legacy"
    assert not cfg, f"keys that nothing reads: {sorted(cfg)}"
    trainer.train()
    trainer.save_model()
    for plugin in plugins:
        plugin.post_train(cfg, model)
    return trainer
