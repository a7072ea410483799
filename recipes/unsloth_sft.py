"""A MiCA adapter on a model that Unsloth loads: python unsloth_sft.py MODEL TEXTS.jsonl OUTPUT"""

from unsloth import FastLanguageModel  # isort: skip  Unsloth wants to be imported first
import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

model_name, texts, output = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name,
    max_seq_length=512,
    load_in_4bit=False,  # or True: nothing else in this script changes
)

import mica.fast  # noqa: E402  after the model: loading it may rewrite the forwards of PEFT's layers

config = LoraConfig(
    init_lora_weights="mica", r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
)
model = get_peft_model(model, config)  # PEFT's: Unsloth's refuses MiCA on 4-bit weights
model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing="unsloth")
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
print(mica.fast.explain(model))  # no path peft, and no layer "not called": this backend
model.save_pretrained(output)
