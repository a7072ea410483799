"""What ``mica adapt`` reports and writes at the end: one dictionary, as ``summary.json``, text and card."""

import argparse
import sys
from collections import Counter
from importlib.metadata import version

import torch
from accelerate import PartialState
from peft import PeftModel

import mica.fast
from mica.cli.adapt import checkpoints, config, embeddings, evaluation, fingerprint, result, stopping
from mica.cli.adapt.amount import Amount
from mica.cli.adapt.card import card, step_of
from mica.cli.adapt.corpus import Corpus
from mica.cli.adapt.curve import draw
from mica.cli.adapt.folder import SUMMARY
from mica.cli.adapt.training import Training
from mica.cli.output import write_json, write_text
from mica.errors import UsageError

_LIBRARIES = ("mica-fast", "peft", "transformers", "accelerate", "datasets", "torch")


def peak_memory() -> tuple[int | None, str]:
    """The peak memory of this process in bytes, and what was measured; None where nothing can be."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return None, "not measured"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak *= 1024  # KiB there, bytes on macOS
    return peak, "resident set of the process"


def _perplexities(done, name: str) -> tuple[float | None, float | None]:
    """Before training and of the adapter that was written; None if not measured."""
    values = stopping.measured(done.history, name)
    return values.get(0), values.get(done.adapter_step)


def of(settings: config.Settings, corpus: Corpus, model, done: Training) -> dict:
    """What summary.json holds: the settings, the data, and what was measured."""
    args = settings.args
    num_processes = PartialState().num_processes
    before, after = _perplexities(done, "held_out")
    retain_before, retain_after = _perplexities(done, "retain")
    peak_bytes, peak_of = peak_memory()
    trained, total = model.get_nb_trainable_parameters()
    explanation = mica.fast.explain(model)
    on_peft = [row for row in explanation.rows if row.path == "peft"]
    sources = [
        {"name": part.name, "documents": part.documents, "tokens": part.tokens} for part in corpus.parts
    ]
    return {
        "model": args.model,
        "recipe": args.recipe,
        "settings": config.values(settings),
        "sources": sources,
        "blocks": len(corpus.train),
        "steps": done.steps,
        "adapter_step": done.adapter_step,
        "stopped_by": done.stopped_by,
        "epochs": corpus.amount(args, num_processes).epochs(done.tokens),
        "processes": num_processes,
        **done.base,
        "trained_parameters": trained,
        "trained_embeddings": sum(parameter.numel() for parameter in embeddings.trained(model)),
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
        "layers_on_peft_path": [{"name": row.name, "reason": row.reason} for row in on_peft],
        "layers_not_called": [row.name for row in explanation.rows if row.calls == 0],
        "adapter": str(args.output),
        "merged": None,
        "merge_swallowed": None,
        "merge_report": None,
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def finish(args: argparse.Namespace, model, tokenizer, report: dict, history: list[dict]) -> None:
    """Write summary, model card and curve; then what may fail without any loss: the merge.

    ``history``: the Trainer's ``log_history``.

    Raises UsageError if something cannot be written; its message also says what is there.
    """
    try:
        write_json("--output", args.output / SUMMARY, report)
        write_text("--output", args.output / "README.md", str(card(report)))
    except UsageError as error:
        raise UsageError(f"{error}; {checkpoints.saved(args.output)}") from error
    draw(history, args.output)
    if args.merge:
        merged = result.merge(model, tokenizer, args, report[fingerprint.BASE])
        report["merged"] = str(args.output / result.MERGED)
        report["merge_swallowed"] = merged.swallowed
        report["merge_report"] = str(merged)
        write_json("--output", args.output / SUMMARY, report)
    print(as_text(report), flush=True)


def ahead(model: PeftModel, amount: Amount, args: argparse.Namespace) -> str:
    """What a run is going to do, in a line: steps, tokens, trained parameters, and memory.

    The memory is that of weights, gradients and AdamW's two moments.
    """
    steps = amount.steps(args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    number = sum(parameter.numel() for parameter in trained)
    memory = sum(parameter.nbytes for parameter in model.parameters())
    memory += 3 * sum(parameter.nbytes for parameter in trained)
    return (
        f"{steps:,} steps, {amount.tokens_after(steps):,} tokens; {number:,} trained parameters; "
        f"{memory / 2**30:.2f} GiB for weights, gradients and optimiser, and more for activations"
    )


def as_text(summary: dict) -> str:
    """Return ``summary`` (see `of`) as aligned lines for a terminal."""
    rows = [
        *_model_rows(summary),
        *_training_rows(summary),
        *_layer_rows(summary),
        ("adapter", summary["adapter"]),
        ("", step_of(summary)),
        ("merged model", summary["merged"]),
        ("", summary["merge_report"]),
    ]
    return table(rows)


def _model_rows(summary: dict) -> list[tuple[str, object]]:
    where = f"{summary['dtype']}, {summary['device']}"
    if summary["processes"] > 1:
        where += f", {summary['processes']} processes"

    trained = summary["trained_parameters"]
    total = summary["total_parameters"]
    rows = [
        ("model", f"{summary['model']} ({where})"),
        ("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
    ]
    if summary["trained_embeddings"]:
        rows.append(("", f"including {summary['trained_embeddings']:,} in whole embeddings"))
    return rows


def _training_rows(summary: dict) -> list[tuple[str, object]]:
    seconds = summary["training_seconds"]
    tokens = f"{summary['training_tokens']:,} tokens, {summary['tokens_per_second']:,.0f} tokens/s"
    amount = f"{summary['steps']} steps, {summary['epochs']:.3g} epochs, {tokens}"

    memory = "not measured"
    if summary["peak_memory_bytes"]:
        memory = f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB ({summary['peak_memory_of']})"

    rows = [
        ("initialisation", f"{summary['initialisation_seconds']:.1f} s"),
        ("training", f"{seconds:.1f} s, {amount}"),
        ("peak memory", memory),
        ("held-out perplexity", f"{summary['perplexity_before']:.2f} -> {summary['perplexity_after']:.2f}"),
        ("", f"on {summary['held_out_tokens']:,} tokens never trained on"),
    ]
    if summary["retain_before"]:
        retained = f"{summary['retain_before']:.2f} -> {summary['retain_after']:.2f}"
        rows.append(("retained perplexity", retained))
    return rows


def _layer_rows(summary: dict) -> list[tuple[str, object]]:
    paths = ", ".join(f"{path} {count}" for path, count in summary["paths"].items())
    rows = [("layers by path", paths)]
    reasons = Counter(row["reason"] for row in summary["layers_on_peft_path"])
    for reason, count in reasons.items():
        rows.append(("", f"on PEFT's path, {count}: {reason}"))
    uncalled = len(summary["layers_not_called"])
    if uncalled:
        rows.append(("", f"not called in the last forward: {uncalled}"))
    return rows


def table(rows: list[tuple[str, object]]) -> str:
    """Aligned lines of labels and values; those without a value are left out."""
    return "\n".join(f"{label:19}  {value}" for label, value in rows if value)
