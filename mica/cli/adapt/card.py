"""The model card of a run: README.md of OUTPUT, from its summary and nothing else."""

import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mica.cli.adapt.options import OPTIONS
from mica.cli.output import markdown_table, shown

_PAPER = "https://arxiv.org/abs/2604.01694"
_FILES = {".gguf", ".txt", ".json", ".jsonl", ".csv", ".parquet", ".gz"}
_TRAINED = """\
An adapter for {base}, made by continued pretraining on {training_tokens:,} tokens with [MiCA]({paper}). \
MiCA adds `s·B·A` to an adapted weight `W`: `B` holds the {rank} left singular vectors of `W` with the \
smallest singular values and stays frozen, `A` starts at zero and is trained. {trained_parameters:,} of \
{total_parameters:,} parameters were trained."""
_EMBEDDINGS = (
    "{trained_embeddings:,} of these are the input and output embeddings, trained as whole modules "
    "(PEFT's `modules_to_save`)."
)
_TRANSFERRED = """\
{there} with the update of a [MiCA]({paper}) adapter merged into its weights: the `s·B·A` of {update}{on} \
with rank {rank} and alpha {alpha}, in {layers} layers. The update was trained on that model and not on this \
one. Tokenizer and chat template are this one's."""
_HERE = "  # the path of this folder"
_LOAD = """\
```python
{imports}

model = {kind}.from_pretrained({where}){note}
tokenizer = AutoTokenizer.from_pretrained({where})
```"""
_LOAD_ON = """\
{when}:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {where})
```"""


def hub_name(name: str | None) -> str | None:
    """``name`` where it is one of the hub, as owner/name; None for a path or a file."""
    if not name or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return None
    path = Path(name)
    if path.exists() or path.suffix.lower() in _FILES:
        return None
    return name


def _public(name: str) -> str:
    """``name`` of a model or text as code, without the folders of this machine: no card must tell those."""
    return f"`{shown(hub_name(name) or Path(name).name or name)}`"


def card(summary: dict) -> ModelCard:
    """The card of an adapter; ``summary`` is that of ``summary.json`` (see `summary.of`).

    Its metadata has what the hub reads: base_model and datasets only where these are names of the hub, which
    refuses others; the measured perplexities as model-index.
    """
    settings = summary["settings"]
    name = shown(Path(summary["adapter"]).name)
    trained = _TRAINED.format(**summary, base=_public(summary["model"]), paper=_PAPER, rank=settings["rank"])
    sections = [trained]
    if summary["trained_embeddings"]:
        sections.append(_EMBEDDINGS.format(**summary))

    perplexities = _perplexities(summary)
    if perplexities:
        sections += _table("Results", ("text", "perplexity before", "after"), perplexities)
        if settings.get("quantize"):
            sections.append(f"Measured, as trained, with the base quantised to {settings['quantize']}.")
    step = told(summary)
    if step:
        sections.append(f"The adapter is {step}.")
    sections += _table("Data", ("source", "documents", "tokens"), _sources(summary))
    sections += _table("Recipe", ("setting", "value"), _recipe(summary))
    sections += ["## How to load", *_loading(summary)]

    names = [hub_name(source["name"]) for source in summary["sources"]]
    datasets = [found for found in names if found is not None]
    return _card(
        name,
        summary,
        *sections,
        made=_made(summary),
        library_name="peft",
        datasets=datasets or None,
        model_name=name,
        eval_results=_eval_results(summary) or None,
    )


def _measured(summary: dict) -> list[tuple[str, str, float | None, float | None]]:
    """Each text that is measured: name, what it is, perplexity before and after training; None if not."""
    held_out = f"held out, {summary['held_out_tokens']:,} tokens never trained on"
    return [
        ("held-out", held_out, summary["perplexity_before"], summary["perplexity_after"]),
        ("retain", "to be retained", summary["retain_before"], summary["retain_after"]),
    ]


def _perplexities(summary: dict) -> list[tuple[str, str, str]]:
    rows = []
    for _, what, before, after in _measured(summary):
        if before is not None and after is not None:
            rows.append((what, f"{before:.2f}", f"{after:.2f}"))
    return rows


def _eval_results(summary: dict) -> list[EvalResult]:
    results = []
    for name, _, before, after in _measured(summary):
        for when, value in (("before", before), ("after", after)):
            if value is None or not math.isfinite(value):
                continue
            result = EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"{name} text",
                dataset_split=name,  # or the two texts would be one entry
                metric_type="perplexity",
                metric_name=f"perplexity {when} training",
                metric_value=round(value, 4),
            )
            results.append(result)
    return results


def _sources(summary: dict) -> list[tuple[str, str, str]]:
    rows = []
    for source in summary["sources"]:
        rows.append((_public(source["name"]), f"{source['documents']:,}", f"{source['tokens']:,}"))
    return rows


def _recipe(summary: dict) -> list[tuple[str, object]]:
    """The settings, but paths, which are said elsewhere or private, and what does not concern training."""
    rows = []
    for name, value in summary["settings"].items():
        option = OPTIONS.get(name)
        is_hidden = option is not None and (option.is_path or not option.in_card)
        if value is not None and not is_hidden:
            rows.append((name.replace("_", " "), value))
    return rows


def _made(summary: dict) -> str:
    steps = f"{summary['steps']} steps in {summary['training_seconds']:,.0f} s"
    text = f"{steps}, base in {summary['dtype']}, on {summary['device']}"
    if summary["processes"] > 1:
        text += f", {summary['processes']} processes"
    return f"{text}. "


def told(summary: dict) -> str:
    """Which step the adapter of a run is of, and why it ended early; "" where the options do not matter."""
    keeps_best = summary["settings"].get("keep_best")
    stopped_by = summary["stopped_by"]
    if not keeps_best and not stopped_by:
        return ""
    which = "the best of those measured" if keeps_best else "the last"
    text = f"of step {summary['adapter_step']}, {which}"
    if stopped_by:
        text += f"; stopped after step {summary['steps']} by {stopped_by}"
    return text


def transfer_card(facts: dict) -> ModelCard:
    """The card of a model into which `mica transfer` has merged an update.

    ``facts``: ``name`` (of the folder), ``model`` and ``adapter`` (as given), ``base`` (of the adapter, or
    None), ``rank``, ``alpha``, ``layers`` (their number), ``embeddings`` (whether they were trained),
    ``dtype``, ``merge_report``, ``versions``.
    """
    base = hub_name(facts["base"])
    trained_on = ""
    if base is not None:
        trained_on = f", trained on `{base}`,"
    names = {
        "there": _public(facts["model"]),
        "update": _public(facts["adapter"]),
        "on": trained_on,
    }
    sections = [_TRANSFERRED.format(**facts, **names, paper=_PAPER)]
    if facts["embeddings"]:
        sections.append("What its training has added to the embeddings is added here too.")
    sections.append(f"In {facts['dtype']}: {facts['merge_report']}.")
    loading = _LOAD.format(
        imports="from transformers import AutoModelForCausalLM, AutoTokenizer",
        kind="AutoModelForCausalLM",
        where=json.dumps(facts["name"]),
        note=_HERE,
    )
    sections += ["## How to load", loading]
    return _card(shown(facts["name"]), facts, *sections, library_name="transformers")


def _card(name: str, facts: dict, *sections: str, made: str = "", **metadata) -> ModelCard:
    data = ModelCardData(
        base_model=hub_name(facts["model"]),
        pipeline_tag="text-generation",
        tags=["mica", "lora", "continued-pretraining"],
        **metadata,
    )
    versions = ", ".join(f"{library} {version}" for library, version in facts["versions"].items())
    text = "\n\n".join((f"# {name}", *sections, "## How it was made", f"{made}{versions}."))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(str(one) for one in value)
    return str(value).replace("|", "\\|")


def _table(title: str, header: tuple, rows: list[tuple]) -> list[str]:
    """A section with a table; none without rows."""
    if not rows:
        return []
    cells = [[_cell(cell) for cell in row] for row in rows]
    return [f"## {title}", markdown_table([_cell(cell) for cell in header], cells)]


def _loading(summary: dict) -> list[str]:
    """How to load the adapter, from its repository if it was pushed; more for one of a GGUF file."""
    folder = Path(summary["adapter"]).name
    repository = summary["settings"].get("push_to_hub")
    where = json.dumps(repository or folder)
    note = _HERE
    if repository:
        note = ""
    load = _LOAD.format(
        imports="from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
        kind="AutoPeftModelForCausalLM",
        where=where,
        note=note,
    )
    if not summary["model"].lower().endswith(".gguf"):
        return [load]

    found = "That finds the base, dequantised, in the subfolder `base` where the adapter was made."
    others = []
    if not repository:  # which has no such subfolder
        found += " Where this folder was moved to, only after `import mica.fast`."
        base = json.dumps(f"{folder}/base")
        others.append(_LOAD_ON.format(when="There without it", base=base, where=where))
    file = json.dumps(Path(summary["model"]).name)
    base = f'".", gguf_file={file}, dtype="{summary["dtype"]}"'
    when = "Elsewhere, with the GGUF file in the working directory"
    others.append(_LOAD_ON.format(when=when, base=base, where=where))
    return [load, found, *others]
