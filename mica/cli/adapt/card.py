"""The model card of a run: README.md of OUTPUT, from its summary and nothing else."""

import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mica.cli.output import shown

_PAPER = "https://arxiv.org/abs/2604.01694"
_FILES = {".gguf", ".txt", ".json", ".jsonl", ".csv", ".parquet", ".gz"}
# Settings that are not part of a recipe: paths, which are said elsewhere or are nobody's business, and what
# concerns only the machine.
_NOT_RECIPE = {
    *("model", "adapter", "text", "text_field", "output", "push_to_hub", "held_out_text", "retain", "merge"),
    *("trust_remote_code", "workers", "report_to", "save_steps", "log_steps", "keep_best"),
}
_TRAINED = """\
An adapter for {base}, made by continued pretraining on {training_tokens:,} tokens with [MiCA]({paper}). \
MiCA adds `s·B·A` to an adapted weight `W`: `B` holds the {rank} left singular vectors of `W` with the \
smallest singular values and stays frozen, `A` starts at zero and is trained. {trained_parameters:,} of \
{total_parameters:,} parameters were trained."""
_EMBEDDINGS = (
    "Of these, {trained_embeddings:,} are the input and output embeddings, trained as whole modules "
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
    return None if Path(name).exists() or Path(name).suffix.lower() in _FILES else name


def _public(name: str) -> str:
    """``name`` of a model or text as code, without the folders of this machine: no card must tell those."""
    return f"`{shown(hub_name(name) or Path(name).name or name)}`"


def card(summary: dict) -> ModelCard:
    """The card of an adapter; ``summary`` is that of ``summary.json`` (see `summary.of`).

    Its metadata has what the hub reads: base_model and datasets only where these are names of the hub, which
    refuses others; the measured perplexities as model-index.
    """
    s, settings, name = summary, summary["settings"], shown(Path(summary["adapter"]).name)
    texts = {
        "held-out": ("perplexity", f"held out, {s['held_out_tokens']:,} tokens never trained on"),
        "retain": ("retain", "to be retained"),
    }
    results, perplexities = [], []
    kinds = {"task_type": "text-generation", "dataset_type": "text", "metric_type": "perplexity"}
    for label, (key, text) in texts.items():
        values = {when: s[f"{key}_{when}"] for when in ("before", "after")}
        results += [
            EvalResult(
                dataset_name=f"{label} text",
                dataset_split=label,  # or the two texts would be one entry
                metric_name=f"perplexity {when} training",
                metric_value=round(value, 4),
                **kinds,
            )
            for when, value in values.items()
            if value is not None and math.isfinite(value)
        ]
        if None not in values.values():
            perplexities.append((text, *(f"{value:.2f}" for value in values.values())))
    data = [
        (_public(source["name"]), *(f"{source[key]:,}" for key in ("documents", "tokens")))
        for source in s["sources"]
    ]
    recipe = [
        (option.replace("_", " "), value, s["origins"].get(option, ""))
        for option, value in settings.items()
        if value is not None and option not in _NOT_RECIPE
    ]
    made = f"{s['steps']} steps in {s['training_seconds']:,.0f} s, base in {s['dtype']}, on {s['device']}"
    several = f", {s['processes']} processes" if s["processes"] > 1 else ""
    quantised = perplexities and settings.get("quantize")
    return _card(
        name,
        s,
        _TRAINED.format(**s, base=_public(s["model"]), paper=_PAPER, rank=settings["rank"]),
        *([_EMBEDDINGS.format(**s)] if s["trained_embeddings"] else []),
        *_table("Results", ("text", "perplexity before", "after"), perplexities),
        *([f"Measured, as trained, with the base quantised to {quantised}."] if quantised else []),
        *([f"The adapter is {text}."] if (text := told(s)) else []),
        *_table("Data", ("source", "documents", "tokens"), data),
        *_table("Recipe", ("setting", "value", "from"), recipe),
        "## How to load",
        *_loading(s),
        made=f"{made}{several}. ",
        library_name="peft",
        datasets=[found for source in s["sources"] if (found := hub_name(source["name"]))] or None,
        model_name=name,
        eval_results=results or None,
    )


def told(summary: dict) -> str:
    """Which step the adapter of a run is of, and why it ended early; "" where the options do not matter."""
    step, steps, kept = summary["adapter_step"], summary["steps"], summary["settings"].get("keep_best")
    which = "the best of those measured" if kept else "the last"
    early = f"; stopped after step {steps} by {summary['stopped_by']}" if summary["stopped_by"] else ""
    return f"of step {step}, {which}{early}" if kept or early else ""


def transfer_card(facts: dict) -> ModelCard:
    """The card of a model into which `mica transfer` has merged an update.

    ``facts``: ``name`` (of the folder), ``model`` and ``adapter`` (as given), ``base`` (of the adapter, or
    None), ``rank``, ``alpha``, ``layers`` (their number), ``embeddings`` (whether they were trained),
    ``dtype``, ``merge_report``, ``versions``.
    """
    on = f", trained on `{hub_name(facts['base'])}`," if hub_name(facts["base"]) else ""
    names = {"there": _public(facts["model"]), "update": _public(facts["adapter"])}
    return _card(
        shown(facts["name"]),
        facts,
        _TRANSFERRED.format(**facts, **names, on=on, paper=_PAPER),
        *(
            ["What its training has added to the embeddings is added here too."]
            if facts["embeddings"]
            else []
        ),
        f"In {facts['dtype']}: {facts['merge_report']}.",
        "## How to load",
        _LOAD.format(
            imports="from transformers import AutoModelForCausalLM, AutoTokenizer",
            kind="AutoModelForCausalLM",
            where=json.dumps(facts["name"]),
            note=_HERE,
        ),
        library_name="transformers",
    )


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
    value = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return value.replace("|", "\\|")


def _table(title: str, header: tuple, rows: list[tuple]) -> list[str]:
    """A section with a table; none without rows."""
    lines = (" | ".join(map(_cell, cells)) for cells in (header, ("---",) * len(header), *rows))
    return [f"## {title}", "\n".join(f"| {line} |" for line in lines)] if rows else []


def _loading(s: dict) -> list[str]:
    folder, repository = Path(s["adapter"]).name, s["settings"].get("push_to_hub")
    where = json.dumps(repository or folder)
    imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    note = "" if repository else _HERE
    parts = [_LOAD.format(imports=imports, kind="AutoPeftModelForCausalLM", where=where, note=note)]
    if not s["model"].lower().endswith(".gguf"):
        return parts
    found = "That finds the base, dequantised, in the subfolder `base` where the adapter was made."
    bases = {}
    if not repository:  # which has no such subfolder
        found += " Where this folder was moved to, only after `import mica.fast`."
        bases["There without it"] = json.dumps(f"{folder}/base")
    file = f'".", gguf_file={json.dumps(Path(s["model"]).name)}, dtype="{s["dtype"]}"'
    bases["Elsewhere, with the GGUF file in the working directory"] = file
    loads = (_LOAD_ON.format(when=when, base=base, where=where) for when, base in bases.items())
    return [*parts, found, *loads]
