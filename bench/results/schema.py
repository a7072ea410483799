"""What a run leaves behind: one JSON file of its cells, and what was refused and checked.

The file is pytest-benchmark's (`bench.results.benchmarks`), so that ``pytest-benchmark compare`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.results import benchmarks
from bench.results.cell import Group, Timing
from bench.results.names import BACKWARD, BOTH, FORWARD


@dataclass
class Result:
    """One run.

    ``refused``: cells, or implementations in them, that have no number, and why. ``checks``: what was tested
    in addition to the times: name, outcome, why. ``stages``: of a run on an accelerator, one summary each.
    """

    machine: dict[str, str | int | bool]
    groups: list[Group]
    refused: list[dict[str, str]] = field(default_factory=list)
    checks: list[dict[str, str]] = field(default_factory=list)
    stages: list[dict] = field(default_factory=list)

    def select(self, **axes: str | int) -> Iterator[Group]:
        """The groups whose axes have these values."""
        for group in self.groups:
            if all(group.axes.get(name) == value for name, value in axes.items()):
                yield group

    @classmethod
    def load(cls, path: Path) -> Result:
        """From a file that `save` wrote, or that pytest-benchmark did in a run of the suites."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        result = cls(benchmarks.facts(raw), [], **benchmarks.records(raw))
        groups: dict[str, Group] = {}
        for entry in raw["benchmarks"]:
            info = entry["extra_info"]
            group = groups.setdefault(entry["group"], Group(entry["group"], info["axes"]))
            timing = Timing(entry["stats"]["data"], info["facts"], info["work"])
            group.timings[info["implementation"]] = timing
        result.groups.extend(groups.values())
        return result

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
            axes, summed = ({**forward.axes, "pass": which} for which in (BACKWARD, BOTH))
            for backward in self.select(**axes) if not any(self.select(**summed)) else ():
                both = Group(forward.name.replace(FORWARD, BOTH), summed)
                for name in (one for one in forward.timings if one in backward.timings):
                    # in an interrupted run one may have one round more
                    first, second = forward.timings[name], backward.timings[name]
                    pairs = zip(first.seconds, second.seconds, strict=False)
                    both.timings[name] = Timing([a + b for a, b in pairs], {**first.facts}, {**first.work})
                groups += [both] if both.timings else []
        return Result(self.machine, groups, self.refused, self.checks, self.stages)
