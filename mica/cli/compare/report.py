"""What a comparison has found, as ``compare.json`` holds it and the page tells it."""

import math
from importlib.metadata import version
from typing import Any

import torch

from mica.cli.compare import schedule
from mica.cli.compare.curves import Result
from mica.cli.compare.methods import METHODS
from mica.cli.compare.schedule import BASE, Question, Results
from mica.cli.compare.verdict import Estimate, Verdict, learned_by, verdict

_PACKAGES = ("torch", "transformers", "peft", "accelerate")


def report(question: Question, results: Results, settings: dict, facts: dict) -> dict[str, Any]:
    """All that the page says, and what it follows from.

    ``settings``: as given. ``facts``: of model, texts and machine.
    """
    found = schedule.by_method(question, results, schedule.WHOLE, schedule.SEEDS)
    base = results[BASE]
    equal = verdict(base, found)
    return {
        "settings": settings,
        "facts": facts | {"versions": {name: version(name) for name in _PACKAGES}},
        "equal": _as_json(equal),
        "any": _as_json(verdict(base, found, math.inf)),
        "costs": {method: _costs(some) for method, some in found.items()},
        "curves": _curves(equal),
        "failed": _failed(results),
        "not_done": schedule.not_done(question, results),
        "seconds": max(one["ended"] for one in results.values()),
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
    steps = sorted(one["step_seconds"] for one in some)
    return {
        "trained_parameters": some[0]["trained_parameters"],
        "bytes": some[0]["bytes"],
        "step_seconds": steps[len(steps) // 2],
    }


def _as_json(found: Verdict) -> dict[str, Any]:
    """JSON has no infinity: null."""
    rows = []
    for method, choice in found.choices.items():
        rows.append(
            {
                "method": method,
                "learned": _estimate(found.learned[method]),
                "behind": _estimate(found.lead[method]) if method in found.lead else None,
                "tied": method in found.tied,
                "rate": choice.rate,
                "steps": choice.steps,
                "stop": choice.first.step,
                "share": choice.first.share,
                "forgotten": choice.forgotten,
                "seeds": len(choice.seeds),
            }
        )
    return {"limit": _finite(found.limit), "methods": rows}


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {"mean": found.mean, "half": _finite(found.half)}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _curves(at_limit: Verdict) -> dict[str, list[list[float | None]]]:
    """The course of each chosen training, by title: forgotten, learned, and half of its interval or null."""
    choices = {method: at_limit.choices[method] for method in METHODS if method in at_limit.choices}
    drawn: dict[str, list] = {METHODS[method].title: [] for method in choices}
    stops = [len(choice.courses[0]) for choice in choices.values()]
    for number in range(min(stops, default=0)):
        there = {method: choice.at_stop(number) for method, choice in choices.items()}
        for method, learned in learned_by(there).items():
            point = [there[method].forgotten, learned.mean, _finite(learned.half)]
            drawn[METHODS[method].title].append(point)
    return drawn


def facts(trainings) -> dict[str, Any]:
    """Of model, texts and device, for the page."""
    data = trainings.data
    device = trainings.base.device
    name = "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "parameters": trainings.base.num_parameters(),
        "dtype": str(trainings.base.dtype).removeprefix("torch."),
        "device": name,
        "tokens": sum(part.tokens for part in data.parts),
        "blocks": len(data.train),
        "sequence_length": data.sequence_length,
        **{name: len(blocks) for name, blocks in trainings.sets.items()},
        "retained": len(data.retain),
    }
