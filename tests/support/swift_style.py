"""What ms-swift 4.6 does to PEFT, and with the options of the recipe on recipes/README.md: a stand-in for it.

An option that it does not read is an error. Where swift does it: tuners/peft.py (`patch_peft`),
arguments/ (the options), pipelines/train/tuner.py (LoraConfig), pipelines/train/sft.py (`SwiftPretrain`).
"""

import sys
import types
from argparse import ArgumentParser
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from unittest.mock import patch

import peft
import transformers
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraLayer, LoraModel
from transformers import Trainer


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
    if hasattr(only, "lora_dtype"):
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            for factor in [*layer.lora_A.values(), *layer.lora_B.values()]:
                factor.forward_origin = factor.forward
                factor.forward = MethodType(_on_its_device, factor)


def _create_and_replace(self, peft_config, adapter_name, target, *args, **kwargs):
    return self._create_and_replace_origin(peft_config, adapter_name, target, *args, **kwargs)


def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
    return self._cast_adapter_dtype_origin(adapter_name, autocast_adapter_dtype)


def _load_adapter(self, model_id, *args, **kwargs):
    return self.load_adapter_origin(model_id, *args, **kwargs)


def patch_peft() -> None:
    """As `swift.tuners.peft` does when it is imported; of swift's wrappers each has its own signature."""
    LoraModel.__init_origin__ = LoraModel.__init__
    LoraModel.__init__ = _init
    LoraModel._create_and_replace_origin = LoraModel._create_and_replace
    LoraModel._create_and_replace = _create_and_replace
    LoraModel._cast_adapter_dtype_origin = LoraModel._cast_adapter_dtype
    LoraModel._cast_adapter_dtype = _cast_adapter_dtype
    PeftModel.load_adapter_origin = PeftModel.load_adapter
    PeftModel.load_adapter = _load_adapter
    PeftConfigMixin.from_pretrained_origin = PeftConfigMixin.from_pretrained
    PeftConfigMixin.from_pretrained = LoraConfig.from_pretrained


@contextmanager
def imported():
    """Within it `swift` can be imported, and PEFT's functions are wrapped; afterwards they are as before."""
    modules = {name: types.ModuleType(name) for name in MODULES}
    modules["swift.pipelines.train.pretrain"].SwiftPretrain = SwiftPretrain
    before = {owner: dict(vars(owner)) for owner in (LoraModel, PeftModel, PeftConfigMixin)}
    with patch.dict(sys.modules, modules):
        patch_peft()
        try:
            yield
        finally:
            for owner, attributes in before.items():
                for name in set(vars(owner)) - set(attributes):
                    delattr(owner, name)
                for name, value in attributes.items():
                    if vars(owner)[name] is not value:
                        setattr(owner, name, value)


class SwiftPretrain:
    """Reads the options of the command line; `main` trains, and leaves a checkpoint of the adapter."""

    def __init__(self):
        parser = ArgumentParser(allow_abbrev=False)
        for name in TEXTS:
            parser.add_argument(f"--{name}", required=True)
        for name in NUMBERS:
            parser.add_argument(f"--{name}", type=float, required=True)
        self.args = parser.parse_args()
        assert self.args.truncation_strategy == "split"
        assert self.args.target_modules == "all-linear"

    def main(self):
        args = self.args
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        tokenizer.pad_token = tokenizer.eos_token
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
        output = model.get_output_embeddings()
        linear = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ == "Linear" and module is not output
        }
        model.requires_grad_(False)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=int(args.lora_rank),
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=sorted(linear),
            init_lora_weights=args.init_weights,
            bias="none",
        )
        self.model = get_peft_model(model, config)
        length = int(args.max_length)
        rows = load_dataset("json", data_files=args.dataset, split="train")
        tokens = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in rows["text"]]
        blocks = [ids[start : start + length] for ids in tokens for start in range(0, len(ids), length)]
        self.trainer = Trainer(
            model=self.model,
            args=transformers.TrainingArguments(
                args.output_dir,
                per_device_train_batch_size=int(args.per_device_train_batch_size),
                learning_rate=args.learning_rate,
                num_train_epochs=args.num_train_epochs,
                logging_steps=int(args.logging_steps),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=[{"input_ids": ids} for ids in blocks],
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        self.trainer.train()
        self.trainer.save_model()


MODULES = (
    "swift",
    "swift.tuners",
    "swift.tuners.peft",
    "swift.pipelines",
    "swift.pipelines.train",
    "swift.pipelines.train.pretrain",
)
TEXTS = "model", "dataset", "output_dir", "init_weights", "target_modules", "truncation_strategy"
NUMBERS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "max_length",
    "per_device_train_batch_size",
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
)
