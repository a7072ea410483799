"""What ``mica adapt`` reports and writes at the end: one dictionary, as ``summary.json``, text and card."""

import argparse
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState

import mica.fast
from mica.cli import record
from mica.cli.adapt import config, embeddings, evaluation, fingerprint, global_batch, hub, result, stopping
from mica.cli.adapt.card import card, told
from mica.cli.adapt.corpus import Corpus
from mica.cli.adapt.folder import SUMMARY
from mica.cli.output import PARTIAL, write_json

_LIBRARIES = ("mica-fast", "peft", "transformers", "accelerate", "datasets", "torch")


def peak_memory() -> tuple[int | None, str]:
    """Of this process, in bytes, and what was measured; None where nothing can be."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return None, "not measured"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "resident set of the process"


def _perplexities(done, name: str) -> tuple[float | None, float | None]:
    """Before training and of the adapter that was written; None if not measured."""
    values = stopping.measured(done.history, name)
    return values.get(0), values.get(done.adapter_step)


def of(settings: config.Settings, corpus: Corpus, model, done) -> dict:
    """What summary.json holds: the settings, the data, and what was measured."""
    args, num_processes = settings.args, PartialState().num_processes
    before, after = _perplexities(done, "held_out")
    retain_before, retain_after = _perplexities(done, "retain")
    peak_bytes, peak_of = peak_memory()
    trained, total = model.get_nb_trainable_parameters()
    explanation = mica.fast.explain(model)
    on_peft = [row for row in explanation.rows if row.path == "peft"]
    return {
        "model": args.model,
        "recipe": args.recipe,
        "settings": config.values(settings),
        "origins": settings.origins,
        "sources": [{"name": p.name, "documents": p.documents, "tokens": p.tokens} for p in corpus.parts],
        "blocks": len(corpus.train),
        "steps": done.steps,
        "adapter_step": done.adapter_step,
        "stopped_by": done.stopped_by,
        "epochs": corpus.amount(args, num_processes).epochs(done.tokens),
        "processes": num_processes,
        "processes_from": done.processes_from,
        **done.trained_on,
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
        **dict.fromkeys(("merged", "merge_swallowed", "merge_report")),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def finish(args: argparse.Namespace, model, tokenizer, report: dict) -> None:
    """Write summary and model card; then what may fail without any loss: the merge and the upload."""
    _write_summary(args.output, report)
    text = str(card(report))
    record.claimed(args.output, "README.md", lambda path: path.write_text(text, encoding="utf-8"))
    if args.merge:
        merged = result.merge(model, tokenizer, args, report[fingerprint.BASE])
        report["merged"] = str(args.output / result.MERGED)
        report |= {"merge_swallowed": merged.swallowed, "merge_report": str(merged)}
        _write_summary(args.output, report)
    print(as_text(report), flush=True)
    if args.push_to_hub is not None:
        print(f"uploaded to {hub.push(args.output, args.push_to_hub)}", flush=True)


def _write_summary(output: Path, report: dict) -> None:
    record.claim(output, SUMMARY)
    write_json("--output", output / SUMMARY, report, PARTIAL)


def as_text(summary: dict) -> str:
    """Return ``summary`` (see `of`) as aligned lines for a terminal."""
    s = summary
    paths = ", ".join(f"{path} {count}" for path, count in s["paths"].items())
    reasons = Counter(row["reason"] for row in s["layers_on_peft_path"])
    uncalled = len(s["layers_not_called"])
    several = f", {s['processes']} processes" if s["processes"] > 1 else ""
    if len(s["processes_from"]) > 1:
        several = f", {global_batch.told(s['processes_from'])}"
    tokens = f"{s['training_tokens']:,} tokens, {s['tokens_per_second']:,.0f} tokens/s"
    amount = f"{s['epochs']:.3g} epochs, {tokens}"
    retained = s["retain_before"] and "{retain_before:.2f} -> {retain_after:.2f}".format(**s)
    share = s["trained_parameters"] / s["total_parameters"]
    memory = s["peak_memory_bytes"] and f"{s['peak_memory_bytes'] / 2**30:.2f} GiB ({s['peak_memory_of']})"
    rows = [
        ("model", f"{s['model']} ({s['dtype']}, {s['device']}{several})"),
        ("trained parameters", f"{s['trained_parameters']:,} of {s['total_parameters']:,} ({share:.2%})"),
        ("", s["trained_embeddings"] and f"of these {s['trained_embeddings']:,} of whole embeddings"),
        ("initialisation", f"{s['initialisation_seconds']:.1f} s"),
        ("training", f"{s['training_seconds']:.1f} s, {s['steps']} steps, {amount}"),
        ("peak memory", memory or "not measured"),
        ("held-out perplexity", "{perplexity_before:.2f} -> {perplexity_after:.2f}".format(**s)),
        ("", f"on {s['held_out_tokens']:,} tokens never trained on"),
        ("retained perplexity", retained),
        ("layers by path", paths),
        *(("", f"on PEFT's path, {count}: {reason}") for reason, count in reasons.items()),
        ("", uncalled and f"not called in the last forward: {uncalled}"),
        ("adapter", s["adapter"]),
        ("", told(s)),
        ("merged model", s["merged"]),
        ("", s["merge_report"]),
    ]
    return table(rows)


def table(rows: list[tuple[str, object]]) -> str:
    """Aligned lines of labels and values; those without a value are left out."""
    return "\n".join(f"{label:19}  {value}" for label, value in rows if value)
