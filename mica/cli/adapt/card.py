"""The model card of a run: README.md of OUTPUT, from its summary and nothing else."""

import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mica.cli.output import write_file

PAPER = "https://arxiv.org/abs/2604.01694"
_TAGS = ["mica", "lora", "continued-pretraining"]
# Settings that are not part of a recipe: paths, which are said elsewhere or are nobody's business, and what
# concerns only the machine.
_NOT_RECIPE = {
    "model", "adapter", "text", "text_field", "output", "config", "push_to_hub", "held_out_text", "retain",
    "resume", "overwrite", "merge", "trust_remote_code", "workers", "report_to", "save_steps", "log_steps",
}  # fmt: skip


def hub_name(name: str | None) -> str | None:
    """``name`` where it is one of the hub, as owner/name; None for a path or a file."""
    is_name = name and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    is_file = name and Path(name).suffix.lower() in (
        ".gguf",
        ".txt",
        ".json",
        ".jsonl",
        ".csv",
        ".parquet",
        ".gz",
    )
    return name if is_name and not is_file else None


def public_name(name: str) -> str:
    """``name`` of a model or a text without the folders of this machine, which a card must not tell."""
    return hub_name(name) or Path(name).name or name


def card(summary: dict) -> ModelCard:
    """The card of an adapter; ``summary`` is that of ``summary.json`` (see ``mica.cli.adapt.session``).

    Its metadata has what the hub reads: base_model and datasets only where these are names of the hub, which
    refuses others; the measured perplexities as model-index.
    """
    s = summary
    name = Path(s["adapter"]).name
    results = []
    for label, key in (("held-out", "perplexity"), ("retain", "retain")):
        for when in ("before", "after"):
            value = s.get(f"{key}_{when}")
            if value is not None and math.isfinite(value):
                results.append(_result(label, when, value))
    data = ModelCardData(
        base_model=hub_name(s["model"]),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=_TAGS,
        datasets=[hub for source in s.get("sources") or () if (hub := hub_name(source["name"]))] or None,
        model_name=name,
        eval_results=results or None,
    )
    sections = [
        f"# {name}",
        f"An adapter for {_code(public_name(s['model']))}, made by continued pretraining on "
        f"{s['training_tokens']:,} tokens with [MiCA]({PAPER}). MiCA adds `s·B·A` to an adapted weight `W`: "
        f"`B` holds the {s['settings']['rank']} left singular vectors of `W` with the smallest singular "
        f"values and stays frozen, `A` starts at zero and is trained. {s['trained_parameters']:,} of "
        f"{s['total_parameters']:,} parameters were trained.",
        *_results(s),
        *_data(s),
        *_recipe(s),
        "## How to load",
        _loading(s),
        *_making(s),
    ]
    return _assembled(data, sections)


def transfer_card(facts: dict) -> ModelCard:
    """The card of a model into which `mica transfer` has merged an update.

    ``facts``: ``name`` (of the folder), ``model`` and ``adapter`` (as given), ``base`` (of the adapter, or
    None), ``rank``, ``alpha``, ``layers`` (their number), ``dtype``, ``merge_report``, ``versions``.
    """
    f = facts
    data = ModelCardData(
        base_model=hub_name(f["model"]),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
    )
    of = f", trained on `{hub_name(f['base'])}`," if hub_name(f["base"]) else ""
    sections = [
        f"# {f['name']}",
        f"{_code(public_name(f['model']))} with the update of a [MiCA]({PAPER}) adapter merged into its "
        f"weights: the `s·B·A` of {_code(public_name(f['adapter']))}{of} with rank {f['rank']} and alpha "
        f"{f['alpha']}, in {f['layers']} layers. The update was trained on that model and not on this one. "
        "Tokenizer and chat template are this one's.",
        f"In {f['dtype']}: {f['merge_report']}.",
        "## How to load",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({_string(f['name'])})  # the path of this folder\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_string(f['name'])})\n```",
        *_making(f),
    ]
    return _assembled(data, sections)


def write_card(card: ModelCard, output: Path) -> None:
    """Write ``output``/README.md. Raises UsageError if that fails."""
    write_file("--output", output / "README.md", lambda path: path.write_text(str(card), encoding="utf-8"))


def _assembled(data: ModelCardData, sections: list[str]) -> ModelCard:
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _result(text: str, when: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=f"{text} text",
        dataset_split=text,  # or the two texts would be one entry
        metric_type="perplexity",
        metric_name=f"perplexity {when} training",
        metric_value=round(value, 4),
    )


def _string(text: str) -> str:
    """A literal of Python that stays on its line: JSON's strings are such."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    """``text`` as code within a line, in more backticks than it holds in a row."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def _results(s: dict) -> list[str]:
    rows = [
        (text, f"{s[f'{key}_before']:.2f}", f"{s[f'{key}_after']:.2f}")
        for text, key in (
            (f"held out, {s['held_out_tokens']:,} tokens never trained on", "perplexity"),
            ("to be retained", "retain"),
        )
        if s.get(f"{key}_before") is not None and s.get(f"{key}_after") is not None
    ]
    if not rows:
        return []
    table = _table(("text", "perplexity before", "after"), rows)
    quantised = (s.get("settings") or {}).get("quantize")
    note = [f"Measured, as trained, with the base quantised to {quantised}."] if quantised else []
    return ["## Results", table, *note]


def _data(s: dict) -> list[str]:
    if not s.get("sources"):
        return []

    def count(source, key):
        return "" if source.get(key) is None else f"{source[key]:,}"

    rows = [
        (_code(public_name(source["name"])), count(source, "documents"), count(source, "tokens"))
        for source in s["sources"]
    ]
    return ["## Data", _table(("source", "documents", "tokens"), rows)]


def _recipe(s: dict) -> list[str]:
    origins = s.get("origins") or {}
    rows = []
    for option, value in (s.get("settings") or {}).items():
        name = option.lstrip("-").replace("-", "_")
        if value is None or name in _NOT_RECIPE:
            continue
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        rows.append((name.replace("_", " "), value, origins.get(option, "")))
    return ["## Recipe", _table(("setting", "value", "from"), rows)] if rows else []


def _loading(s: dict) -> str:
    repository = (s.get("settings") or {}).get("push_to_hub")
    where = _string(repository or Path(s["adapter"]).name)
    what = "" if repository else "  # the path of this folder"
    text = (
        "```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({where}){what}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})\n```"
    )
    if s["model"].lower().endswith(".gguf"):
        file = _string(Path(s["model"]).name)
        bases = {
            "Elsewhere, with the GGUF file in the working directory": (
                f'".", gguf_file={file}, dtype="{s["dtype"]}"'
            )
        }
        text += "\n\nThat finds the base, dequantised, in the subfolder `base` where the adapter was made."
        if not repository:  # which has no such subfolder
            text += " Where this folder was moved to, only after `import mica.fast`."
            bases = {"There without it": _string(f"{Path(s['adapter']).name}/base")} | bases
        for when, base in bases.items():
            text += (
                f"\n\n{when}:\n\n"
                "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
                f"base = AutoModelForCausalLM.from_pretrained({base})\n"
                f"model = PeftModel.from_pretrained(base, {where})\n```"
            )
    return text


def _making(s: dict) -> list[str]:
    made = []
    if s.get("training_seconds") is not None:
        made.append(
            f"{s['steps']} steps in {s['training_seconds']:,.0f} s, base in {s['dtype']}, on {s['device']}"
            + (f", {s['processes']} processes" if (s.get("processes") or 1) > 1 else "")
        )
    if s.get("versions"):
        made.append(", ".join(f"{name} {version}" for name, version in s["versions"].items()))
    return ["## How it was made", ". ".join(made) + "."] if made else []
