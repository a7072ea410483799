"""What ``mica adapt`` reports and writes at the end: one dictionary, as ``summary.json``, text and card."""

from argparse import Namespace
from collections import Counter
from importlib.metadata import version

import torch
from accelerate import PartialState
from peft import PeftModel

import mica.fast
from mica.cli.adapt import checkpoints, config, embeddings, stopping
from mica.cli.adapt.amount import Amount
from mica.cli.adapt.card import card, step_of
from mica.cli.adapt.corpus import Corpus
from mica.cli.adapt.folder import SUMMARY
from mica.cli.adapt.training import Training
from mica.cli.output import write_json, write_unless_edited
from mica.errors import UsageError

_LIBRARIES = ("mica-fast", "peft", "transformers", "accelerate", "datasets", "torch")


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
    trained, total = model.get_nb_trainable_parameters()
    explanation = mica.fast.explain(model)
    on_peft = [row for row in explanation.rows if row.path == "peft"]
    return {
        "model": args.model,
        "settings": config.values(settings),
        "sources": [part._asdict() for part in corpus.parts],
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
        "peak_memory_bytes": torch.cuda.max_memory_allocated() or None,  # on a GPU
        "perplexity_before": before,
        "perplexity_after": after,
        "held_out_blocks": len(corpus.held_out),
        "retain_before": retain_before,
        "retain_after": retain_after,
        "layers": explanation.totals(),
        "paths": dict(explanation.counts()),
        "layers_on_peft_path": [{"name": row.name, "reason": row.reason} for row in on_peft],
        "adapter": str(args.output),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def finish(args: Namespace, report: dict) -> None:
    """Write summary and model card.

    Raises UsageError if something cannot be written; its message also says what is there.
    """
    try:
        write_json("--output", args.output / SUMMARY, report)
        write_unless_edited("--output", args.output / "README.md", str(card(report)))
    except UsageError as error:
        raise UsageError(f"{error}; {checkpoints.saved(args.output)}") from error
    print(as_text(report), flush=True)


def ahead(model: PeftModel, amount: Amount) -> str:
    """What a run is going to do, in a line: steps, tokens, epochs, trained parameters, and memory.

    The memory is that of weights, gradients and AdamW's two moments.
    """
    steps = amount.steps
    tokens = amount.tokens_after(steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    number = sum(parameter.numel() for parameter in trained)
    memory = sum(parameter.nbytes for parameter in model.parameters())
    memory += 3 * sum(parameter.nbytes for parameter in trained)
    return (
        f"{steps:,} steps, {tokens:,} tokens, {amount.epochs(tokens):.3g} epochs; "
        f"{number:,} trained parameters; "
        f"{memory / 2**30:.2f} GiB for weights, gradients and optimiser, and more for activations"
    )


def as_text(summary: dict) -> str:
    """Return ``summary`` (see `of`) as aligned lines for a terminal."""
    trained = summary["trained_parameters"]
    total = summary["total_parameters"]
    tokens = f"{summary['training_tokens']:,} tokens, {summary['tokens_per_second']:,.0f} tokens/s"
    retained = None
    if summary["retain_before"] is not None:
        retained = f"{summary['retain_before']:.2f} -> {summary['retain_after']:.2f}"
    rows = [
        ("model", f"{summary['model']} ({summary['dtype']}, {summary['device']})"),
        ("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        ("initialisation", f"{summary['initialisation_seconds']:.1f} s"),
        ("training", f"{summary['training_seconds']:.1f} s, {summary['epochs']:.3g} epochs, {tokens}"),
        ("held-out perplexity", f"{summary['perplexity_before']:.2f} -> {summary['perplexity_after']:.2f}"),
        ("retained perplexity", retained),
        ("layers by path", summary["layers"]),
    ]
    reasons = Counter(row["reason"] for row in summary["layers_on_peft_path"])
    rows += [("", f"on PEFT's path, {count}: {reason}") for reason, count in reasons.items()]
    rows += [
        ("adapter", summary["adapter"]),
        ("", step_of(summary)),
    ]
    if summary["perplexity_after"] > summary["perplexity_before"]:
        rate = summary["settings"]["learning_rate"]
        rows.append(("", f"held-out perplexity has risen: try a lower --learning-rate (now {rate:g})"))
    return "\n".join(f"{label:19}  {value}" for label, value in rows if value)
