"""Compares two runs: ``python -m bench.report.compare OLD.json NEW.json`` reports what became slower.

Machines drift, and so does their load, so what is compared is each implementation's ratio to a baseline of
the same run, round by round, never seconds. A ratio changed if its two intervals do not overlap and the
median moved by more than the tolerance. Both, because chance separates intervals, too: with equal truth and 5
rounds each in 1 of 126 ratios, with 3 rounds in 1 of 10, by about the noise of a round. In simulated runs
with noise of 3 % uniform, 5 % of tolerance called 13 of 1600 unchanged ratios slower with 3 rounds and none
with 5: confirm a lone regression by a second run. A change within a wide interval is not seen.

What is slower, needs more memory or is refused now, and is ours, is a regression. Ratios of the other
implementations only show that the baseline or the machine behaves differently.

Exit status: 0 no regression, 1 regressions, 2 there is nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.report.frame import ONE_PROCESS
from bench.report.markdown import markdown_table
from bench.results.cell import Group, Ratio, is_refused
from bench.results.names import BARE, COPY, CUBLAS, FAST, LORA, STOCK, SVD
from bench.results.schema import Result

# The first two where the group has them, else the first of the others that it has
BASELINES, OTHER_BASELINES = (STOCK, BARE), (SVD, LORA, ONE_PROCESS, COPY)
OURS = (FAST, "minor_subspace")
# Counted bytes are reproducible, and may grow by this factor. A process's peak is not: that of the bare
# model's step differed by a factor of 1.9 between two runs.
MEMORY, GROWTH = "saved_mb", 1.01
# What must be equal, and what is reported where it differs
_MACHINE = ("cpu", "device", "threads", "bf16 instructions")
_CIRCUMSTANCES = ("python", "torch", "peft", "transformers", "triton", "size")
HEADER = ["new ÷ old", "cell", "implementation", "against", "old", "new"]


class UnusableError(Exception):
    """These files cannot be compared; the message is one sentence."""


@dataclass
class Comparison:
    """``agreeing`` of ``ratios`` have overlapping intervals; ``missing``: ours that only the old run has.

    ``slower``, ``faster`` and ``moved`` (which are not ours): new ÷ old, cell, implementation, baseline or
    which memory, the two figures.
    """

    slower: list[tuple] = field(default_factory=list)
    faster: list[tuple] = field(default_factory=list)
    moved: list[tuple] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ratios: int = 0
    agreeing: int = 0

    def add(self, group: Group, name: str, factor: float, *details: str) -> None:
        changed = self.moved if not is_ours(group, name) else self.slower if factor > 1 else self.faster
        changed.append((factor, group.name, name, *details))


def is_ours(group: Group, name: str) -> bool:
    """What is compared with a copy are configurations of our kernels."""
    return name.startswith(OURS) or (COPY in group.timings and name not in (COPY, CUBLAS))


def ratios(group: Group) -> Iterator[tuple[str, str, Ratio]]:
    """(implementation, baseline, ratio). STOCK ÷ BARE, not the reverse as well."""
    bases = [name for name in BASELINES if name in group.timings]
    bases = bases or [name for name in OTHER_BASELINES if name in group.timings][:1]
    for i, base in enumerate(bases):
        for name in group.timings:
            if name not in bases[i:]:
                yield name, base, group.ratio(name, base)


def _cells(result: Result) -> dict[tuple, Group]:
    """By their axes, if they have any: names may be reworded."""
    return {tuple(sorted(group.axes.items())) or (group.name,): group for group in result.groups}


def compare(old: Result, new: Result, tolerance: float) -> Comparison:
    """Of the cells that both have; those of ours that only the old one has are listed."""
    found, later = Comparison(), _cells(new)
    for key, before in _cells(old).items():
        after = later.get(key, Group(before.name, before.axes))
        for name in before.timings:
            if name in after.timings:
                used, uses = (group.timings[name].facts.get(MEMORY) for group in (before, after))
                if used and uses and not used / GROWTH <= uses <= used * GROWTH:
                    found.add(before, name, uses / used, MEMORY, f"{used:.4g}", f"{uses:.4g}")
            elif is_ours(before, name):
                whys = [one["why"] for one in new.refused if is_refused(one, before.name, name)]
                cell = f"{before.name}, {name}"
                found.refused.extend(f"{cell}: {why}" for why in whys[:1])
                found.missing.extend([] if whys else [cell])
        new_ratios = {(name, base): ratio for name, base, ratio in ratios(after)}
        for name, base, was in ratios(before):
            if (now := new_ratios.get((name, base))) is None:
                if name in after.timings and is_ours(before, name):
                    found.missing.append(f"{before.name}, {name} ÷ {base}")
                continue
            found.ratios += 1
            found.agreeing += was.overlaps(now)
            factor = now.median / was.median
            if not was.overlaps(now) and max(factor, 1 / factor) > 1 + tolerance:
                found.add(before, name, factor, f"÷ {base}", str(was), str(now))
    found.faster.sort()
    found.slower.sort(reverse=True)
    found.moved.sort(reverse=True)
    return found


def load(path: Path) -> Result:
    """Validated as far as `compare` needs it."""
    try:
        result = Result.load(path)
        result.machine.get("cpu")
        for group in result.groups:
            counts = {len(timing.seconds) for timing in group.timings.values()}
            if len(counts) > 1 or 0 in counts:
                raise UnusableError(
                    f"{path} has implementations of different numbers of rounds in {group.name!r}."
                )
    except OSError as error:
        raise UnusableError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise UnusableError(f"{path} is not the result of a run ({kind}).") from error
    return result


def text(found: Comparison, old: Result, new: Result) -> str:
    """The report, as Markdown: regressions first, the worst on top."""
    parts = [
        f"{key}: {old.machine[key]} before, {new.machine.get(key)} now"
        for key in _CIRCUMSTANCES
        if key in old.machine and old.machine[key] != new.machine.get(key)
    ]
    for title, changes in (
        ("Slower, or more memory", found.slower),
        ("Refused now", found.refused),
        ("Faster, or less memory", found.faster),
        ("Moved: not ours, so the baseline or the machine changed", found.moved),
        ("Missing now", found.missing),
    ):
        lines = [f"- {one}" for one in changes if isinstance(one, str)]
        rows = [[f"{factor:.3f}", *details] for factor, *details in changes if not lines]
        if changes:
            parts.append(f"### {title}\n\n" + ("\n".join(lines) or markdown_table(HEADER, rows)))
    count = len(found.slower) + len(found.refused)
    verdict = f"{count} regressions" if count else "no regression"
    parts.append(f"{found.agreeing} of {found.ratios} ratios agree (their intervals overlap): {verdict}.")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.compare", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("old", type=Path, help="a run's JSON file")
    parser.add_argument("new", type=Path, help="a later run's")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a ratio's median (default 0.05)")
    args = parser.parse_args(argv)
    try:
        old, new = load(args.old), load(args.new)
        for what in _MACHINE:
            if (was := old.machine.get(what)) != (now := new.machine.get(what)):
                raise UnusableError(f"{args.new} is of another machine ({what}: {was} before, {now} there).")
        found = compare(old, new, args.tolerance)
        if not found.ratios and not found.refused:
            raise UnusableError(f"{args.new} has no ratio that {args.old} has.")
    except UnusableError as error:
        print(f"bench.report.compare: {error}", file=sys.stderr)
        return 2
    print(text(found, old, new), end="")
    return int(bool(found.slower or found.refused))


if __name__ == "__main__":
    sys.exit(main())
