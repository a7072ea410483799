"""Which run comes next, at which learning rate: both follow from a result, so a run goes on after a stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FACTOR = 2.0  # from the best rate to one beyond what was tried


def next_rate(tried: dict[float, float], rates: Sequence[float], limit: int) -> float | None:
    """The learning rate to try after ``tried``: rate -> validation loss, infinite where it diverged.

    First all of ``rates``, then beyond the best one while that is at an edge of what was tried. None when the
    best one is enclosed, or when there are ``limit`` tries.
    """
    left = [rate for rate in rates if rate not in tried]
    if len(tried) >= limit or left:
        return left[0] if len(tried) < limit else None
    rate = best(tried)
    if rate in (None, min(tried)) and rate != max(tried):
        beyond = min(tried) / FACTOR
    elif rate == max(tried):
        beyond = rate * FACTOR
    else:
        return None
    return float(f"{beyond:.2g}")


def best(tried: dict[float, float]) -> float | None:
    """The rate with the lowest finite validation loss, None if there is none."""
    finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


def is_enclosed(tried: dict[float, float]) -> bool:
    """Whether worse rates were tried on both sides of the best; otherwise a better one may lie outside."""
    return best(tried) not in (None, min(tried, default=None), max(tried, default=None))


class Planned(NamedTuple):
    """One training run to do."""

    method: str
    rate: float
    seed: int


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


def next_run(result: dict) -> Planned | None:
    """What to do next, None when everything is done.

    First the rates of the adapters with seed 0, in turns, then their seeds, in turns, then full fine-tuning:
    a result that ends early has all adapters, with as many rates and seeds each.
    """
    adapters = [name for name, facts in result["methods"].items() if facts["kind"] != "full"]
    others = [name for name in result["methods"] if name not in adapters]
    for names in (adapters, others):
        for options in ([_next_rate(result, name) for name in names], [_next_seed(result, n) for n in names]):
            if found := [one for one in options if one]:
                return min(found, key=lambda one: _count(result, one))
    return None


def missing(result: dict) -> list[str]:
    """What `next_run` would still do, one sentence a method."""
    lines = []
    for name, facts in result["methods"].items():
        rates, limit = tried(result, name), result["settings"]["tries"]
        parts = [f"{rate:g}" for rate in facts["rates"][:limit] if rate not in rates]
        parts = [f"learning rate {', '.join(parts)}"] if parts else []
        if not parts and _next_rate(result, name):
            parts.append("a learning rate beyond those tried")
        if planned := _missing_seeds(result, name):
            parts.append(f"seed {', '.join(map(str, planned))}")
        if parts:
            lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def verdict(result: dict, method: str) -> str:
    """Of the search for a learning rate: whether worse ones were tried on both sides of the chosen one."""
    rates = tried(result, method)
    if best(rates) is None:
        return "none converged" if rates else "not tried"
    if is_enclosed(rates):
        return "worse ones on both sides"
    return f"at an edge of the {len(rates)} tried" + ("" if _next_rate(result, method) else ", the limit")


def _next_rate(result: dict, method: str) -> Planned | None:
    rates, settings = tried(result, method), result["settings"]
    rate = next_rate(rates, result["methods"][method]["rates"], settings["tries"])
    return Planned(method, rate, 0) if rate else None


def _missing_seeds(result: dict, method: str) -> list[int]:
    count = result["methods"][method]["seeds"] or result["settings"]["seeds"]
    rate = chosen_rate(result, method)
    done = {run["seed"] for run in result["runs"] if (run["method"], run["rate"]) == (method, rate)}
    never_converged = rate is None and _next_rate(result, method) is None
    return [] if never_converged else [seed for seed in range(1, count) if seed not in done]


def _next_seed(result: dict, method: str) -> Planned | None:
    seeds, rate = _missing_seeds(result, method), chosen_rate(result, method)
    return Planned(method, rate, seeds[0]) if seeds and rate else None


def _count(result: dict, planned: Planned) -> int:
    """Runs of the same method that are done, of first seeds or of others."""
    kind = (planned.method, planned.seed > 0)
    return sum((run["method"], run["seed"] > 0) == kind for run in result["runs"])
