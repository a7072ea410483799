"""What a comparison has found, as ``compare.json`` holds it and the page tells it."""

import math
from importlib.metadata import version
from statistics import mean, median_high
from typing import Any

import torch

from mica.cli.compare import schedule
from mica.cli.compare.outcomes import RETAINED, Choice, Result, outcome
from mica.cli.compare.schedule import Comparison
from mica.cli.compare.verdict import Lead, verdict

_PACKAGES = ("torch", "transformers", "peft", "accelerate")


def report(comparison: Comparison, settings: dict, facts: dict) -> dict[str, Any]:
    """All that the page says, and what it follows from.

    ``settings``: as given. ``facts``: of model, texts and machine.
    """
    found = comparison.by_method(schedule.WHOLE, schedule.SEEDS)
    base = comparison.base
    judged = verdict(base, found)
    rows = [_row(base, method, choice, judged.lead.get(method)) for method, choice in judged.choices.items()]
    return {
        "settings": settings,
        "facts": facts | {"versions": {name: version(name) for name in _PACKAGES}},
        "perplexity": _perplexity(base, 0.0, 0.0),
        "limit": judged.limit,
        "methods": rows,
        "costs": {method: _costs(some) for method, some in found.items()},
        "points": {method: _points(base, some) for method, some in found.items()},
        "failed": [_failure(run) for run in comparison.results.values() if run["failed"]],
        "seconds": comparison.spent(),
        "results": comparison.results,
    }


def _failure(run: Result) -> str:
    """A line on a training that did not come to its end."""
    text = f"{run['method']}, learning rate {run['rate']:g}, seed {run['seed']}: {run['failed']}"
    if run["phase"] == schedule.TRIAL:
        text += "; the method was left out"
    return text


def _costs(some: list[Result]) -> dict[str, float]:
    """Trained parameters, bytes of weights, gradients and optimiser, seconds a step (the median training)."""
    return {
        "trained_parameters": some[0]["trained_parameters"],
        "bytes": some[0]["bytes"],
        "step_seconds": median_high(run["step_seconds"] for run in some),
    }


def _row(base: Result, method: str, choice: Choice, lead: Lead | None) -> dict[str, Any]:
    """A method at equal forgetting; ``lead``: of the best over it."""
    learned, forgotten = choice.mean("learned"), choice.mean("forgotten")
    return {
        "method": method,
        "learned": learned,
        "forgotten": forgotten,
        "perplexity": _perplexity(base, learned, forgotten),
        "behind": lead and _behind(lead),
        "rate": choice.rate,
        "steps": choice.steps,
        "share": choice.mean("share"),
        "seeds": len(choice.seeds),
    }


def _behind(lead: Lead) -> dict[str, Any]:
    """JSON has no infinity: null where nothing can be said."""
    half = lead.half
    if math.isinf(half):
        half = None
    return {"mean": lead.mean, "half": half, "tied": not lead.is_certain, "doubt": lead.doubt}


def _perplexity(base: Result, learned: float, forgotten: float) -> dict[str, float]:
    """On the blocks of the test and on the retained ones, once so much was learned and forgotten."""
    retained = [loss for name in RETAINED for loss in base[name]]
    return {
        "held_out": math.exp(mean(base["test"]) - learned),
        "retained": math.exp(mean(retained) + forgotten),
    }


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
    retained = {document for name in RETAINED for document in documents[name]}
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
