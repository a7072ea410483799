"""The order of ``mica adapt``: checks, data, base, adapter, training, and what is written at the end."""

import argparse
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from mica.cli import loading
from mica.cli.adapt import (
    adapter,
    base,
    checkpoints,
    config,
    corpus,
    folder,
    processes,
    result,
    summary,
    trained_on,
    training,
)
from mica.cli.adapt.config import Settings
from mica.cli.adapt.curve import write_curve
from mica.cli.adapt.dry_run import check_disk, rehearsal
from mica.cli.adapt.fingerprint import facts as facts_of
from mica.cli.adapt.global_batch import history, told
from mica.cli.adapt.hub import check as check_hub
from mica.cli.adapt.packing import keeps_documents_apart
from mica.cli.output import dtype_name
from mica.cli.targets import has_experts
from mica.errors import UsageError

_HIGH = 0.1  # a learning rate


def adapt(settings: Settings) -> int:
    """Train and write what the settings say; returns the exit status. Every process calls this.

    Raises UsageError for bad input, in one of the processes only.
    """
    loading.quieten_libraries()
    processes.start()
    # As Ctrl-C: what is held is let go
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        with processes.one_voice():
            return _adapt(settings)
    finally:
        signal.signal(signal.SIGTERM, before)
        processes.finish()


def _say(text: str, stream=None) -> None:
    if PartialState().is_main_process:
        print(text, file=stream, flush=True)


def _note(text: str) -> None:
    _say(f"mica adapt: note: {text}", sys.stderr)


def _adapt(settings: Settings) -> int:
    """The run: where it writes, nothing is decided before the output folder is locked."""
    args = settings.args
    with ExitStack() as stack:
        if args.dry_run:
            scratch = processes.on_main(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
            return _decided(settings, Path(scratch))
        processes.on_main(stack.enter_context, folder.held(args.output))
        processes.on_main(_check_again, settings)
        return _decided(settings)


def _check_again(settings: Settings) -> None:
    """Under the lock, what was decided before it: another run may have written to the folder meanwhile.

    Raises UsageError if it must not or cannot go on.
    """
    config.check_output(settings)
    if settings.args.resume and config.recorded_text(settings.args.output) != settings.recorded:
        what = f"{folder.SETTINGS} has changed since this command began: start it again"
        raise UsageError(f"--resume: {settings.args.output / folder.SETTINGS}: {what}")


def _decided(settings: Settings, scratch: Path | None = None) -> int:
    """All that is checked and read before the model, and then the run, or with ``scratch`` a dry run."""
    args = settings.args
    source = loading.find_source(args.model, args.trust_remote_code)
    _note_what_is_odd(args)
    loading.check_backend(args.rank)
    training.check(args)
    if args.push_to_hub is not None:
        check_hub(args.push_to_hub)
    processes.check_shared(args.output)
    checkpoint = training.find_checkpoint(args, _note)

    for group in corpus.check(args):  # the texts: cheap, before the tokenizer
        for text in group:
            if text.left_out:
                _note(f"{text.option} {text.given}: --output {args.output} is in it, and is left out")
    tokenizer = loading.load_tokenizer(source)
    if checkpoint is not None:  # before texts and weights are read; one that is not here yet: in `train`
        location = base.converted(args).location if source.is_gguf else source.location
        checkpoints.check(checkpoint, **facts_of(location))
    base.check(args, source)
    model = loading.skeleton(source)
    if model is not None:  # else the same is checked once the model is loaded
        loading.check_limits(source, model, args.sequence_length)
        _with_experts(settings, model)
        adapter.check(model, args, checkpoint)
    data = corpus.gather(args, tokenizer)
    processes.alike(data.fingerprint, "the texts")  # other machines have their own copies
    _say(data.describe(args, PartialState().num_processes))
    if cost := data.cost():
        _note(cost)
    if scratch is not None:
        return _dry_run(scratch, settings, source, tokenizer, data, checkpoint)
    return _run(settings, source, tokenizer, data, checkpoint)


def _loaded(
    settings: Settings,
    source,
    tokenizer,
    data: corpus.Corpus,
    checkpoint: Path | None,
    output: Path | None = None,
):
    """The model with its adapter, the data as this model takes it, and facts for the summary.

    ``output``: as `corpus.gather` has it.
    """
    args = settings.args
    model = base.load(args, source, PartialState().device, tokenizer)
    if args.adapter is not None and checkpoint is None:
        _note_another_base(args.adapter, args.model, model.name_or_path)
    if note := loading.suit_processor(model, args.dtype):
        _note(note)
    loading.check_limits(source, model, args.sequence_length, data.largest_token_id)
    data = _with_packing(settings, data, model, tokenizer, output)
    _with_experts(settings, model)
    if has_experts(model) and not args.experts:
        _note("the experts are not adapted, unless --target-modules names them; --experts adapts all")
    facts = {"model_type": model.config.model_type, "dtype": dtype_name(model.dtype)}
    facts["device"] = str(model.device)

    begin = time.perf_counter()
    model = adapter.start(model, args, checkpoint)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    facts["initialisation_seconds"] = time.perf_counter() - begin
    return model, data, facts


def _dry_run(scratch: Path, settings: Settings, *run) -> int:
    """The first steps of a run, with ``scratch`` for its output folder."""
    output, settings.args.output = settings.args.output, scratch
    model, data, _ = _loaded(settings, *run, output)
    report = rehearsal(model, data, settings.args, output, run[-1])
    settings.args.output = output
    _say(f"{config.describe(settings)}\n{report}")
    return 0


def _run(settings: Settings, source, tokenizer, data: corpus.Corpus, checkpoint: Path | None) -> int:
    """From the base model to the adapter."""
    args = settings.args
    model, data, facts = _loaded(settings, source, tokenizer, data, checkpoint)
    processes.on_main(check_disk, model, args, args.output)

    def begin():
        processes.on_main(_begin, settings, tokenizer, checkpoint)
        _say(config.describe(settings))

    watch = partial(write_curve, output=args.output)
    done = training.train(model, data, args, checkpoint, tokenizer, watch, begin)
    if done.interrupted:
        _say(f"Stopped at step {done.steps:,}. To continue: mica adapt --output {args.output} --resume")
        return 128 + done.interrupted
    report = summary.of(settings, data, model, done) | facts
    if args.keep_best and report["perplexity_after"] >= report["perplexity_before"]:
        _note("no measured step has a lower held-out perplexity than the model had before training")
    processes.on_main(summary.finish, settings.args, model, tokenizer, report)
    return 0


def _note_what_is_odd(args: argparse.Namespace) -> None:
    if args.learning_rate > _HIGH:
        _note(f"--learning-rate {args.learning_rate:g}: very high; published for MiCA are 5e-4 to 2e-3")
    recorded = args.config and config.recorded_processes(args.config)
    number = PartialState().num_processes
    if recorded and recorded != number:
        _note(
            f"{args.config} comes from a run on {recorded} processes, and this one has {number}: its batches "
            f"of {args.batch_size} blocks per process differ, and so will its losses"
        )


def _note_another_base(folder: Path, model: str, location: str) -> None:
    """Say where the adapter in ``folder`` was not, or perhaps not, trained on the weights at ``location``."""
    is_same = trained_on.is_base(folder, location)
    if is_same is None:
        _note(
            f"--adapter {folder}: whether it was trained on the weights of --model {model} cannot be checked"
        )
    elif not is_same:
        what = f"was trained on other weights than those of --model {model}"
        _note(f"--adapter {folder}: {what}, and its B holds the minor directions of those")


def _with_packing(settings: Settings, data: corpus.Corpus, model, tokenizer, output) -> corpus.Corpus:
    """``data``, or one in stream packing where the model cannot keep documents apart.

    Raises UsageError if the option was given: attention across documents is another training.
    """
    args = settings.args
    if args.packing == "stream" or keeps_documents_apart(model):
        return data
    reason = f"the attention of {type(model).__name__} does not stay within a document of a block"
    if settings.origins["packing"] != "default":
        raise UsageError(f"--packing documents: {reason}; --packing stream lets it cross them")
    _note(f"packing is stream: {reason}")
    args.packing, settings.origins["packing"] = "stream", "the model"
    return corpus.gather(args, tokenizer, output)


def _with_experts(settings: Settings, model) -> None:
    """Take back a recipe's ``experts`` where there are none.

    Raises UsageError if the option was given.
    """
    given = settings.args.experts
    if has_experts(model):
        return
    if given is not None and not settings.origins["experts"].startswith("recipe"):
        raise UsageError(f"--{'' if given else 'no-'}experts: {type(model).__name__} has no experts")
    settings.args.experts = None


def _begin(settings: Settings, tokenizer, checkpoint: Path | None) -> None:
    """Make the output folder that of this run: nothing refuses it any more."""
    args = settings.args
    number = PartialState().num_processes
    shared = history(checkpoint, number)
    note = f"; {told(shared)}" if len(shared) > 1 else ""
    text = config.as_yaml(settings, number, note)
    folder.begin(
        args.output,
        text,
        settings.origins,
        names=[*config.folders(args), *result.names(tokenizer)],
        resume=args.resume,
    )
