"""What a run leaves behind: one JSON file of its cells, and what was refused and checked.

The file is pytest-benchmark's (`bench.results.benchmarks`), so that ``pytest-benchmark compare`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.results import benchmarks
from bench.results.cell import Group, Timing
from bench.results.names import BACKWARD, BOTH, FORWARD


@dataclass
class Result:
    """One run.

    ``refused``: cells, or implementations in them, that have no number, and why. ``checks``: what was tested
    in addition to the times: name, outcome, why. ``stages``: the processes of the run, one summary each.
    """

    machine: dict[str, str | int | bool]
    groups: list[Group]
    refused: list[dict[str, str]] = field(default_factory=list)
    checks: list[dict[str, str]] = field(default_factory=list)
    stages: list[dict] = field(default_factory=list)

    def select(self, **axes: str | int) -> Iterator[Group]:
        """The groups whose axes have these values."""
        for group in self.groups:
            if axes.items() <= group.axes.items():
                yield group

    @classmethod
    def load(cls, path: Path) -> Result:
        """From a file that `save` wrote, or that pytest-benchmark did in a run of the suites."""
        document = json.loads(path.read_text(encoding="utf-8"))
        groups: dict[str, Group] = {}
        for entry in document["benchmarks"]:
            info = entry["extra_info"]
            group = groups.setdefault(entry["group"], Group(entry["group"], info["axes"]))
            timing = Timing(entry["stats"]["data"], info["facts"], info["work"], info.get("wall", []))
            group.timings[info["implementation"]] = timing
        return cls(benchmarks.facts(document), [*groups.values()], **benchmarks.records(document))

    def save(self, path: Path) -> None:
        """As JSON, a line for each benchmark and each other record; the file is complete at every moment."""
        scratch = path.with_suffix(".part")
        lists = {name: getattr(self, name) for name in benchmarks.RECORDS}
        scratch.write_text(benchmarks.document(self.machine, self.groups, lists), encoding="utf-8")
        scratch.replace(path)

    def with_both(self) -> Result:
        """With the sums of forward and backward within a round, where both were timed and the sum was not."""
        groups = [*self.groups]
        for forward in self.select(**{"pass": FORWARD}):
            backward = self.other_pass(forward, BACKWARD)
            if backward is not None and self.other_pass(forward, BOTH) is None:
                both = _sum(forward, backward)
                if both.timings:
                    groups.append(both)
        return replace(self, groups=groups)

    def other_pass(self, group: Group, which: str) -> Group | None:
        """The same cell's other pass: no other axis differs, and none is added, as dropout is."""
        axes = _of_pass(group, which)
        return next((other for other in self.groups if other.axes == axes), None)


def _of_pass(group: Group, which: str) -> dict[str, str | int]:
    """The axes of the same cell's other pass."""
    return {**group.axes, "pass": which}


def _sum(forward: Group, backward: Group) -> Group:
    """Both passes together, for the implementations that both have."""
    both = Group(forward.name.replace(FORWARD, BOTH), _of_pass(forward, BOTH))
    for name, first in forward.timings.items():
        if name not in backward.timings:
            continue
        second = backward.timings[name]
        seconds = _sums(first.seconds, second.seconds)
        wall = _sums(first.wall, second.wall)
        both.timings[name] = Timing(seconds, {**first.facts}, {**first.work}, wall)
    return both


def _sums(first: list[float], second: list[float]) -> list[float]:
    """Round by round; one of the passes may have taken more of them."""
    return [sum(pair) for pair in zip(first, second, strict=False)]
