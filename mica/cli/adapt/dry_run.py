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
    """What the run will write to ``output``, and what is free there, as half a sentence.

    Estimated from the sizes of tensors, with AdamW's two moments: an optimiser with less state needs less.
    Files of an earlier run that will be replaced count as free. On the main process.

    Raises UsageError if it does not fit.
    """
    parts = _to_be_written(model, args)
    if args.output != output and not args.resume:  # a dry run: a GGUF file is not converted there yet
        parts["base"] = _on_disk(args.output, [beside(Path(base.FOLDER), PARTIAL).name])
    needed = sum(parts.values())
    free = _free_space(output, args.overwrite)

    sizes = ", ".join(f"{name} {_size(number)}" for name, number in parts.items() if number)
    text = f"up to {_size(needed)} to be written ({sizes}), {_size(free)} free"
    if needed > free:
        raise UsageError(f"--output {output}: not enough disk space: {text}")
    return text


def _to_be_written(model: PeftModel, args: argparse.Namespace) -> dict[str, int]:
    """Bytes by what they are for."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    adapter = sum(weight.nbytes for weight in weights)
    moments = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    checkpoints = training.KEPT + 1  # a new one is written before an old one is removed
    if args.keep_best:
        checkpoints += 1

    parts = {"checkpoints": checkpoints * (adapter + moments), "adapter": adapter}
    if args.merge:
        parts["merged model"] = _dense_size(model)
    return parts


def _free_space(output: Path, overwrite: bool) -> int:
    """Bytes that are free where ``output`` is or will be, with those of files that the run will replace."""
    replaced = ["checkpoint-*", "adapter_model.*"]
    if overwrite:
        replaced.append("merged")
    place = next(place for place in (output, *output.resolve().parents) if place.exists())
    return shutil.disk_usage(place).free + _on_disk(output, replaced)


def _dense_size(model: PeftModel) -> int:
    """Bytes of the base, as `result.merge` writes it: a quantised one in the dtype that it computes in."""
    total = 0
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            continue
        number = weight.numel()
        packed = getattr(weight, "quant_state", None)  # of bitsandbytes' 4 bits, two in a byte
        if packed is not None:
            number = math.prod(packed.shape)
        dtype = weight.dtype
        if not weight.is_floating_point():
            dtype = model.get_base_model().dtype
        total += number * dtype.itemsize
    return total


def _on_disk(folder: Path, patterns: list[str]) -> int:
    """Bytes of the files, and of those in the folders, whose names match one of the ``patterns``."""
    total = 0
    for pattern in patterns:
        for found in folder.glob(pattern):
            files = [path for path in (found, *found.rglob("*")) if path.is_file()]
            total += sum(file.stat().st_size for file in files)
    return total


def _size(number: int) -> str:
    """Bytes in GiB, from 10 MiB on, else in MiB."""
    if number >= 10 * 2**20:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.2f} MiB"


class _Clock(TrainerCallback):
    """When the training began and each step ended, in s; ends it after the steps that are measured.

    ``first``, ``last``: the run's own steps, by the Trainer: those done before, and all.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = state.global_step
        self.last = state.max_steps
        self.times = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        _wait_for_gpu()
        self.times.append(time.perf_counter())
        if len(self.times) > _STEPS + 1:
            control.should_training_stop = True

    def seconds(self) -> float:
        """Seconds a step; those of the first step if there was no other."""
        first, last = self.measured()
        return (self.times[last] - self.times[first]) / max(1, last - first)

    def measured(self) -> tuple[int, int]:
        """The steps that `seconds` is of: after the first, up to the second. Counted in this session."""
        last = len(self.times) - 1
        first = 1 if last > 1 else 0
        return first, last


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rehearsal(
    model: PeftModel, corpus: Corpus, args: argparse.Namespace, output: Path, checkpoint: Path | None
) -> str:
    """Run the first steps of a run that would write to ``output``; returns lines on what it needs and takes.

    ``args.output``: a folder for this, which is removed afterwards. Every process must call it; ``model`` is
    trained.

    Raises UsageError as `check_disk` does, and what the run would raise at its beginning.
    """
    disk = processes.on_main(check_disk, model, args, output)
    clock = _Clock()
    trainer = training.rehearse(model, corpus, args, checkpoint, clock)

    sets = [blocks for blocks in (corpus.held_out, corpus.retain) if blocks is not None]
    measuring = _seconds_of_measuring(trainer.model, sets, args.batch_size, trainer.args.device)
    number = PartialState().num_processes
    amount = corpus.amount(args, number)
    blocks = amount.blocks_after(clock.last) - amount.blocks_after(clock.first)
    ahead = measurements(clock.first, clock.last, args.eval_steps)
    if checkpoint is None:
        ahead += 1  # before the first step
    seconds = _seconds_of_a_block(clock, amount) * blocks + ahead * measuring

    left = max(0, clock.last - clock.first)
    steps = f"{left:,} of {_sizes(amount)} blocks, {blocks * amount.sequence_length:,} tokens"
    if number > 1:
        steps += f", on {number} processes"
    time_left = tqdm.format_interval(seconds)
    return summary.table(
        [
            *_model_rows(model),
            ("steps", steps),
            ("peak memory", _peak_memory()),
            ("disk", disk),
            ("time", f"{time_left} estimated: {clock.seconds():.3g} s a step, measured"),
            ("", f"and {ahead} measurements of perplexity, {measuring:.3g} s each"),
            ("", f"dry run: nothing was written to {output}"),
        ]
    )


def _model_rows(model: PeftModel) -> list[tuple[str, str]]:
    trained, total = model.get_nb_trainable_parameters()
    counts = mica.fast.explain(model).counts()
    paths = ", ".join(f"{path} {count}" for path, count in counts.items())
    return [
        ("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        ("layers by path", paths),
    ]


def _peak_memory() -> str:
    peak, peak_of = summary.peak_memory()
    if not peak:
        return peak_of
    return f"{_size(peak)} ({peak_of}), measured"


def _seconds_of_a_block(clock: _Clock, amount: Amount) -> float:
    """Seconds of training per block; steps need not all have the same number of them."""
    first, last = clock.measured()
    blocks = amount.blocks_after(clock.first + last) - amount.blocks_after(clock.first + first)
    return clock.seconds() * (last - first) / max(1, blocks)


def _sizes(amount: Amount) -> str:
    """How many blocks the steps have: "8", or "2 to 8"."""
    smallest, largest = amount.step_blocks
    if smallest == largest:
        return str(largest)
    return f"{smallest} to {largest}"


def _seconds_of_measuring(model, sets: list[Dataset], batch_size: int, device: torch.device) -> float:
    """Seconds of one measurement of perplexity: a round of forwards, timed the second time, times the rounds.

    ``sets``: the datasets that are measured.
    """
    size = batch_size * PartialState().num_processes  # blocks of a round
    one_round = Subset(sets[0], range(min(size, len(sets[0]))))
    for _ in range(2):
        _wait_for_gpu()
        begin = time.perf_counter()
        evaluation.likelihood(model, one_round, batch_size, device)
        _wait_for_gpu()
        seconds = time.perf_counter() - begin
    rounds = sum(math.ceil(len(blocks) / size) for blocks in sets)
    return seconds * rounds
