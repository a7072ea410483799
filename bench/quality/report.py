"""Tables of a result of `bench.quality`: ``python -m bench.quality.report FILE.json`` prints them.

All that is printed follows from the file. The paper's claims are next to the measured figures, whatever these
are; "more" and "less" are reported only where the ranges over the seeds do not overlap.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from bench.quality.search import best, is_enclosed

MICA, STOCK = "MiCA, mica.fast", "MiCA, stock PEFT"
SAME_RANK, SAME_SIZE, FULL = "LoRA, same rank", "LoRA, same size", "full fine-tuning"
BASELINES = (SAME_RANK, SAME_SIZE, FULL)
COMPARED = (MICA, *BASELINES)
PAPER = "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning, arXiv 2604.01694"
CLAIMS = {
    "knowledge": "up to 5.9x improvement in knowledge acquisition under optimized training hyperparameters",
    "size": "a minimal parameter footprint of 6-60% compared to LoRA",
    "forgetting": "a more efficient and stable mechanism for integrating new knowledge",
}


class Measure(NamedTuple):
    """Part of an evaluation. ``title``: its column; ``digits``: decimals that are printed."""

    title: str
    of: Callable[[dict], float]
    digits: int = 3


FACTS = Measure("new facts, loss among answers", lambda e: e["facts, held_out, among answers"])
PICKED = Measure("new facts, right %", lambda e: 100 * e["facts, held_out, picked"], 1)
ANSWER = Measure("new facts, loss of the answer", lambda e: e["facts, held_out"])
PROSE = Measure("new prose, loss", lambda e: e["prose, held_out"])
REFERENCE = Measure("Python reference, loss", lambda e: e["reference"])
KNOWN = Measure("known facts, loss", lambda e: e["known facts"])
KNOWN_RECALLED = Measure("known facts, recalled %", lambda e: 100 * e["known facts, recalled"], 1)
LEARNED, FORGOTTEN = (FACTS, PICKED, ANSWER, PROSE), (REFERENCE, KNOWN, KNOWN_RECALLED)


class Spread(NamedTuple):
    """Mean and range over the seeds, and their number."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(mean(values), min(values), max(values), len(values))

    def text(self, digits: int = 3) -> str:
        middle, low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in self[:3])  # no -0.0
        return middle if low == high else f"{middle} ({low} to {high})"


def validation_loss(run: dict) -> float:
    """Learning rates are chosen by the mean of both validation losses; infinite where it diverged."""
    losses = run["evaluation"]
    if run["diverged"] or losses is None:
        return math.inf
    return (losses["facts, validation, among answers"] + losses["prose, validation"]) / 2


def tried(result: dict, method: str) -> dict[float, float]:
    """Learning rate -> validation loss of the method's runs with the first seed."""
    return {
        run["rate"]: validation_loss(run)
        for run in result["runs"]
        if run["method"] == method and run["seed"] == 0
    }


def chosen_rate(result: dict, method: str) -> float | None:
    return best(tried(result, method))


def chosen_runs(result: dict, method: str) -> list[dict]:
    """The runs that count, one per seed; those that diverged at the chosen rate are reported separately."""
    rate = chosen_rate(result, method)
    return [
        run
        for run in result["runs"]
        if run["method"] == method and run["rate"] == rate and math.isfinite(validation_loss(run))
    ]


def trained_methods(result: dict) -> list[str]:
    """Those with a learning rate that converged."""
    return [name for name in result["methods"] if chosen_runs(result, name)]


def step_seconds(result: dict, method: str) -> float:
    """Median over all steps of all runs of the method: its speed does not depend on the learning rate."""
    return median(s for run in result["runs"] if run["method"] == method for s in run["seconds"])


def curve_difference(result: dict) -> tuple[float, int] | None:
    """Largest difference of MiCA's training losses on both backends, in nats, and the number of steps."""
    stock = chosen_runs(result, STOCK)
    ours = [
        run
        for run in chosen_runs(result, MICA)
        if stock and (run["rate"], run["seed"]) == (stock[0]["rate"], stock[0]["seed"])
    ]
    if not stock or not ours:
        return None
    pairs = list(zip(ours[0]["losses"], stock[0]["losses"], strict=True))
    return max(abs(a - b) for a, b in pairs), len(pairs)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(" | ".join(row) for row in [header, ["---"] * len(header), *rows])


def _measures(result: dict, measures: tuple[Measure, ...]) -> str:
    rows = [["before", *(f"{m.of(result['base']):.{m.digits}f}" for m in measures)]]
    for name in trained_methods(result):
        after = [run["evaluation"] for run in chosen_runs(result, name)]
        rows.append([name, *(Spread.of([m.of(one) for one in after]).text(m.digits) for m in measures)])
    return _table(["", *(m.title for m in measures)], rows)


def _cost(result: dict) -> str:
    rows = []
    for name in trained_methods(result):
        facts, step = result["methods"][name], step_seconds(result, name)
        rows.append(
            [
                name,
                str(facts["rank"] or ""),
                f"{facts['trained_parameters']:,}",
                f"{facts['optimizer_bytes'] / 1e6:.1f}",
                f"{facts['saved_bytes'] / 1e6:.1f}",
                f"{facts['initialisation_seconds']:.1f}",
                f"{step:.2f}",
                f"{step * result['settings']['steps']:.0f}",
                f"{sum(chosen_runs(result, name)[0]['seconds']):.0f}",
            ]
        )
    header = ["", "rank", "trained parameters", "optimizer MB", "saved for backward MB"]
    return _table([*header, "initialisation s", "step s, median", "median x steps", "one run s"], rows)


def _tries(result: dict) -> str:
    rows = []
    for name in result["methods"]:
        rates, chosen = tried(result, name), chosen_rate(result, name)
        losses = []
        for rate, loss in sorted(rates.items()):
            text = f"{rate:g}: {loss:.3f}" if math.isfinite(loss) else f"{rate:g}: diverged"
            losses.append(f"**{text}**" if rate == chosen else text)
        verdict = "worse ones on both sides" if is_enclosed(rates) else "at an edge of what was tried"
        if len(rates) == 1:
            verdict = "not searched" + (": MiCA's" if name == STOCK else "")
        rows.append([name, ", ".join(losses), "none converged" if chosen is None else verdict])
    return _table(["", "learning rate: validation loss", "the chosen one"], rows)


def _texts(result: dict) -> str:
    rows = []
    for name, about in result["texts"].items():
        before = f"{result['base'][name]:.3f}" if name in result["base"] else ""
        rows.append([name, f"{about['tokens']:,}", before, about["sha256"][:12]])
    return _table(["text", "tokens that count", "loss before", "SHA-256"], rows)


def compared(ours: Spread, other: Spread) -> str:
    """MiCA's value against a baseline's, as far as the ranges over the seeds allow; "" for one seed."""
    if min(ours.count, other.count) < 2:
        return ""
    if ours.low > other.high:
        return "MiCA: more"
    return "MiCA: less" if ours.high < other.low else "no clear difference"


def _change(result: dict, method: str, measure: Measure, sign: int) -> Spread | None:
    """Change of ``measure`` over the base model, times ``sign``; None where no learning rate converged."""
    before, runs = measure.of(result["base"]), chosen_runs(result, method)
    return Spread.of([sign * (measure.of(run["evaluation"]) - before) for run in runs]) if runs else None


def _changes(result: dict, what: str, measure: Measure, sign: int) -> list[str]:
    ours, cells = _change(result, MICA, measure, sign), [what]
    for name in COMPARED:
        value = _change(result, name, measure, sign)
        if value is None:
            cells.append("none converged")
            continue
        words = compared(ours, value) if ours and name != MICA else ""
        cells.append(value.text(measure.digits) + (f"; {words}" if words else ""))
    return cells


def _factors(result: dict, what: str, measure: Measure) -> list[str]:
    """MiCA's decrease of a loss ÷ those of the others; no factor where either did not decrease."""
    falls, cells = {name: _change(result, name, measure, -1) for name in COMPARED}, [what, ""]
    for name in BASELINES:
        both = [falls[one].mean if falls[one] else 0.0 for one in (MICA, name)]
        cells.append(f"{both[0] / both[1]:.2f}x" if min(both) > 0 else "no factor")
    return cells


def _claims(result: dict) -> str:
    sizes = {name: facts["trained_parameters"] for name, facts in result["methods"].items()}
    shares = [f"{100 * sizes[MICA] / sizes[name]:.1f} %" if name in sizes else "" for name in BASELINES]
    rows = {
        "knowledge": [
            _changes(result, "decrease of the loss on new facts, held-out questions", FACTS, -1),
            _factors(result, "MiCA's decrease ÷ the baseline's", FACTS),
            _changes(result, "increase of the share answered right, in points", PICKED, 1),
            _changes(result, "decrease of the loss on new prose, held-out documents", PROSE, -1),
        ],
        "size": [["MiCA's trained parameters, in % of the baseline's", "", *shares]],
        "forgetting": [
            _changes(result, "increase of the loss on the Python reference", REFERENCE, 1),
            _changes(result, "increase of the loss on known facts", KNOWN, 1),
        ],
    }
    flat = [[f"“{CLAIMS[key]}”" if not n else "", *row] for key in CLAIMS for n, row in enumerate(rows[key])]
    return _table(["the paper", "here", *COMPARED], flat)


def _diverged(result: dict) -> str:
    lines = [
        f"- {run['method']}, learning rate {run['rate']:g}, seed {run['seed']}: {run['diverged']}"
        for run in result["runs"]
        if run["diverged"]
    ]
    return "\n".join(["Diverged, and not counted:", "", *lines]) if lines else ""


def _setting(result: dict) -> str:
    s = result["settings"]
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value != "")
    return (
        f"{result['model']}; {machine}.\n\n"
        f"A run is {s['steps']} steps, each of {s['facts_blocks']} blocks of new facts and "
        f"{s['prose_blocks']} of new prose, {s['length']} tokens per block: the same batches in the same "
        f"order for all methods. AdamW, weight decay {s['weight_decay']:g}, warm-up over a share of "
        f"{s['warm_up']:g} of the steps and cosine decay, gradients clipped at a norm of "
        f"{s['max_grad_norm']:g}. Adapters on all linear layers but the output, scaling {s['scaling']:g}, in "
        f"fp32 over a {s['base_dtype']} base; full fine-tuning has the same weights in fp32 and computes in "
        f"{s['base_dtype']} (autocast). Learning rates: {s['tries']} tries per method with the first seed, "
        f"chosen on validation text. Seeds: {s['seeds']}; of several, the mean and, in brackets, "
        "the range. Losses are nats per token."
    )


def report(result: dict) -> str:
    """All tables, as Markdown."""
    difference, answers = curve_difference(result), result["settings"]["answers"]
    same = ""
    if difference:
        faster = step_seconds(result, STOCK) / step_seconds(result, MICA)
        same = (
            "MiCA on both backends, same seed and learning rate: the training losses of "
            f"{difference[1]} steps differ by at most {difference[0]:.2g}; a step of stock PEFT takes "
            f"{faster:.2f} times as long."
        )
    quick = result["settings"].get("quick")
    parts = [
        "**A quick run. Its numbers mean nothing.**" if quick else "",
        _setting(result),
        f"### What the paper claims, and what was measured here\n\n{PAPER}. Its models, texts and "
        "measures are different: this is one small model, and little training. “More” and “less” are "
        f"reported where the ranges over the seeds do not overlap.\n\n{_claims(result)}",
        f"### Learned\n\n{_measures(result, LEARNED)}\n\nNew facts are queried in phrasings that training "
        f"did not have. Among answers: only the {answers} of the attribute are possible, all equally "
        f"frequent; guessing gives a loss of {math.log(answers):.3f} and {100 / answers:.1f} %. The loss of "
        "the answer among all words also falls by learning the form of such sentences.\n\nThe task was not "
        "chosen blindly: of five designs that were tried for a few steps, with this test in view, it is the "
        "first in which any method learned much; in the others MiCA, tried in all of them, and LoRA, tried "
        "in one, did not.",
        f"### Forgotten\n\n{_measures(result, FORGOTTEN)}",
        f"### Cost\n\n{_cost(result)}\n\n{same}".rstrip(),
        f"### Learning rates\n\n{_tries(result)}",
        f"### Texts\n\n{_texts(result)}",
        _diverged(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path) -> str:
    """Write the tables of the JSON file at ``path`` next to it; returns them."""
    text = report(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())), end="")
