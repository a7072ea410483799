"""``transformers.Trainer`` as `mica adapt` uses it: its arguments, evaluation, optimiser and files."""

import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import set_seed
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mica.cli.adapt import checkpoints, embeddings, evaluation, processes, result
from mica.cli.adapt.amount import Amount
from mica.cli.targets import has_experts
from mica.errors import UsageError

_NEVER = 2**31  # steps


def training_arguments(args: Namespace, blocks: int, **more) -> TrainingArguments:
    """The Trainer's arguments for a run on ``blocks`` training blocks; ``more`` are passed on as they are."""
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps or -1,  # the epochs decide
        num_train_epochs=args.epochs or 1,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # With a last batch that is smaller, N processes fill theirs up with blocks from the epoch's start.
        dataloader_drop_last=Amount(args, blocks, PartialState().num_processes).drops_the_rest,
        dataloader_pin_memory=not processes.use_cpu(),
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.scheduler,
        warmup_steps=args.warmup_ratio,  # below 1: the share of all steps
        optim=args.optimizer,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        data_seed=args.seed,
        logging_steps=args.log_steps,
        logging_nan_inf_filter=False,  # or the loss that is shown skips the bad steps
        include_num_input_tokens_seen="all",
        eval_strategy="steps",
        eval_steps=args.eval_steps or _NEVER,  # without the option: at the start and at the end only
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=None,  # see checkpoints.rotate
        report_to=args.report_to or "none",
        remove_unused_columns=False,
        use_cpu=processes.use_cpu(),
        disable_tqdm=True,
        **more,
    )


class AdapterTrainer(Trainer):
    """The Trainer with exact perplexities, adapters without base weights, and one-line errors of writing.

    ``sets``: by name, the datasets whose perplexity is measured. ``finish(step)`` is called in every process
    once all files of a checkpoint are in `checkpoints.scratch`. ``own``: the options of the run.
    ``measuring``: seconds spent on perplexities so far.
    """

    def __init__(self, sets: dict[str, Dataset], own: Namespace, finish: Callable[[int], None], **options):
        super().__init__(**options)
        self.sets = sets
        self.own = own
        self.finish = finish
        self.measuring = 0.0

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's own; embeddings get groups with their learning rate, which schedules scale alike."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.own.embedding_learning_rate
        if is_new and rate is not None:
            embeddings.separate(optimizer, self.model, rate, self.args.optim)
        return optimizer

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """Perplexity and loss of every set, logged. Raises UsageError if one is not finite."""
        begin = time.perf_counter()
        batch_size = self.args.per_device_train_batch_size

        metrics = {}
        for name, blocks in self.sets.items():
            score = evaluation.likelihood(self.model, blocks, batch_size, self.args.device)
            metrics[f"{metric_key_prefix}_{name}_perplexity"] = score.perplexity
            metrics[f"{metric_key_prefix}_{name}_loss"] = score.loss

        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.measuring += time.perf_counter() - begin
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter. Every process must call this: under FSDP2 it is gathered.

        The Trainer's own method also writes a pickle of its arguments and the embeddings of the base, and
        under FSDP2 the whole model in the main process's memory (or nothing, with sharded checkpoints).
        """
        folder = Path(output_dir or self.args.output_dir)
        state = result.gathered(self.model)
        # All processes learn here of a failure in one: under FSDP2 the others would go on to gather the
        # optimiser's state.
        with checkpoints.written(self.own.output, folder.name):
            if self.args.should_save:
                model = self.accelerator.unwrap_model(self.model)
                result.write_adapter(model, folder, state)

    # The next two are private to the Trainer. Should a version not call them, no checkpoint counts.

    def _get_output_dir(self, trial) -> str:
        """Where checkpoints are written: they appear in the output folder when they are whole."""
        return str(checkpoints.scratch(self.own.output))

    def _save_checkpoint(self, *args, **kwargs) -> None:
        with checkpoints.written(self.own.output, f"checkpoint-{self.state.global_step}"):
            # of a run that was killed
            processes.on_main(shutil.rmtree, checkpoints.scratch(self.own.output), True)
            super()._save_checkpoint(*args, **kwargs)
        self.finish(self.state.global_step)


def build_trainer(
    model,
    corpus,
    args: Namespace,
    checkpoint: Path | None,
    finish: Callable[[int], None] = lambda step: None,
) -> AdapterTrainer:
    """The Trainer of a run that goes on from ``checkpoint``, or from its beginning if that is None.

    ``finish``: see `AdapterTrainer`.

    Raises UsageError under FSDP version 1.
    """
    arguments = training_arguments(
        args,
        blocks=len(corpus.train),
        eval_on_start=checkpoint is None,
        ddp_find_unused_parameters=has_experts(model),  # a step may leave an expert's adapter unused
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or one process would train on all GPUs by DataParallel; there is no public way

    sets = {"held_out": corpus.held_out}
    if corpus.retain is not None:
        sets["retain"] = corpus.retain
    trainer = AdapterTrainer(
        sets,
        args,
        finish,
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=corpus.held_out,
        data_collator=evaluation.collate,
    )
    trainer.remove_callback(PrinterCallback)

    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) < 2:
        raise UsageError("FSDP version 1 shards trained and frozen weights together: set fsdp_version: 2")
    if processes.several():
        set_seed(args.seed, device_specific=True)  # dropout masks of its own: it has blocks of its own
    return trainer
