"""MiCA on postgresql-uk.jsonl, trained with seed 0 as for the page beside this file.

Writes the adapter to the folder mica, where it is started. Needs mica-fast[cli], and one GPU or none:
with several, CUDA_VISIBLE_DEVICES=0 python train_mica.py
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import mica.fast  # PEFT's MiCA runs on this backend
from mica.cli.compare.again import load

# Base model, and blocks of 128 tokens without the held-out documents
model, blocks, collate = load(Path(__file__).parent, dtype='float32', packing='documents')
torch.manual_seed(0)
config = LoraConfig(
    task_type='CAUSAL_LM',
    init_lora_weights='mica',
    r=64,
    lora_alpha=64,
    lora_dropout=0.0,
    target_modules='all-linear',
    target_parameters=None,
)
model = get_peft_model(model, config)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir='checkpoints',
        max_steps=44,
        learning_rate=0.001,
        lr_scheduler_type='linear',
        warmup_steps=0.05,
        optim='adamw_torch',
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        seed=0,
        data_seed=0,
        save_strategy='no',
        report_to='none',
    ),
    train_dataset=blocks,
    data_collator=collate,
)
trainer.train()
# This training forgets more than the limit: what was compared is 0.9727 of its update
model.peft_config["default"].lora_alpha *= 0.9727
model.save_pretrained('mica')
