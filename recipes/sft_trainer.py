"""A MiCA adapter with trl's SFTTrainer: python sft_trainer.py MODEL TEXTS.jsonl OUTPUT"""

import sys

import mica.fast  # before the trainer creates the adapter
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, texts, output = sys.argv[1:]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output,
        model_init_kwargs={"dtype": "auto"},  # a bf16 checkpoint stays bf16; trl's default is float32
        bf16=False,  # no autocast: the adapter is fp32 over a bf16 base as it is
        gradient_checkpointing=False,  # True, trl's default, recomputes layers, and PEFT keeps as little
        max_length=512,
        packing=True,
        packing_strategy="wrapped",  # blocks of max_length tokens, for any attention implementation
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=texts, split="train"),  # {"text": ...} on each line
    peft_config=LoraConfig(
        init_lora_weights="mica",
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
)
trainer.train()
print(mica.fast.explain(trainer.model))  # path kernel, reference or operators (CPU): this backend
trainer.save_model()  # the adapter alone, into OUTPUT
