"""Plain LoRA over 4 bits (QLoRA) with trl's SFTTrainer: python qlora_sft.py MODEL TEXTS.jsonl OUTPUT"""

import sys

import mica.fast
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

mica.fast.enable(lora=True)

model, texts, output = sys.argv[1:]
trainer = SFTTrainer(
    model=model,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    args=SFTConfig(
        output,
        model_init_kwargs={"dtype": "auto"},
        max_length=512,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=texts, split="train"),  # {"text": ...} on each line
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
print(mica.fast.explain(trainer.model))  # path kernel or reference, "base layer called": this backend
trainer.save_model()
