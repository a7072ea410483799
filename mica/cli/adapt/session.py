"""The order of ``mica adapt``: checks, data, base, adapter, training, and what is written at the end."""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import PartialState

import mica.fast
from mica.cli.adapt import (
    base,
    card,
    checkpoints,
    config,
    curve,
    evaluation,
    fingerprint,
    folder,
    hub,
    processes,
    result,
    signals,
    summary,
    training,
)
from mica.cli.adapt.adapter import check as check_adapter
from mica.cli.adapt.adapter import start
from mica.cli.adapt.config import Settings
from mica.cli.adapt.corpus import Corpus, check, gather
from mica.cli.adapt.packing import keeps_documents_apart
from mica.cli.loading import (
    Source,
    check_backend,
    check_limits,
    find_source,
    load_tokenizer,
    quieten_libraries,
    skeleton,
    suit_processor,
)
from mica.cli.output import dtype_name
from mica.cli.targets import has_experts
from mica.errors import UsageError

_HIGH = 0.1  # a learning rate


def adapt(settings: Settings) -> int:
    """Train and write what the settings say; returns the exit status. Every process calls this.

    Raises UsageError for bad input, in one of the processes only.
    """
    quieten_libraries()
    processes.start()
    try:
        with processes.errors_once(), signals.at_once():
            return _adapt(settings)
    finally:
        processes.finish()


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


def _note(text: str) -> None:
    if PartialState().is_main_process:
        print(f"mica adapt: note: {text}", file=sys.stderr, flush=True)


def _adapt(settings: Settings) -> int:
    args = settings.args
    source = find_source(args.model, args.trust_remote_code)
    _note_what_is_odd(args)
    check_backend(args.rank)
    training.check(args)
    if args.push_to_hub is not None:
        hub.check(args.push_to_hub)
    checkpoint = _find_checkpoint(args)

    check(args)  # the texts: cheap, before the tokenizer
    tokenizer = load_tokenizer(source)
    if checkpoint is not None:  # before texts and weights are read; one that is not here yet: in `train`
        location = base.converted(args).location if source.is_gguf else source.location
        checkpoints.check(checkpoint, **fingerprint.facts(location))
    base.check(args, source)
    model = skeleton(source)
    if model is not None:  # else the same is checked once the model is loaded
        check_limits(source, model, args.sequence_length)
        _with_experts(settings, model)
        check_adapter(model, args, checkpoint)
    corpus = gather(args, tokenizer)
    _say(corpus.describe(args, PartialState().num_processes))
    with ExitStack() as stack:
        processes.on_main(stack.enter_context, folder.held(args.output))
        return _run(settings, source, tokenizer, corpus, checkpoint)


def _run(settings: Settings, source: Source, tokenizer, corpus: Corpus, checkpoint: Path | None) -> int:
    """From the base model to the adapter; nothing else writes to the output folder meanwhile."""
    args = settings.args
    model = base.load(args, source, PartialState().device, tokenizer)
    note = suit_processor(model, args.dtype)
    if note:
        _note(note)
    check_limits(source, model, args.sequence_length, corpus.largest_token_id)
    corpus = _with_packing(settings, corpus, model, tokenizer)
    _with_experts(settings, model)
    if has_experts(model) and not args.experts:
        _note("the experts are not adapted, unless --target-modules names them; --experts adapts all")
    facts = {
        "model_type": model.config.model_type,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
    }

    begin = time.perf_counter()
    model = start(model, args, checkpoint)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    initialisation_seconds = time.perf_counter() - begin
    processes.on_main(_prepare, settings)
    _say(config.describe(settings))

    def watch(history):
        curve.write_curve(history, args.output)

    done = training.train(model, corpus, args, checkpoint, tokenizer, watch)
    if done.interrupted:
        _say(f"Stopped at step {done.steps:,}. To go on: mica adapt --output {args.output} --resume")
        return signals.status(done.interrupted)
    facts["initialisation_seconds"] = initialisation_seconds
    report = _report(settings, corpus, model, done) | facts
    processes.on_main(_finish, settings, model, tokenizer, report)
    return 0


def _note_what_is_odd(args: argparse.Namespace) -> None:
    if args.learning_rate > _HIGH:
        _note(f"--learning-rate {args.learning_rate:g}: very high; published for MiCA are 5e-4 to 2e-3")
    recorded = args.config and config.recorded_processes(args.config)
    number = PartialState().num_processes
    if recorded and recorded != number:
        _note(
            f"{args.config} is of a run on {recorded} processes, and this one has {number}: its batches of "
            f"{args.batch_size} blocks a process are others, and so are its losses"
        )


def _find_checkpoint(args: argparse.Namespace) -> Path | None:
    """`training.find_checkpoint`; None too for a run that ended before its first checkpoint."""
    newest = checkpoints.latest(args.output) if args.resume else None
    if args.resume and newest is None and (args.output / config.FILE).is_file():
        _note(f"{args.output} has no complete checkpoint yet: the run starts from its beginning")
        return None
    checkpoint = training.find_checkpoint(args)
    if checkpoint != newest:
        _note(
            f"{newest.name} is damaged ({checkpoints.damaged(newest)} is not what was written): the run goes "
            f"on from {checkpoint.name}"
        )
    return checkpoint


def _with_packing(settings: Settings, corpus: Corpus, model, tokenizer) -> Corpus:
    """``corpus``, or one in stream packing where the model cannot keep documents apart.

    Raises UsageError if the option was given: attention across documents is another training.
    """
    args = settings.args
    if args.packing == "stream" or keeps_documents_apart(model):
        return corpus
    reason = f"the attention of {type(model).__name__} does not stay within a document of a block"
    if settings.origins["packing"] != "default":
        raise UsageError(f"--packing documents: {reason}; --packing stream lets it cross them")
    _note(f"packing is stream: {reason}")
    args.packing, settings.origins["packing"] = "stream", "the model"
    return gather(args, tokenizer)


def _with_experts(settings: Settings, model) -> None:
    """Take back a recipe's ``experts`` where there are none.

    Raises UsageError if the option was given.
    """
    args = settings.args
    if not has_experts(model):
        if args.experts is not None and not settings.origins["experts"].startswith("recipe"):
            raise UsageError(
                f"--{'' if args.experts else 'no-'}experts: {type(model).__name__} has no experts"
            )
        args.experts = None


def _prepare(settings: Settings) -> None:
    """Empty the output folder of what an earlier run left there, and write run.yaml."""
    args = settings.args
    if args.overwrite:
        folder.clear(args.output, keep=base.FOLDER if args.model.endswith(".gguf") else "")
    config.write(settings, args.output, PartialState().num_processes)


def _report(settings: Settings, corpus: Corpus, model, done: training.Training) -> dict:
    """What summary.json holds: the settings, the data, and what was measured."""
    args = settings.args
    num_processes = PartialState().num_processes
    before, after = summary.perplexities(done.history, "held_out")
    retain_before, retain_after = summary.perplexities(done.history, "retain")
    peak_bytes, peak_of = summary.peak_memory()
    trained, total = model.get_nb_trainable_parameters()
    explanation = mica.fast.explain(model)
    return {
        "model": args.model,
        "recipe": args.recipe,
        "settings": config.values(settings),
        "origins": settings.origins,
        "sources": [
            {"name": part.name, "documents": part.documents, "tokens": part.tokens} for part in corpus.parts
        ],
        "blocks": len(corpus.train),
        "steps": done.steps,
        "epochs": corpus.epochs(args, num_processes),
        "processes": num_processes,
        "trained_parameters": trained,
        "total_parameters": total,
        "training_seconds": done.seconds,
        "training_tokens": done.tokens,
        "tokens_per_second": done.tokens / done.seconds,
        "training_loss": done.loss,
        "peak_memory_bytes": peak_bytes,
        "peak_memory_of": peak_of,
        "perplexity_before": before,
        "perplexity_after": after,
        "held_out_tokens": evaluation.predicted_tokens(corpus.held_out),
        "retain_before": retain_before,
        "retain_after": retain_after,
        "paths": dict(explanation.counts()),
        "layers_on_peft_path": [
            {"name": row.name, "reason": row.reason} for row in explanation.rows if row.path == "peft"
        ],
        "layers_not_called": [row.name for row in explanation.rows if row.calls == 0],
        "adapter": str(args.output),
        "merged": None,
        "merge_swallowed": None,
        "merge_report": None,
        "versions": summary.versions(),
    }


def _finish(settings: Settings, model, tokenizer, report: dict) -> None:
    """Write summary and model card; then what may fail without any loss: the merge and the upload."""
    args = settings.args
    summary.write(report, args.output)
    card.write_card(card.card(report), args.output)
    if args.merge:
        merged = result.merge(model, tokenizer, args)
        report |= {
            "merged": str(args.output / result.MERGED),
            "merge_swallowed": merged.swallowed,
            "merge_report": str(merged),
        }
        summary.write(report, args.output)
    _say(summary.as_text(report))
    if args.push_to_hub is not None:
        _say(f"uploaded to {hub.push(args.output, args.push_to_hub)}")
