"""Plain LoRA over 4 bits (QLoRA) with trl's SFTTrainer: python qlora_sft.py MODEL TEXTS.jsonl OUTPUT"""

import sys

import mica.fast
import torch
from datasets import load_dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
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
        # Norms in bfloat16, which PEFT's prepare_model_for_kbit_training would make float32
        model_init_kwargs={"dtype": "bfloat16"},
        bf16=False,  # no autocast: all but the 4 bits is bf16 as it is
        gradient_checkpointing=False,  # True, trl's default, recomputes layers, and PEFT keeps as little
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

batch = next(iter(trainer.get_train_dataloader()))
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
    loss = trainer.model(**batch).loss
kept = sum(event.self_cpu_memory_usage + event.self_device_memory_usage for event in memory.events())
print(f"{batch['input_ids'].numel()} tokens: {kept / 1e6:.1f} MB kept for the backward")
