"""Tables of a result of `bench.quality`: ``python -m bench.quality.report FILE.json`` prints them, and
with ``--page`` before FILE.json the table of `bench/README.md`.

All that is printed follows from the file, but for what others found, which stands beside it with its source.
"More" and "less" are reported only where the ranges over the seeds do not overlap.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from bench.quality.measures import (
    FACTS,
    FORGOTTEN,
    KNOWN,
    LEARNED,
    PICKED,
    PROSE,
    REFERENCE,
    Measure,
    after,
    change,
    chosen_runs,
    compared,
    mica_of,
    step_seconds,
    trained_methods,
)
from bench.quality.others import HEADER, OTHERS
from bench.quality.schedule import chosen_rate, missing, tried, verdict
from bench.quality.search import is_enclosed

PAPER = "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning, arXiv 2604.01694"
CLAIMS = {
    "knowledge": "up to 5.9x improvement in knowledge acquisition under optimized training hyperparameters",
    "size": "a minimal parameter footprint of 6-60% compared to LoRA",
    "forgetting": "a more efficient and stable mechanism for integrating new knowledge",
}

JUDGED = [  # verb, measure, sign of the change that it means
    ("learned", FACTS, -1),
    ("learned", PROSE, -1),
    ("forgot", REFERENCE, 1),
    ("forgot", KNOWN, 1),
]


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(" | ".join(row) for row in [header, ["---"] * len(header), *rows])


def _measures(result: dict, measures: tuple[Measure, ...]) -> str:
    rows = [["before", "", *(f"{m.of(result['base']):.{m.digits}f}" for m in measures)]]
    for name in trained_methods(result):
        cells = [after(result, name, m).text(m.digits) for m in measures]
        rows.append([name, str(len(chosen_runs(result, name))), *cells])
    return table(["", "seeds", *(m.title for m in measures)], rows)


def _cost(result: dict) -> str:
    rows = []
    for name in trained_methods(result):
        facts = result["methods"][name]
        rows.append(
            [
                name,
                str(facts["rank"] or ""),
                f"{facts['trained_parameters']:,}",
                f"{facts['optimizer_bytes'] / 1e6:.1f}",
                f"{facts['saved_bytes'] / 1e6:.1f}",
                f"{facts['initialisation_seconds']:.1f}",
                f"{step_seconds(result, name):.2f}",
            ]
        )
    header = ["", "rank", "trained parameters", "optimizer MB", "saved for backward MB"]
    return table([*header, "initialisation s", "step s, median"], rows)


def _busy(result: dict) -> str:
    """How much of the processor the runs had: where it is less than all, the seconds say little."""
    wall, cpu = (sum(run[f"{kind}_seconds"] for run in result["runs"]) for kind in ("wall", "cpu"))
    share = cpu / (wall * result["machine"]["threads"]) if wall else 0
    return (
        f"{len(result['runs'])} runs took {wall / 60:.0f} minutes, in which the processor's threads computed "
        f"{100 * share:.0f} % of the time."
    )


def _tries(result: dict) -> str:
    rows = []
    for name in result["methods"]:
        chosen, losses = chosen_rate(result, name), []
        for rate, loss in sorted(tried(result, name).items()):
            text = f"{rate:g}: {loss:.3f}" if math.isfinite(loss) else f"{rate:g}: diverged"
            losses.append(f"**{text}**" if rate == chosen else text)
        rows.append([name, ", ".join(losses), verdict(result, name)])
    return table(["", "learning rate: validation loss", "the chosen one"], rows)


def _recipes(result: dict) -> str:
    rows = []
    for name, recipe in result["recipes"].items():
        targets = recipe["target_modules"]
        shown = targets if isinstance(targets, str) else ", ".join(targets)
        alpha = "alpha = r" if recipe["scaling"] == 1 else f"alpha = {recipe['scaling']} r"
        numbers = [recipe[key] for key in ("warm_up", "weight_decay", "dropout", "max_grad_norm")]
        rows.append([name, shown, alpha, recipe["scheduler"], *(f"{number:g}" for number in numbers)])
    header = ["recipe", "layers", "scaling", "schedule", "warm-up, share of the steps", "weight decay"]
    return table([*header, "dropout", "clipping"], rows)


def _texts(result: dict) -> str:
    rows = []
    for name, about in result["texts"].items():
        before = f"{result['base'][name]:.3f}" if name in result["base"] else ""
        rows.append([name, f"{about['tokens']:,}", before, about["sha256"][:12]])
    return table(["text", "tokens that count", "loss before", "SHA-256"], rows)


def _changes(result: dict, what: str, measure: Measure, sign: int) -> list[str]:
    cells = [what]
    for name, facts in result["methods"].items():
        value, mica = change(result, name, measure, sign), mica_of(result, facts["recipe"])
        if value is None:
            cells.append(verdict(result, name))
            continue
        words = compared(change(result, mica, measure, sign), value) if mica not in (None, name) else ""
        cells.append(value.text(measure.digits) + (f"; {words}" if words else ""))
    return cells


def _against_mica(result: dict, what: str, cell) -> list[str]:
    """``cell`` (MiCA of the recipe, method) -> text, for every method but MiCA."""
    cells = [what]
    for name, facts in result["methods"].items():
        mica = mica_of(result, facts["recipe"])
        cells.append(cell(mica, name) if mica not in (None, name) else "")
    return cells


def _claims(result: dict) -> str:
    def factor(mica: str, name: str) -> str:
        """MiCA's decrease of the loss ÷ the other's; no factor where either did not decrease."""
        falls = [change(result, one, FACTS, -1) for one in (mica, name)]
        means = [fall.mean if fall else 0.0 for fall in falls]
        return f"{means[0] / means[1]:.2f}x" if min(means) > 0 else "no factor"

    def share(mica: str, name: str) -> str:
        sizes = [result["methods"][one].get("trained_parameters") for one in (mica, name)]
        return f"{100 * sizes[0] / sizes[1]:.1f} %" if all(sizes) else ""

    rows = {
        "knowledge": [
            _changes(result, "decrease of the loss on new facts, held-out questions", FACTS, -1),
            _against_mica(result, "MiCA's decrease ÷ the baseline's", factor),
            _changes(result, "increase of the share answered right, in points", PICKED, 1),
            _changes(result, "decrease of the loss on new prose, held-out documents", PROSE, -1),
        ],
        "size": [_against_mica(result, "MiCA's trained parameters, in % of the baseline's", share)],
        "forgetting": [
            _changes(result, "increase of the loss on the Python reference", REFERENCE, 1),
            _changes(result, "increase of the loss on known facts", KNOWN, 1),
        ],
    }
    flat = [[f"“{CLAIMS[key]}”" if not n else "", *row] for key in CLAIMS for n, row in enumerate(rows[key])]
    return table(["the paper", "here", *result["methods"]], flat)


def in_short(result: dict) -> str:
    """For each recipe: where MiCA's range over the seeds is apart from LoRA's, and where not."""
    lines = []
    for name, facts in result["methods"].items():
        mica = mica_of(result, facts["recipe"])
        if facts["kind"] != "lora" or mica is None:
            continue
        found: dict[str, list[str]] = {}
        for verb, measure, sign in JUDGED:
            words = compared(*(change(result, one, measure, sign) for one in (mica, name)))
            found.setdefault(words or "not compared, one seed", []).append(f"{verb} ({measure.title})")
        said = "; ".join(f"{words}: {', '.join(what)}" for words, what in found.items())
        lines.append(f"- {mica} against {name}, r = {facts['rank']}: {said}.")
    return "\n".join(lines)


def page_table(result: dict) -> str:
    """The table of `bench/README.md`; a method without a result has no row."""
    shown = (PICKED, FACTS, PROSE, REFERENCE, KNOWN)
    header = ["", "trained", "learning rate", "enclosed"]
    header += [f"{m.title} (before: {m.of(result['base']):.{m.digits}f})" for m in shown]
    rows = []
    for name in trained_methods(result):
        facts, rates = result["methods"][name], tried(result, name)
        label = f"{name}, " + (f"r = {facts['rank']}" if facts["rank"] else "all weights")
        cells = [f"{facts['trained_parameters'] / 1e6:.1f} M", f"{chosen_rate(result, name):g}"]
        cells.append("yes" if is_enclosed(rates) else "no")
        cells += [after(result, name, m).text(m.digits).replace(" to ", "–") for m in shown]
        rows.append([label, *cells])
    lines = table(header, rows).splitlines()
    return "\n".join(f"| {line.strip()} |" for line in lines).replace("|  |", "| |")


def _diverged(result: dict) -> str:
    lines = [
        f"- {run['method']}, learning rate {run['rate']:g}, seed {run['seed']}: {run['diverged']}"
        for run in result["runs"]
        if run["diverged"]
    ]
    return "\n".join(["### Diverged, and not counted", "", *lines]) if lines else ""


def _missing(result: dict) -> str:
    lines = [f"- {line}" for line in missing(result)]
    return "\n".join(["**This run is not finished.** Missing:", "", *lines]) if lines else ""


def _setting(result: dict) -> str:
    s = result["settings"]
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value != "")
    commits = ", ".join(dict.fromkeys(start["commit"] for start in result["starts"]))  # of every start
    return (
        f"{result['model']}; {machine}; commit {commits}.\n\n"
        f"A run is {s['epochs']} epochs of {s['steps'] // s['epochs']} steps, each of {s['facts_blocks']} "
        f"blocks of new facts and {s['prose_blocks']} of new prose, {s['length']} tokens per block: the same "
        f"batches in the same order for all methods. {s['people']} invented people have four facts each, and "
        f"the training text states each fact {s['rounds']} times. AdamW in float32. Learning rates: those of "
        "the recipe's range, then beyond the best one while that is at an edge, at most "
        f"{s['tries']}, with the first seed, chosen on validation text. Of several seeds, the mean and, in "
        "brackets, the range. Losses are nats per token."
    )


def report(result: dict) -> str:
    """All tables, as Markdown."""
    answers = result["settings"]["answers"]
    parts = [
        "**A quick run. Its numbers mean nothing.**" if result["settings"].get("quick") else "",
        _setting(result),
        _missing(result),
        f"### Recipes\n\n{_recipes(result)}\n\nFull fine-tuning has no adapter, and one seed.",
        f"### What the paper claims, and what was measured here\n\n{PAPER}. Its models, texts and "
        "measures are different: this is one small model, and little training. “More” and “less” are "
        f"reported where the ranges over the seeds do not overlap.\n\n{_claims(result)}",
        f"### In short\n\n{in_short(result)}",
        f"### What others found\n\n{table(HEADER, OTHERS)}",
        f"### Learned\n\n{_measures(result, LEARNED)}\n\nNew facts are queried in phrasings that training "
        f"did not have. Among answers: only the {answers} of the attribute are possible, all equally "
        f"frequent; guessing gives a loss of {math.log(answers):.3f} and {100 / answers:.1f} %. The loss of "
        "the answer among all words also falls by learning the form of such sentences.",
        f"### Forgotten\n\n{_measures(result, FORGOTTEN)}",
        f"### Learning rates\n\n{_tries(result)}",
        f"### Cost\n\n{_cost(result)}\n\n{_busy(result)}",
        f"### Texts\n\n{_texts(result)}",
        _diverged(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path) -> str:
    """Write the tables of the JSON file at ``path`` next to it; returns them."""
    text = report(json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    form = page_table if "--page" in sys.argv else report
    print(form(json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))))
