"""A MiCA adapter on a model that Unsloth loads: python unsloth_sft.py MODEL TEXTS.jsonl OUTPUT"""

import os
import sys

os.environ["UNSLOTH_FAST_LORA_INIT"] = "0"  # B comes from this package's solver, in fp32, not from Unsloth's

from unsloth import FastLanguageModel  # isort: skip  Unsloth wants to be imported first
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

model_name, texts, output = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name,
    max_seq_length=512,
    load_in_4bit=False,  # Unsloth refuses MiCA on quantised weights
)

import mica.fast  # noqa: E402  after the model: loading it may rewrite the forwards of PEFT's layers

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    init_lora_weights="mica",
    use_gradient_checkpointing="unsloth",
)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        output,
        bf16=False,  # Unsloth sets it by the dtype of the model
        max_length=512,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=texts, split="train"),  # {"text": ...} on each line
)
trainer.train()
print(mica.fast.explain(model))  # path kernel or reference, and no layer "not called": this backend
model.save_pretrained(output)
