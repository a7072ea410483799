"""Plain LoRA in a training loop with accelerate:

accelerate launch accelerate_lora.py MODEL TEXTS.jsonl OUTPUT
"""

import sys

import mica.fast
import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

mica.fast.enable(lora=True)

model_name, texts, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token  # its labels do not count
dataset = load_dataset("json", data_files=texts, split="train")  # {"text": ...} on each line
dataset = dataset.map(
    lambda rows: tokenizer(rows["text"], truncation=True, max_length=512),
    batched=True,
    remove_columns=dataset.column_names,
)
batches = torch.utils.data.DataLoader(
    dataset, batch_size=8, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)
)

model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
accelerator = Accelerator()
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
losses = []
for batch in batches:
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    accelerator.print(f"loss {losses[-1]:.3f}")

trained = accelerator.unwrap_model(model)
accelerator.print(mica.fast.explain(trained))  # path kernel, reference or operators (CPU): this backend
if accelerator.is_main_process:
    trained.save_pretrained(output)
