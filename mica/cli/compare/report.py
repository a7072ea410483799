"""What a comparison has found, as ``compare.json`` holds it and the page tells it."""

import math
from importlib.metadata import version
from statistics import mean, median_high
from typing import Any

import torch

from mica.cli.compare import advice, schedule
from mica.cli.compare.outcomes import RETAINED, Result, outcome
from mica.cli.compare.schedule import Comparison, Results
from mica.cli.compare.verdict import Verdict, verdict

_PACKAGES = ("torch", "transformers", "peft", "accelerate")


def report(comparison: Comparison, settings: dict, facts: dict) -> dict[str, Any]:
    """All that the page says, and what it follows from.

    ``settings``: as given. ``facts``: of model, texts and machine.
    """
    found = comparison.by_method(schedule.WHOLE, schedule.SEEDS)
    base = comparison.base
    results = comparison.results
    equal = verdict(base, found)
    return {
        "settings": settings,
        "facts": facts | {"versions": {name: version(name) for name in _PACKAGES}},
        "perplexity": _perplexity(base, 0.0, 0.0),
        "equal": _as_json(base, equal),
        "any": _as_json(base, verdict(base, found, math.inf)),
        "undecided": [_undecided(comparison, equal, method) for method in equal.tied],
        "costs": {method: _costs(some) for method, some in found.items()},
        "points": {method: _points(base, some) for method, some in found.items()},
        "failed": _failed(results),
        "not_done": comparison.not_done(),
        "seconds": comparison.spent(),
        "results": results,
    }


def _failed(results: Results) -> list[str]:
    """A line for each training that did not come to its end, and for a method that was left out for it."""
    lines = []
    for one in results.values():
        if one["failed"] is None:
            continue
        text = f"{one['method']}, learning rate {one['rate']:g}, seed {one['seed']}: {one['failed']}"
        if one["phase"] == schedule.TRIAL:
            text += "; the method was left out"
        lines.append(text)
    return lines


def _costs(some: list[Result]) -> dict[str, float]:
    """Trained parameters, bytes of weights, gradients and optimiser, seconds a step (the median training)."""
    return {
        "trained_parameters": some[0]["trained_parameters"],
        "bytes": some[0]["bytes"],
        "step_seconds": median_high(one["step_seconds"] for one in some),
    }


def _as_json(base: Result, found: Verdict) -> dict[str, Any]:
    """JSON has no infinity: null."""
    rows = []
    for method, choice in found.choices.items():
        learned, forgotten = choice.mean("learned"), choice.mean("forgotten")
        lead = found.lead.get(method)
        rows.append(
            {
                "method": method,
                "learned": learned,
                "forgotten": forgotten,
                "perplexity": _perplexity(base, learned, forgotten),
                "behind": lead and {"mean": lead.mean, "half": _finite(lead.half)},
                "tied": method in found.tied,
                "rate": choice.rate,
                "steps": choice.steps,
                "share": choice.mean("share"),
                "seeds": len(choice.seeds),
            }
        )
    return {"limit": _finite(found.limit), "methods": rows}


def _perplexity(base: Result, learned: float, forgotten: float) -> dict[str, float]:
    """On the blocks of the test and on the retained ones, once so much was learned and forgotten."""
    retained = [loss for name in RETAINED for loss in base[name]]
    return {
        "held_out": math.exp(mean(base["test"]) - learned),
        "retained": math.exp(mean(retained) + forgotten),
    }


def _undecided(comparison: Comparison, equal: Verdict, method: str) -> dict[str, Any]:
    """Of a method that may be as good as the best: what would decide, and what keeps it from being known."""
    needed = advice.needed(comparison, equal, method)
    return {
        "method": method,
        "needed": needed and needed._asdict(),
        "missing": advice.missing(equal.lead[method]),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _points(base: Result, some: list[Result]) -> list[list[float]]:
    """What each training has forgotten and learned."""
    ends = [outcome(base, run) for run in some]
    return [[float(end.forgotten.mean()), float(end.learned.mean())] for end in ends]


def facts(trainings) -> dict[str, Any]:
    """What the page says of model, texts and device."""
    data = trainings.data
    device = trainings.base.device
    name = "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    documents = trainings.documents()
    retained = {one for name in RETAINED for one in documents[name]}
    return {
        "parameters": trainings.base.num_parameters(),
        "dtype": str(trainings.base.dtype).removeprefix("torch."),
        "device": name,
        "tokens": sum(part.tokens for part in data.parts),
        "blocks": len(data.train),
        "sequence_length": data.sequence_length,
        **{name: len(blocks) for name, blocks in trainings.sets.items()},
        "retained": len(data.retain),
        "documents": {"test": len(set(documents["test"])), "retained": len(retained)},
    }
