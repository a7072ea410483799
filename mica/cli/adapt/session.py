"""The order of ``mica adapt``: checks, data, base, adapter, training, and what is written at the end."""

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mica.cli import loading
from mica.cli.adapt import (
    adapter,
    base,
    config,
    corpus,
    folder,
    processes,
    run_yaml,
    summary,
    training,
)
from mica.cli.adapt.config import Settings
from mica.cli.folder import exclusive, undo_on_error
from mica.cli.output import dtype_name, tell, write_text, write_unless_edited
from mica.cli.targets import has_experts
from mica.errors import UsageError
from mica.fast import checkpointing


class Inputs(NamedTuple):
    """What a run reads before the weights of its base; see `read`."""

    source: loading.Source
    tokenizer: PreTrainedTokenizerBase
    data: corpus.Corpus
    checkpoint: Path | None


def adapt(settings: Settings) -> int:
    """Train and write what the settings say; returns the exit status. Every process calls this.

    What is printed on standard output is the main process's: `processes.start` silences the others.

    Raises UsageError for bad input, in one of the processes only.
    """
    loading.quieten_libraries()
    processes.start()
    # SIGTERM unwinds the stack as Ctrl-C does, so that locks and temporary files go.
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        with processes.one_voice():
            return _adapt(settings)
    finally:
        signal.signal(signal.SIGTERM, before)
        processes.finish()


def note(text: str) -> None:
    """Say something on standard error, in the main process."""
    if PartialState().is_main_process:
        tell(f"mica: note: {text}")


def _adapt(settings: Settings) -> int:
    """The run. Nothing about the output folder is decided before it is locked."""
    args = settings.args
    with ExitStack() as stack:
        processes.on_main(stack.enter_context, exclusive(args.output))
        with ExitStack() as checks:  # what they refuse leaves nothing
            processes.on_main(checks.enter_context, undo_on_error(args.output))
            processes.on_main(folder.check, args)
            inputs = read(settings)
            if not args.resume:
                processes.on_main(_write_settings, settings)  # says what this folder is, from now on
            model, data, facts = _loaded(settings, inputs)
            session = training.Session(model, data, args, inputs.checkpoint)
        processes.on_main(_write_settings, settings)
        print(summary.ahead(model, data.amount(args, PartialState().num_processes)), flush=True)

        done = session.train(inputs.tokenizer)
        if args.memory is not None:
            print(checkpointing.summary(), flush=True)
        if done.interrupted:
            print(
                f"Stopped at step {done.steps:,}. To continue: mica adapt --output {args.output} --resume",
                flush=True,
            )
            return 128 + done.interrupted
        report = summary.of(settings, data, model, done) | facts
        processes.on_main(summary.finish, args, report)
    return 0


def _write_settings(settings: Settings) -> None:
    args = settings.args
    write = write_unless_edited if args.resume else write_text
    write("--output", args.output / folder.SETTINGS, run_yaml.as_yaml(config.values(settings)))


def read(settings: Settings) -> Inputs:
    """Check and read everything that comes before the weights, the cheapest first; every process calls this.

    Raises UsageError for what is wrong with options, texts, tokenizer or the model's configuration.
    """
    args = settings.args
    source = loading.find_source(args.model, args.trust_remote_code)
    loading.check_backend(args.rank)
    training.check(args)
    checkpoint = training.find_checkpoint(args, note)

    corpus.check(args)
    tokenizer = loading.load_tokenizer(source)
    base.check(args, source)
    _check_outline(settings, source, checkpoint)
    data = corpus.gather(args, tokenizer)
    print(data.describe(), flush=True)
    return Inputs(source, tokenizer, data, checkpoint)


def _check_outline(settings: Settings, source: loading.Source, checkpoint: Path | None) -> None:
    """Check what the model's configuration shows without weights; where it shows nothing, `_loaded` does."""
    model = loading.skeleton(source)
    if model is None:
        return
    loading.check_limits(source, model, settings.args.sequence_length)
    _drop_needless_experts(settings, model)
    adapter.check(model, settings.args, checkpoint)


def suited(settings: Settings, inputs: Inputs, model) -> corpus.Corpus:
    """The data as ``model`` takes it; its dtype becomes one that suits the processor. Notes say what changed.

    Raises UsageError if the model cannot take the tokens.
    """
    args = settings.args
    precision = loading.suit_processor(model, args.dtype)
    loading.check_limits(inputs.source, model, args.sequence_length, inputs.data.largest_token_id)
    data, packing = corpus.suited(inputs.data, settings, model, inputs.tokenizer)
    for text in (precision, packing):
        if text is not None:
            note(text)
    _drop_needless_experts(settings, model)
    return data


def _loaded(settings: Settings, inputs: Inputs) -> tuple[PeftModel, corpus.Corpus, dict[str, Any]]:
    """The model with its adapter, the data as this model takes it, and facts for the summary."""
    args = settings.args
    model = base.load(args, inputs.source, PartialState().device, inputs.tokenizer)
    begins_with_adapter = args.adapter is not None and inputs.checkpoint is None
    if begins_with_adapter and not base.is_trained_on(args.adapter, model.name_or_path):
        note(f"--adapter {args.adapter}: is not known to be trained on the weights of --model {args.model}")
    data = suited(settings, inputs, model)
    if has_experts(model) and not args.experts:
        note("the experts are not adapted, unless --target-modules names them; --experts adapts all")
    facts = {"dtype": dtype_name(model.dtype), "device": str(model.device)}

    begin = time.perf_counter()
    model = adapter.start(model, args, inputs.checkpoint)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    facts["initialisation_seconds"] = time.perf_counter() - begin
    return model, data, facts


def _drop_needless_experts(settings: Settings, model) -> None:
    """Take back a recipe's ``experts`` where there are none.

    Raises UsageError if the option was given.
    """
    if has_experts(model):
        return
    if settings.args.experts and "experts" in settings.given:
        raise UsageError(f"--experts: {type(model).__name__} has no experts")
    settings.args.experts = None
