"""Before an hour is spent: the disk that a run needs, and ``--dry-run``, which does the run's first steps."""

import argparse
import math
import shutil
import time
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from torch.utils.data import Dataset, Subset
from tqdm import tqdm
from transformers import TrainerCallback

import mica.fast
from mica.cli.adapt import base, evaluation, processes, summary, training
from mica.cli.adapt.amount import Amount, measurements
from mica.cli.adapt.corpus import Corpus
from mica.cli.output import PARTIAL, beside
from mica.errors import UsageError

_STEPS = 3  # measured, after one in which caches fill


def check_disk(model: PeftModel, args: argparse.Namespace, output: Path) -> str:
    """What the run will write to ``output``, beside what is free there; of its own earlier files less.

    A model of it by the sizes of tensors, with AdamW's two moments: an optimiser with less state needs less.
    On the main process.

    Raises UsageError if it does not fit.
    """
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    size = sum(weight.nbytes for weight in adapter)
    moments = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    kept = training.KEPT + 1 + bool(args.keep_best)  # one more is written
    parts = {"checkpoints": kept * (size + moments), "adapter": size}
    if args.merge:
        parts["merged model"] = _dense_size(model)
    if args.output != output and not args.resume:  # a dry run: a GGUF file is not converted there yet
        parts["base"] = _on_disk(args.output, [beside(Path(base.FOLDER), PARTIAL).name])
    place = next(place for place in (output, *output.resolve().parents) if place.exists())
    replaced = _on_disk(output, ["checkpoint-*", "adapter_model.*", *["merged"] * args.overwrite])
    free, needed = shutil.disk_usage(place).free + replaced, sum(parts.values())
    text = ", ".join(f"{name} {_gib(number)}" for name, number in parts.items() if number)
    text = f"up to {_gib(needed)} to be written ({text}), {_gib(free)} free"
    if needed > free:
        raise UsageError(f"--output {output}: not enough space on the disk: {text}")
    return text


def _dense_size(model: PeftModel) -> int:
    """Bytes of the base, as `result.merge` writes it: a quantised one in the dtype that it computes in."""
    total = 0
    for name, weight in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            state = getattr(weight, "quant_state", None)  # of bitsandbytes' 4 bits, two in a byte
            dtype = weight.dtype if weight.is_floating_point() else model.get_base_model().dtype
            total += (weight.numel() if state is None else math.prod(state.shape)) * dtype.itemsize
    return total


def _on_disk(folder: Path, patterns: list[str]) -> int:
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return sum(file.stat().st_size for path in found for file in (path, *path.rglob("*")) if file.is_file())


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**20 * 10 else f"{number / 2**20:.2f} MiB"


class _Clock(TrainerCallback):
    """When the training began and each step ended, in s; ends it after the steps that are measured.

    ``first``, ``last``: the run's own steps, by the Trainer: done before, and in all.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.last, self.times = state.global_step, state.max_steps, [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        _wait()
        self.times.append(time.perf_counter())
        control.should_training_stop |= len(self.times) > _STEPS + 1

    def seconds(self) -> float:
        """Of a step; of the first, if there was no other."""
        first, last = self.measured()
        return (self.times[last] - self.times[first]) / max(1, last - first)

    def measured(self) -> tuple[int, int]:
        """The steps that `seconds` is of: after the first, up to the second. Counted in this session."""
        last = len(self.times) - 1
        return (1 if last > 1 else 0), last


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rehearsal(
    model: PeftModel, corpus: Corpus, args: argparse.Namespace, output: Path, checkpoint: Path | None
) -> str:
    """Do the first steps of a run that would write to ``output``; what it would need and take, as lines.

    ``args.output``: a folder for this, which is removed afterwards. Every process must call it; ``model`` is
    trained.

    Raises UsageError as `check_disk`, and what the run would raise at its beginning.
    """
    disk = processes.on_main(check_disk, model, args, output)
    clock, number = _Clock(), PartialState().num_processes
    trainer = training.rehearse(model, corpus, args, checkpoint, clock)
    sets = [blocks for blocks in (corpus.held_out, corpus.retain) if blocks is not None]
    measuring = _seconds_of_measuring(trainer.model, sets, args.batch_size, trainer.args.device)
    amount = corpus.amount(args, number)
    left = max(0, clock.last - clock.first)
    blocks = amount.blocks_after(clock.last) - amount.blocks_after(clock.first)
    ahead = measurements(clock.first, clock.last, args.eval_steps) + (checkpoint is None)
    seconds = _seconds_of_a_block(clock, amount) * blocks + ahead * measuring
    peak, peak_of = summary.peak_memory()
    trained, total = model.get_nb_trainable_parameters()
    paths = mica.fast.explain(model).counts().items()
    return summary.table(
        [
            ("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
            ("layers by path", ", ".join(f"{path} {count}" for path, count in paths)),
            (
                "steps",
                f"{left:,} of {_sizes(amount)} blocks, {blocks * amount.sequence_length:,} tokens"
                + f", on {number} processes" * (number > 1),
            ),
            ("peak memory", f"{_gib(peak)} ({peak_of}), measured" if peak else peak_of),
            ("disk", disk),
            ("time", f"{tqdm.format_interval(seconds)} estimated: {clock.seconds():.3g} s a step, measured"),
            ("", f"and {ahead} measurements of perplexity, {measuring:.3g} s each"),
            ("", f"dry run: nothing was written to {output}"),
        ]
    )


def _seconds_of_a_block(clock: _Clock, amount: Amount) -> float:
    """What training on one block takes: steps need not have as many of them as each other."""
    first, last = clock.measured()
    blocks = amount.blocks_after(clock.first + last) - amount.blocks_after(clock.first + first)
    return clock.seconds() * (last - first) / max(1, blocks)


def _sizes(amount: Amount) -> str:
    """How many blocks the steps have: "8", or "2 to 8"."""
    smallest, largest = amount.step_blocks
    return str(largest) if smallest == largest else f"{smallest} to {largest}"


def _seconds_of_measuring(model, sets: list[Dataset], batch_size: int, device) -> float:
    """What one measurement of perplexity takes: a round of forwards, the second one, times their number."""
    size = batch_size * PartialState().num_processes
    for _ in range(2):
        _wait()
        begin = time.perf_counter()
        evaluation.likelihood(model, Subset(sets[0], range(min(size, len(sets[0])))), batch_size, device)
        _wait()
        seconds = time.perf_counter() - begin
    return seconds * sum(math.ceil(len(blocks) / size) for blocks in sets)
