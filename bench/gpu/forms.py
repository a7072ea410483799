"""The rows of `mica.kernels.configs.FORMS` that a run on a GPU has measured."""

from __future__ import annotations

from bench.results import names
from bench.results.names import BACKWARD, DEVICE_TIME, FORWARD
from bench.results.schema import Result
from mica.kernels.configs import FORM_NAMES

FORMS = {names.of_form(word): word for word in FORM_NAMES}


def fastest(result: Result, tokens: int, rank: int, part: str) -> str | None:
    """The form that takes least of the device's time for all layers of this size; None if none was timed."""
    axes = {"suite": "forms", "tokens": tokens, "rank": rank, "pass": part, "clock": DEVICE_TIME}
    groups = list(result.select(**axes))
    timed = [name for name in FORMS if groups and all(name in group.timings for group in groups)]
    best = min(timed, key=lambda name: sum(group.timings[name].median for group in groups), default=None)
    return FORMS.get(best)


def table(result: Result) -> str:
    """As Python, to be put there; without what was not timed."""
    cells = result.select(suite="forms", clock=DEVICE_TIME)
    sizes = {(group.axes["tokens"], group.axes["rank"]) for group in cells}
    rows = [
        (tokens, rank, *(fastest(result, tokens, rank, part) for part in (FORWARD, BACKWARD)))
        for tokens, rank in sorted(sizes, key=lambda size: (-size[0], size[1]))
    ]
    lines = ['    Forms({}, {}, "{}", "{}"),'.format(*row) for row in rows if None not in row]
    return "\n".join([f'"{result.machine["device"]}": (', *lines, "),"]) if lines else ""
