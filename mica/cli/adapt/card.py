"""Model cards: README.md of the adapter of a run, and of a model that `mica transfer` has written."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from mica.cli.adapt.methods import METHODS
from mica.cli.adapt.options import OPTIONS
from mica.cli.output import shown

_FILES = {".gguf", ".txt", ".json", ".jsonl", ".csv", ".parquet", ".gz"}
# Paragraphs are kept apart by the empty lines within the conditions.
_TEMPLATE = """\
{%- macro perplexity(text, before, after) -%}
| {{ text }} | {{ "%.2f" | format(before) }} | {{ "%.2f" | format(after) }} |
{%- endmacro -%}
---
{{ card_data }}
---

# {{ name }}

{% if is_adapter -%}
An adapter for {{ model }}, made by continued pretraining on {{ "{:,}".format(training_tokens) }} tokens \
with [{{ method.title }}]({{ method.paper }}). {{ method.says.format(rank=settings.rank) }} \
{{ "{:,}".format(trained_parameters) }} of {{ "{:,}".format(total_parameters) }} parameters were trained.
{%- if trained_embeddings %}

{{ "{:,}".format(trained_embeddings) }} of these are the input and output embeddings, trained as whole \
modules (PEFT's `modules_to_save`).
{%- endif %}

## Results

| text | perplexity before | after |
| --- | --- | --- |
{{ perplexity("held out, never trained on", perplexity_before, perplexity_after) }}
{%- if retain_before %}
{{ perplexity("to be retained", retain_before, retain_after) }}
{%- endif %}
{%- if settings.quantize %}

Measured, as trained, with the base quantised to {{ settings.quantize }}.
{%- endif %}
{%- if step %}

The adapter is {{ step }}.
{%- endif %}

## Data

| source | documents | tokens |
| --- | --- | --- |
{%- for source in sources %}
| {{ public(source.name) }} | {{ "{:,}".format(source.documents) }} | {{ "{:,}".format(source.tokens) }} |
{%- endfor %}

## Recipe

```yaml
{{ recipe }}
```
{%- else -%}
{{ model }} with the update of a [{{ method.title }}]({{ method.paper }}) adapter merged into its weights: \
what {{ adapter }}{% if base %}, trained on `{{ base }}`,{% endif %} adds with rank {{ rank }} and alpha \
{{ alpha }} in {{ layers }} layers. The update was trained on another model than this. Tokenizer and chat \
template are those of {{ model }}.
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

This finds the dequantised base in the subfolder `base`; once the folder has been moved, only after \
`import mica.fast`. Without that package, and with the GGUF file in the working directory:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(".", gguf_file={{ gguf }}, dtype="{{ dtype }}")
model = PeftModel.from_pretrained(base, {{ folder }})
```
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
    code = shown(hub_name(name) or Path(name).name or name)
    return f"`{code}`".replace("|", "\\|")  # which would end a cell of a table


def card(summary: dict) -> ModelCard:
    """The card of an adapter; ``summary`` is that of ``summary.json`` (see `summary.of`).

    Its metadata has what the hub reads: base_model and datasets only where these are names of the hub, which
    refuses others.
    """
    folder = Path(summary["adapter"]).name
    names = [hub_name(source["name"]) for source in summary["sources"]]
    settings = summary["settings"]
    public = {name: value for name, value in settings.items() if not OPTIONS[name].is_path}
    gguf = json.dumps(Path(summary["model"]).name) if summary["model"].lower().endswith(".gguf") else None
    facts = {
        "is_adapter": True,
        "step": step_of(summary),
        "recipe": yaml_dump(public, sort_keys=False).strip(),
        "gguf": gguf,
    }
    datasets = [name for name in names if name is not None] or None
    facts |= summary
    return _rendered(folder, settings["method"], facts, library_name="peft", datasets=datasets)


def transfer_card(facts: dict) -> ModelCard:
    """The card of a model into which `mica transfer` has merged an update.

    ``facts``: ``name`` (of the folder), ``model`` and ``adapter`` (as given), ``base`` (of the adapter, or
    None), ``method`` (its name), ``rank``, ``alpha``, ``layers`` (their number), ``embeddings`` (whether they
    were trained), ``dtype``, ``merge_report``, ``versions``.
    """
    more = {"adapter": _public(facts["adapter"]), "base": hub_name(facts["base"])}
    return _rendered(facts["name"], facts["method"], facts | more, library_name="transformers")


def _rendered(folder: str, method: str, facts: dict, **metadata: Any) -> ModelCard:
    data = ModelCardData(
        base_model=hub_name(facts["model"]),
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys((method, "lora", "continued-pretraining"))),
        **metadata,
    )
    own = {
        "name": shown(folder),
        "folder": json.dumps(folder),
        "model": _public(facts["model"]),
        "public": _public,
        "method": METHODS[method],
        "versions": ", ".join(f"{library} {version}" for library, version in facts["versions"].items()),
    }
    return ModelCard.from_template(data, template_str=_TEMPLATE, **facts | own)


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
