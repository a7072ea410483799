"""Continued pretraining of a model with an adapter: a thin layer over ``transformers.Trainer``."""

import math
import tempfile
from typing import NamedTuple

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from mica.errors import UsageError


class Training(NamedTuple):
    """Wall time of the training loop in seconds, tokens it read, mean training loss (nats per token)."""

    seconds: float
    tokens: int
    loss: float


class _LossOnBar(ProgressCallback):
    """The Trainer's progress bar with the loss on it; a loss that is not finite ends the training."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            self.training_bar.close()
            raise UsageError(
                f"the training loss is not finite ({loss}) at or before step {state.global_step}; nothing "
                f"was saved. Try a lower --learning-rate (now {args.learning_rate:g}) or --dtype float32"
            )
        self.training_bar.set_postfix(loss=f"{loss:.3f}")


def _checkpoint_activations(model) -> None:
    """Recompute activations in the backward. The re-entrant kind gives frozen inputs no gradient."""
    # Not by TrainingArguments: transformers renamed argument and method, and warns about the old names.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def train(
    model,
    blocks: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_ratio: float,
    gradient_checkpointing: bool,
    seed: int,
) -> Training:
    """Train the adapter of ``model`` in place on ``blocks``, (num_blocks, sequence_length) token ids.

    AdamW without weight decay, linear warm-up and decay. Blocks are drawn in random order, ``batch_size``
    per step, and again once all were seen. Writes nothing to disk.

    Raises UsageError if the loss becomes NaN or infinite (checked every tenth step; what happens after
    the last check shows in the perplexity).
    """
    if gradient_checkpointing:
        _checkpoint_activations(model.get_base_model())
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer creates its output folder in any case
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_steps=math.ceil(steps * warmup_ratio),
                seed=seed,
                logging_steps=min(10, steps),
                logging_nan_inf_filter=False,  # or the loss that is shown skips the bad steps
                include_num_input_tokens_seen="all",
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=False,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_LossOnBar())
        result = trainer.train()
    return Training(
        seconds=result.metrics["train_runtime"],
        tokens=int(trainer.state.num_input_tokens_seen),
        loss=result.training_loss,
    )
