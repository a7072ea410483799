"""A MiCA adapter with Trainer and FSDP2, started by torchrun or by accelerate launch:

torchrun --nproc-per-node 2 fsdp2.py MODEL TEXTS.jsonl OUTPUT
accelerate launch --config_file fsdp2.yaml fsdp2.py MODEL TEXTS.jsonl OUTPUT
"""

import os
import sys

import mica.fast  # before the adapter is created
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

LENGTH = 512  # tokens of a block
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],  # the decoder layer's class of your model
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",  # save_model writes nothing with SHARDED_STATE_DICT
}


def trainer_of(model_name, texts, output, **options):
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
    config = LoraConfig(
        init_lora_weights="mica", r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)  # before the model is sharded

    def blocks(rows):
        """All texts one after the other, in blocks of LENGTH tokens."""
        tokenised = tokenizer(rows["text"])["input_ids"]
        ids = [token for text in tokenised for token in (*text, tokenizer.eos_token_id)]
        cut = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
        return {"input_ids": cut, "labels": cut}

    dataset = load_dataset("json", data_files=texts, split="train")  # {"text": ...} on each line
    arguments = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output, **arguments),
        train_dataset=dataset.map(blocks, batched=True, remove_columns=dataset.column_names),
    )


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # set by accelerate launch, from fsdp2.yaml
        fsdp = {}
    else:
        fsdp = {"fsdp": True, "fsdp_config": FSDP}
    trainer = trainer_of(*sys.argv[1:], **fsdp)
    trainer.train()
    if trainer.is_world_process_zero():
        print(mica.fast.explain(trainer.model))  # of the sharded model
    trainer.save_model()  # all processes: the shards are gathered; the first one writes the adapter
