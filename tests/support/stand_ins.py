"""What axolotl 0.19, ms-swift 4.6 and Unsloth 2026.10 do around an adapter, as far as recipes/ depends on it.

An option or a key that its framework does not read is an error. Where they do it:

- axolotl: cli/config.py (plugins), utils/schemas/config.py (its own kernels), loaders/adapter.py
  (LoraConfig), loaders/model.py (hooks);
- swift: tuners/peft.py (the wrappers), arguments/ (the options), pipelines/train/tuner.py (LoraConfig),
  pipelines/train/sft.py (`SwiftPretrain`);
- unsloth_zoo/compiler.py (`patch_lora_forwards`, as a model is loaded), unsloth_zoo/training_utils.py
  (`prepare_model_for_training`), unsloth/models/llama.py (`patch_peft_model`), unsloth/models/rl.py (trl's
  trainers), unsloth/kernels/fast_lora.py (`apply_lora_mlp_swiglu`). A script's `unsloth` is imported before
  mica.fast.
"""

import importlib
import sys
from argparse import ArgumentParser
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any
from unittest.mock import patch

import peft
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import SFTTrainer

KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel")  # axolotl's
TEXTS = "model", "dataset", "output_dir", "init_weights", "target_modules", "truncation_strategy"  # swift's
NUMBERS = "lora_rank", "lora_alpha", "lora_dropout", "max_length", "per_device_train_batch_size"
NUMBERS += "learning_rate", "num_train_epochs", "logging_steps"


def all_linear(model: nn.Module) -> list[str]:
    """The names of its linear layers, but for the output."""
    output = model.get_output_embeddings()
    found = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not output
    ]
    return sorted({name.rpartition(".")[2] for name in found})


def trained(model: PeftModel, tokenizer, path: str, length: int, output: str, **options) -> Trainer:
    """On the texts of a JSON file, in blocks; the adapter is saved."""
    rows = load_dataset("json", data_files=path, split="train")
    tokens = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in rows["text"]]
    blocks = [ids[start : start + length] for ids in tokens for start in range(0, len(ids), length)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output, save_strategy="no", report_to="none", **options),
        train_dataset=[{"input_ids": ids} for ids in blocks],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model()
    return trainer


# -- axolotl ------------------------------------------------------------------------------------------


class BasePlugin:
    """axolotl.integrations.base.BasePlugin: hooks that do nothing."""

    def pre_model_load(self, cfg):
        pass

    def post_model_load(self, cfg, model):
        pass

    def post_train(self, cfg, model):
        pass


def _module(name: str, **attributes) -> dict[str, ModuleType]:
    """It and its parents, as `sys.modules` has them."""
    parts = name.split(".")
    made = {".".join(parts[:count]): ModuleType(name) for count in range(1, len(parts) + 1)}
    vars(made[name]).update(attributes)
    return made


def load_plugin(name: str) -> BasePlugin:
    """An instance of "module.Class"."""
    module, _, cls = name.rpartition(".")
    with patch.dict(sys.modules, _module("axolotl.integrations.base", BasePlugin=BasePlugin)):
        return getattr(importlib.import_module(module), cls)()


def train_axolotl(config: dict[str, Any]) -> Trainer:
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
    tokenizer = AutoTokenizer.from_pretrained(name, **cfg.pop("special_tokens"))
    attention = cfg.pop("attn_implementation")
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", attn_implementation=attention)
    model.enable_input_require_grads()
    adapter = peft.LoraConfig(
        r=cfg.pop("lora_r"),
        lora_alpha=cfg.pop("lora_alpha"),
        lora_dropout=cfg.pop("lora_dropout"),
        init_lora_weights=cfg.pop("peft_init_lora_weights"),
        target_modules=all_linear(model),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)
    for plugin in plugins:
        plugin.post_model_load(cfg, model)
    (source,) = cfg.pop("datasets")
    run = {
        "path": source.pop("path"),
        "length": cfg.pop("sequence_len"),
        "output": cfg.pop("output_dir"),
        "per_device_train_batch_size": cfg.pop("micro_batch_size"),
        "gradient_accumulation_steps": cfg.pop("gradient_accumulation_steps"),
        "num_train_epochs": cfg.pop("num_epochs"),
        "optim": cfg.pop("optimizer"),
        "learning_rate": cfg.pop("learning_rate"),
        "lr_scheduler_type": cfg.pop("lr_scheduler"),
        "logging_steps": cfg.pop("logging_steps"),
    }
    assert source == {"type": "completion", "ds_type": "json"}
    left = {"adapter": "lora", "val_set_size": 0, "lora_target_linear": True, "merge_method": "legacy"}
    assert cfg == left, f"keys that nothing reads: {cfg}"
    trainer = trained(model, tokenizer, **run)
    for plugin in plugins:
        plugin.post_train(cfg, model)
    return trainer


# -- ms-swift -----------------------------------------------------------------------------------------


@dataclass
class LoraConfig(peft.LoraConfig):
    lora_dtype: str | None = None

    def save_pretrained(self, save_directory, **kwargs):
        options = {name: value for name, value in self.to_dict().items() if name != "lora_dtype"}
        peft.LoraConfig(**options).save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, path, subfolder=None, **kwargs):
        return PeftConfigMixin.from_pretrained_origin(path, subfolder, **kwargs)


def _on_its_device(self, *args, **kwargs):
    x, *others = args
    return self.forward_origin(x.to(self.weight.device), *others, **kwargs)


def _init(self, model, config, *args, **kwargs):
    self.__init_origin__(model, config, *args, **kwargs)
    (only,) = config.values()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers if hasattr(only, "lora_dtype") else ():
        for factor in [*layer.lora_A.values(), *layer.lora_B.values()]:
            factor.forward_origin = factor.forward
            factor.forward = MethodType(_on_its_device, factor)


def _create_and_replace(self, peft_config, adapter_name, target, *args, **kwargs):
    return self._create_and_replace_origin(peft_config, adapter_name, target, *args, **kwargs)


def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
    return self._cast_adapter_dtype_origin(adapter_name, autocast_adapter_dtype)


def _load_adapter(self, model_id, *args, **kwargs):
    return self.load_adapter_origin(model_id, *args, **kwargs)


def _wrapped(owner: type, **functions):
    """Within it these are the owner's; its own are there under the names that swift gives them."""
    names = {name: f"{name}_origin" for name in functions} | {"__init__": "__init_origin__"}
    origins = {names[name]: getattr(owner, name) for name in functions}
    return patch.multiple(owner, create=True, **origins, **functions)


@contextmanager
def swift_imported():
    """Within it `swift` can be imported, and PEFT's functions are wrapped, by signatures of swift's own."""
    modules = _module("swift.tuners.peft") | _module(
        "swift.pipelines.train.pretrain", SwiftPretrain=SwiftPretrain
    )
    with (
        patch.dict(sys.modules, modules),
        _wrapped(
            LoraModel,
            __init__=_init,
            _create_and_replace=_create_and_replace,
            _cast_adapter_dtype=_cast_adapter_dtype,
        ),
        _wrapped(PeftModel, load_adapter=_load_adapter),
        _wrapped(PeftConfigMixin, from_pretrained=LoraConfig.from_pretrained),
    ):
        yield


class SwiftPretrain:
    """Reads the options of the command line; `main` trains, and leaves a checkpoint of the adapter."""

    def __init__(self):
        parser = ArgumentParser(allow_abbrev=False)
        for name in (*TEXTS, *NUMBERS):
            parser.add_argument(f"--{name}", type=float if name in NUMBERS else str, required=True)
        self.args = parser.parse_args()
        assert self.args.truncation_strategy == "split"
        assert self.args.target_modules == "all-linear"

    def main(self):
        args = self.args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
        model.requires_grad_(False)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=int(args.lora_rank),
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=all_linear(model),
            init_lora_weights=args.init_weights,
        )
        self.model = get_peft_model(model, config)
        self.trainer = trained(
            self.model,
            tokenizer,
            args.dataset,
            int(args.max_length),
            args.output_dir,
            per_device_train_batch_size=int(args.per_device_train_batch_size),
            learning_rate=args.learning_rate,
            num_train_epochs=args.num_train_epochs,
            logging_steps=int(args.logging_steps),
        )


# -- Unsloth ------------------------------------------------------------------------------------------


def unsloth_forward(self, x, *args, **kwargs):
    """The rewritten forward of a layer: for one adapter."""
    (adapter,) = self.active_adapters
    update = self.lora_B[adapter](self.lora_A[adapter](x.to(self.lora_A[adapter].weight.dtype)))
    return self.base_layer(x) + update.to(x.dtype) * self.scaling[adapter]


def _mlp_forward(self, x):
    """Unsloth's kernels decline variants of LoRA, such as MiCA, and call the layers."""
    for layer in (self.gate_proj, self.up_proj, self.down_proj):
        assert layer.lora_variant, "Unsloth's own kernel"
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def in_nf4(model_name):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(model_name, quantization_config=quantization)


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, load_in_4bit):
        Linear.forward = unsloth_forward
        if load_in_4bit:
            model = in_nf4(model_name)
            from peft.tuners.lora.bnb import Linear4bit

            Linear4bit.forward = unsloth_forward
            _switch_off_trl_s_rounding()
        else:
            model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def patch_peft_model(model, use_gradient_checkpointing):
        assert use_gradient_checkpointing == "unsloth"
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
        for layer in model.modules():
            if getattr(layer, "frozen_peft_weight_names", None):
                layer._freeze_non_trainable_peft_weights()
        for layer in model.get_base_model().model.layers:
            layer.mlp.forward = MethodType(_mlp_forward, layer.mlp)
        return model


def _switch_off_trl_s_rounding():
    """Unsloth rewrites trl's source so; here the trainer is told that the model is not quantised."""
    init = SFTTrainer.__init__

    def is_not_quantised(self, model, *args, **kwargs):
        model.is_loaded_in_4bit = False
        init(self, model, *args, **kwargs)
        model.is_loaded_in_4bit = True

    SFTTrainer.__init__ = is_not_quantised
