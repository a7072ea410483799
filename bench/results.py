"""What a run leaves behind: one JSON file a run, and the numbers that follow from it.

pytest-benchmark writes an entry a round and rival; `fold` keeps of them what is measured, a list of seconds
for each rival of a group, and drops what repeats. A ratio is always of one and the same round, in which the
rivals took turns: a machine that slows down slows both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import comb, exp, inf, log
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy.special import stdtrit  # quantiles of Student's t

BARE, STOCK, FAST = "bare frozen model", "stock PEFT", "mica.fast"
STOCK_16 = "stock PEFT, adapters in the base dtype"
UNGROUPED, GROUPED = "mica.fast, ungrouped", "mica.fast, grouped"
LORA, COMPILED, ATEN = "PEFT LoRA", "stock PEFT, torch.compile", "aten control"
FLOAT32 = "mica.fast, float32"
SVD = "torch.linalg.svd"
SVD_TALL = f"{SVD}, tall"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
NO_GRADIENT = "forward without gradient"


class Ratio(NamedTuple):
    """The median over the rounds, and an interval that holds the true one (see `interval`)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.high == inf:
            return f"{self.median:.3f} (one round)"
        digits = 2 if abs(self.median) < 100 else 0
        return f"{self.median:.{digits + 1}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"

    def overlaps(self, other: Ratio) -> bool:
        return self.low <= other.high and other.low <= self.high


def interval(values: list[float]) -> Ratio:
    """Median and a confidence interval of at least 95 %.

    By order statistics: the k-th smallest and k-th largest enclose the true median unless fewer than k values
    lie on one side of it, whatever the distribution. With fewer than 6 values even the range holds it with
    less than 95 %; then Student's interval, of the logarithms where all are positive, and at least the range.
    Of one value nothing is known: from 0 to infinity.
    """
    ordered, n = sorted(values), len(values)
    if n == 1:
        return Ratio(ordered[0], 0.0, inf)
    if n < 6:
        return _students(ordered)
    k = 1
    while 2 * sum(comb(n, below) for below in range(k + 1)) <= 0.05 * 2**n:
        k += 1
    return Ratio(median(ordered), ordered[k - 1], ordered[n - k])


def _students(ordered: list[float]) -> Ratio:
    positive = ordered[0] > 0
    numbers = [log(value) for value in ordered] if positive else ordered
    reach = stdtrit(len(numbers) - 1, 0.975) * stdev(numbers) / len(numbers) ** 0.5
    ends = mean(numbers) - reach, mean(numbers) + reach
    low, high = map(exp, ends) if positive else ends
    return Ratio(median(ordered), min(low, ordered[0]), max(high, ordered[-1]))


@dataclass
class Rival:
    """Seconds of every round, and what was counted or measured beside the time."""

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass
class Group:
    """Rivals that did the same work in turns. ``axes``: what work (suite, tokens, rank, dtype, …)."""

    name: str
    axes: dict[str, str | int]
    rivals: dict[str, Rival] = field(default_factory=dict)

    def ratio(self, rival: str, baseline: str) -> Ratio:
        """rival ÷ baseline."""
        pairs = zip(self.rivals[rival].seconds, self.rivals[baseline].seconds, strict=True)
        return interval([a / b for a, b in pairs])

    def overhead(self, rival: str, baseline: str, bare: str = BARE) -> Ratio | None:
        """(rival - bare) of each round ÷ the median of (baseline - bare); None where that is not positive.

        The divisor is a median: a round in which the baseline happens to be hardly slower than the bare model
        would blow up a quotient of its own.
        """
        extra, unit = (
            [a - b for a, b in zip(self.rivals[one].seconds, self.rivals[bare].seconds, strict=True)]
            for one in (rival, baseline)
        )
        if median(unit) <= 0:
            return None
        return interval([value / median(unit) for value in extra])


@dataclass
class Result:
    """One run. ``refused``: cells that have no number, and why."""

    machine: dict[str, str | int | bool]
    groups: list[Group]
    refused: list[dict[str, str]] = field(default_factory=list)

    def select(self, **axes: str | int) -> Iterator[Group]:
        """The groups whose axes have these values."""
        for group in self.groups:
            if all(group.axes.get(name) == value for name, value in axes.items()):
                yield group

    @classmethod
    def load(cls, path: Path) -> Result:
        """Of a file that `save` wrote, or pytest-benchmark."""
        raw = json.loads(path.read_text())
        if "benchmarks" in raw:
            return fold(raw)
        groups = [
            Group(one["name"], one["axes"], {name: Rival(**rival) for name, rival in one["rivals"].items()})
            for one in raw["groups"]
        ]
        return cls(raw["machine"], groups, raw["refused"])

    def save(self, path: Path) -> None:
        """As JSON, a line a rival."""
        head = {"machine": self.machine, "refused": self.refused}
        lines = json.dumps(head, indent=1)[:-2] + ',\n "groups": [\n'
        blocks = []
        for group in self.groups:
            rivals = (
                f"   {json.dumps(name)}: {json.dumps(asdict(rival))}" for name, rival in group.rivals.items()
            )
            opening = f'  {{"name": {json.dumps(group.name)}, "axes": {json.dumps(group.axes)},'
            blocks.append(opening + ' "rivals": {\n' + ",\n".join(rivals) + "\n  }}")
        path.write_text(lines + ",\n".join(blocks) + "\n ]\n}\n")

    def with_both(self) -> Result:
        """Also the sums of forward and backward of one round, where both were timed."""
        found = [*self.groups]
        for forward in self.select(**{"pass": FORWARD}):
            axes = {**forward.axes, "pass": BACKWARD}
            for backward in self.select(**axes):
                both = Group(forward.name.replace(FORWARD, BOTH), {**axes, "pass": BOTH})
                for name, rival in forward.rivals.items():
                    pairs = zip(rival.seconds, backward.rivals[name].seconds, strict=True)
                    both.rivals[name] = Rival([a + b for a, b in pairs], dict(rival.facts))
                found.append(both)
        return Result(self.machine, found, self.refused)


def joined(results: list[Result], refused: list[dict[str, str]]) -> Result:
    """Of suites that ran one after the other on one machine; its facts are the first one's."""
    groups = [group for result in results for group in result.groups]
    others = [refusal for result in results for refusal in result.refused]
    return Result(results[0].machine, groups, [*refused, *others])


# What of pytest-benchmark's machine_info and of `conftest`'s is kept.
_MACHINE = (
    "device",
    "threads",
    "bf16 instructions",
    "instructions limited to",
    "torch",
    "peft",
    "transformers",
    "bitsandbytes",
    "triton",
    "size",
)


def fold(raw: dict) -> Result:
    """pytest-benchmark's JSON, whose tests are rounds, as a `Result`."""
    groups: dict[str, Group] = {}
    for benchmark in raw["benchmarks"]:
        facts = dict(benchmark["extra_info"])
        name, axes = facts.pop("rival"), facts.pop("axes", {})
        group = groups.setdefault(benchmark["group"], Group(benchmark["group"], axes))
        rival = group.rivals.setdefault(name, Rival())
        rival.seconds.append(float(f"{benchmark['stats']['median']:.5g}"))
        rival.facts |= facts
    refused = []
    for group in [*groups.values()]:
        if len({len(rival.seconds) for rival in group.rivals.values()}) > 1:  # a test failed after its timing
            refused.append({"group": group.name, "why": "not every rival has all rounds"})
            del groups[group.name]
    info = raw["machine_info"]
    machine = {
        "cpu": info.get("cpu", {}).get("brand_raw") or info["machine"],
        "python": info["python_version"],
        **{key: info[key] for key in _MACHINE if key in info},
        "commit": raw["commit_info"].get("id"),
        "uncommitted_changes": raw["commit_info"].get("dirty"),
        "datetime": raw["datetime"],
    }
    return Result(machine, list(groups.values()), refused)
