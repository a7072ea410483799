"""Model cards: README.md of the adapter of a run, and of a model that `mica transfer` has written."""

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mica.cli.adapt.options import OPTIONS
from mica.cli.output import shown

_FILES = {".gguf", ".txt", ".json", ".jsonl", ".csv", ".parquet", ".gz"}
# `table` is a macro; paragraphs are kept apart by the empty lines within the conditions.
_TEMPLATE = """\
{%- macro table(header, rows) -%}
| {{ header | join(" | ") }} |
|{{ " --- |" * (header | length) }}
{%- for row in rows %}
| {{ row | join(" | ") }} |
{%- endfor %}
{%- endmacro -%}
---
{{ card_data }}
---

# {{ name }}

{% if is_adapter -%}
An adapter for {{ model }}, made by continued pretraining on {{ "{:,}".format(training_tokens) }} tokens \
with [MiCA]({{ paper }}). MiCA adds `s·B·A` to an adapted weight `W`: `B` holds the {{ settings.rank }} left \
singular vectors of `W` with the smallest singular values and stays frozen, `A` starts at zero and is \
trained. {{ "{:,}".format(trained_parameters) }} of {{ "{:,}".format(total_parameters) }} parameters were \
trained.
{%- if trained_embeddings %}

{{ "{:,}".format(trained_embeddings) }} of these are the input and output embeddings, trained as whole \
modules (PEFT's `modules_to_save`).
{%- endif %}
{%- if results %}

## Results

{{ table(("text", "perplexity before", "after"), results) }}
{%- if settings.quantize %}

Measured, as trained, with the base quantised to {{ settings.quantize }}.
{%- endif %}
{%- endif %}
{%- if step %}

The adapter is {{ step }}.
{%- endif %}
{%- if sources %}

## Data

{{ table(("source", "documents", "tokens"), sources) }}
{%- endif %}
{%- if recipe %}

## Recipe

{{ table(("setting", "value"), recipe) }}
{%- endif %}
{%- else -%}
{{ model }} with the update of a [MiCA]({{ paper }}) adapter merged into its weights: the `s·B·A` of \
{{ adapter }}{% if base %}, trained on `{{ base }}`,{% endif %} with rank {{ rank }} and alpha {{ alpha }}, \
in {{ layers }} layers. The update was trained on that model and not on this one. Tokenizer and chat \
template are this one's.
{%- if embeddings %}

What its training has added to the embeddings is added here too.
{%- endif %}

In {{ dtype }}: {{ merge_report }}.
{%- endif %}

## How to load

```python
{%- if is_adapter %}
from peft import AutoPeftModelForCausalLM
{%- endif %}
from transformers import {{ "AutoModelForCausalLM, " if not is_adapter }}AutoTokenizer

model = Auto{{ "Peft" if is_adapter }}ModelForCausalLM.from_pretrained({{ folder }})  # this folder's path
tokenizer = AutoTokenizer.from_pretrained({{ folder }})
```
{%- if gguf %}

That finds the base, dequantised, in the subfolder `base` where the adapter was made. Where this folder was \
moved to, only after `import mica.fast`.
{%- for when, place in gguf %}

{{ when }}:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({{ place }})
model = PeftModel.from_pretrained(base, {{ folder }})
```
{%- endfor %}
{%- endif %}

## How it was made

{% if is_adapter -%}
{{ steps }} steps in {{ "{:,.0f}".format(training_seconds) }} s, base in {{ dtype }}, on {{ device }}\
{% if processes > 1 %}, {{ processes }} processes{% endif %}. \
{% endif -%}
{{ versions }}.
"""


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
    folder = Path(summary["adapter"]).name
    names = [hub_name(source["name"]) for source in summary["sources"]]
    measured = _measured(summary)
    facts = {
        "is_adapter": True,
        "results": [(what, f"{before:.2f}", f"{after:.2f}") for _, what, before, after in measured if after],
        "step": step_of(summary),
        "sources": _sources(summary),
        "recipe": _recipe(summary),
        "gguf": _on_gguf(summary, folder),
    }
    return _rendered(
        shown(folder),
        folder,
        summary | facts,
        library_name="peft",
        datasets=[name for name in names if name is not None] or None,
        model_name=shown(folder),
        eval_results=_eval_results(measured) or None,
    )


def transfer_card(facts: dict) -> ModelCard:
    """The card of a model into which `mica transfer` has merged an update.

    ``facts``: ``name`` (of the folder), ``model`` and ``adapter`` (as given), ``base`` (of the adapter, or
    None), ``rank``, ``alpha``, ``layers`` (their number), ``embeddings`` (whether they were trained),
    ``dtype``, ``merge_report``, ``versions``.
    """
    more = {"adapter": _public(facts["adapter"]), "base": hub_name(facts["base"])}
    return _rendered(shown(facts["name"]), facts["name"], facts | more, library_name="transformers")


def _rendered(name: str, folder: str, facts: dict, **metadata: Any) -> ModelCard:
    data = ModelCardData(
        base_model=hub_name(facts["model"]),
        pipeline_tag="text-generation",
        tags=["mica", "lora", "continued-pretraining"],
        **metadata,
    )
    own = {
        "name": name,
        "folder": json.dumps(folder),
        "model": _public(facts["model"]),
        "paper": "https://arxiv.org/abs/2604.01694",
        "versions": ", ".join(f"{library} {version}" for library, version in facts["versions"].items()),
    }
    return ModelCard.from_template(data, template_str=_TEMPLATE, **facts | own)


def _measured(summary: dict) -> list[tuple[str, str, float, float]]:
    """Each text that was measured: name, what it is, perplexity before and after training (0: not finite)."""
    held_out = f"held out, {summary['held_out_tokens']:,} tokens never trained on"
    rows = []
    for name, what, key in (("held-out", held_out, "perplexity"), ("retain", "to be retained", "retain")):
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        if before is not None and after is not None:
            rows.append((name, what, before, after if math.isfinite(after) else 0.0))
    return rows


def _eval_results(measured: list[tuple[str, str, float, float]]) -> list[EvalResult]:
    results = []
    for name, _, before, after in measured:
        for when, value in (("before", before), ("after", after)):
            if value:
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


def _sources(summary: dict) -> list[list[str]]:
    rows = []
    for source in summary["sources"]:
        rows.append(_cells(_public(source["name"]), source["documents"], source["tokens"]))
    return rows


def _recipe(summary: dict) -> list[list[str]]:
    """The settings, but paths, which are said elsewhere or private, and what does not concern training."""
    rows = []
    for name, value in summary["settings"].items():
        option = OPTIONS.get(name)
        is_hidden = option is not None and (option.is_path or not option.in_card)
        if value is not None and not is_hidden:
            rows.append(_cells(name.replace("_", " "), value))
    return rows


def _cells(*values: object) -> list[str]:
    """A row of a table in Markdown."""
    cells = []
    for value in values:
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        cells.append(str(value).replace("|", "\\|"))
    return cells


def step_of(summary: dict) -> str:
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


def _on_gguf(summary: dict, folder: str) -> list[tuple[str, str]]:
    """Other ways to load an adapter of a GGUF file: when, and where the base is, as Python."""
    model = summary["model"]
    if not model.lower().endswith(".gguf"):
        return []
    elsewhere = f'".", gguf_file={json.dumps(Path(model).name)}, dtype="{summary["dtype"]}"'
    return [
        ("There without it", json.dumps(f"{folder}/base")),
        ("Elsewhere, with the GGUF file in the working directory", elsewhere),
    ]
