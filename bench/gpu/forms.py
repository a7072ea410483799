"""The rows of `mica.kernels.configs.FORMS` that a run on a GPU has measured."""

from __future__ import annotations

from bench.results.cell import Group
from bench.results.names import BACKWARD, DEVICE_TIME, FORWARD, of_form
from bench.results.schema import Result
from mica.kernels.configs import FORM_NAMES


def fastest(groups: list[Group]) -> str | None:
    """The form that takes the least time for all of these layers; None if none was timed."""
    times = {}
    for word in FORM_NAMES:
        name = of_form(word)
        if groups and all(name in group.timings for group in groups):
            times[word] = sum(group.timings[name].median for group in groups)
    return min(times, key=times.get, default=None)


def table(result: Result) -> str:
    """As Python, to be put there, the most tokens first; without what was not timed."""
    timed = {"suite": "forms", "clock": DEVICE_TIME}
    sizes = {(group.axes["tokens"], group.axes["rank"]) for group in result.select(**timed)}
    lines = []
    for tokens, rank in sorted(sizes, key=lambda size: (-size[0], size[1])):
        layers = {**timed, "tokens": tokens, "rank": rank}
        forward = fastest([*result.select(**layers, **{"pass": FORWARD})])
        backward = fastest([*result.select(**layers, **{"pass": BACKWARD})])
        if forward and backward:
            lines.append(f'    Forms({tokens}, {rank}, "{forward}", "{backward}"),')
    if not lines:
        return ""
    return "\n".join([f'"{result.machine["device"]}": (', *lines, "),"])
