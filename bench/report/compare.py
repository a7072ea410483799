"""Two runs of the benchmarks: ``python -m bench.compare OLD.json NEW.json`` says what became slower.

Machines drift, and so do their neighbours; what is compared is each rival's ratio to a baseline of its own
run, round by round, never seconds. A ratio changed if its two intervals do not overlap and the median moved
by more than the tolerance. Both, because chance separates intervals, too: with equal truth and 5 rounds
each in 1 of 126 ratios, with 3 rounds in 1 of 10, with many in about 1 of 180. Among hundreds of ratios a
few do so, by about the noise of a round, which the tolerance covers. In simulated runs with noise of 3 %
uniform, 5 % of tolerance called 13 of 1600 unchanged ratios slower with 3 rounds and none with 5: a lone
regression asks for a second run. Nothing is concluded from a wide interval; a change that disappears in it
is not seen.

What is slower, needs more memory or is refused now, and is ours, is a regression. Ratios of other rivals only
tell that the baseline or the machine behaves differently.

Exit status: 0 no regression, 1 regressions, 2 there is nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.results.names import BARE, FAST, LORA, STOCK, SVD, SVD_TALL, UNGROUPED
from bench.results.schema import Group, Ratio, Result

# The first two where they are there; else the first of the others that is.
BASELINES = (STOCK, BARE)
OTHER_BASELINES = (SVD, SVD_TALL, LORA, UNGROUPED, "1 process")
OURS = (FAST, "minor_subspace")
# By what share it may grow: bytes that are counted repeat to the byte. A process's peak does not: that of the
# bare model's step differed by a factor of 1.9 between two runs.
MEMORY = {"saved_mb": 0.01}

# What is told where it differs.
_MACHINE = ("cpu", "device", "threads", "bf16 instructions")
_CIRCUMSTANCES = (*_MACHINE, "python", "torch", "peft", "transformers", "triton", "size")


class UnusableError(Exception):
    """Nothing can be said of these files; the message is one sentence with the file's name."""


class Change(NamedTuple):
    """``factor``: new ÷ old. ``against``: the baseline's name, or what of the memory."""

    factor: float
    cell: str
    rival: str
    against: str
    old: str
    new: str


@dataclass
class Comparison:
    """``agreeing`` of ``ratios`` have overlapping intervals; ``missing``: ours that only the old run has."""

    slower: list[Change] = field(default_factory=list)
    faster: list[Change] = field(default_factory=list)
    moved: list[Change] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ratios: int = 0
    agreeing: int = 0

    @property
    def regressed(self) -> bool:
        return bool(self.slower or self.refused)


def is_ours(rival: str) -> bool:
    return rival.startswith(OURS)


def baselines(group: Group) -> list[str]:
    found = [name for name in BASELINES if name in group.rivals]
    return found or [name for name in OTHER_BASELINES if name in group.rivals][:1]


def ratios(group: Group) -> Iterator[tuple[str, str, Ratio]]:
    """(rival, baseline, ratio). STOCK ÷ BARE, not the reverse as well."""
    bases = baselines(group)
    for i, base in enumerate(bases):
        for rival in group.rivals:
            if rival not in bases[i:]:
                yield rival, base, group.ratio(rival, base)


def _cells(result: Result) -> dict[tuple, Group]:
    """By their axes, where they have some: names may be reworded."""
    return {tuple(sorted(group.axes.items())) or (group.name,): group for group in result.groups}


def compare(old: Result, new: Result, tolerance: float) -> Comparison:
    """Of the cells that both have; those of ours that only the old one has are listed."""
    found, later = Comparison(), _cells(new)
    for key, before in _cells(old).items():
        after = later.get(key)
        for rival in before.rivals:
            if after is not None and rival in after.rivals:
                _memory(found, before, after, rival)
            elif is_ours(rival):
                _absent(found, before, rival, new)
        if after is not None:
            _times(found, before, after, tolerance)
    for changes in (found.slower, found.moved):
        changes.sort(key=lambda change: -change.factor)
    found.faster.sort(key=lambda change: change.factor)
    return found


def _times(found: Comparison, before: Group, after: Group, tolerance: float) -> None:
    new_ratios = {(rival, base): ratio for rival, base, ratio in ratios(after)}
    for rival, base, old in ratios(before):
        if (new := new_ratios.get((rival, base))) is None:
            if rival in after.rivals and is_ours(rival):
                found.missing.append(f"{before.name}, {rival} ÷ {base}")
            continue
        found.ratios += 1
        if old.overlaps(new):
            found.agreeing += 1
            continue
        change = Change(new.median / old.median, before.name, rival, f"÷ {base}", str(old), str(new))
        if max(change.factor, 1 / change.factor) > 1 + tolerance:
            _sort_in(found, change)


def _memory(found: Comparison, before: Group, after: Group, rival: str) -> None:
    for fact, tolerance in MEMORY.items():
        old, new = (group.rivals[rival].facts.get(fact) for group in (before, after))
        if old is None or new is None or old == new:
            continue
        factor = new / old if old else float("inf")
        if factor > 1 + tolerance or factor < 1 / (1 + tolerance):
            _sort_in(found, Change(factor, before.name, rival, fact, f"{old:.4g}", f"{new:.4g}"))


def _sort_in(found: Comparison, change: Change) -> None:
    if not is_ours(change.rival):
        found.moved.append(change)
    else:
        (found.slower if change.factor > 1 else found.faster).append(change)


def _absent(found: Comparison, group: Group, rival: str, new: Result) -> None:
    """A refusal names its group, and its rival unless it holds for all of them."""
    for refusal in new.refused:
        if group.name in refusal.values() and refusal.get("rival", rival) == rival:
            others = [value for value in refusal.values() if value not in (group.name, rival)]
            found.refused.append(f"{group.name}, {rival}: {', '.join(others) or 'refused'}")
            return
    found.missing.append(f"{group.name}, {rival}")


def load(path: Path) -> Result:
    """Checked as far as `compare` needs it."""
    try:
        result = Result.load(path)
        result.machine.get("cpu")
    except OSError as error:
        raise UnusableError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableError(
            f"{path} is no result of a benchmark run ({type(error).__name__}: {error})."
        ) from error
    for group in result.groups:
        rounds = {len(rival.seconds) for rival in group.rivals.values()}
        if len(rounds) > 1 or 0 in rounds:
            raise UnusableError(f"{path} has rivals of different numbers of rounds in {group.name!r}.")
        if not all(seconds > 0 for rival in group.rivals.values() for seconds in rival.seconds):
            raise UnusableError(f"{path} has times that are not positive in {group.name!r}.")
    return result


def check_machines(old: Result, new: Result, path: Path) -> None:
    for what in _MACHINE:
        was, now = (result.machine.get(what) for result in (old, new))
        if was != now:
            raise UnusableError(f"{path} is of another machine ({what}: {was} before, {now} there).")


def text(found: Comparison, old: Result, new: Result) -> str:
    """The report, as Markdown: regressions first, the worst on top."""
    lines = [
        f"{key}: {old.machine[key]} before, {new.machine.get(key)} now"
        for key in _CIRCUMSTANCES
        if key in old.machine and old.machine[key] != new.machine.get(key)
    ]
    tables = {
        "Slower, or more memory": found.slower,
        "Faster, or less memory": found.faster,
        "Moved: not ours, so the baseline or the machine changed": found.moved,
    }
    for title, changes in tables.items():
        if changes:
            lines += ["", f"### {title}", "", "| new ÷ old | cell | rival | against | old | new |"]
            lines += ["| ---: | --- | --- | --- | --- | --- |"]
            lines += [f"| {factor:.3f} | {' | '.join(cells)} |" for factor, *cells in changes]
        if changes is found.slower and found.refused:
            lines += ["", "### Refused now", "", *(f"- {cell}" for cell in found.refused)]
    if found.missing:
        lines += ["", "### Missing now", "", *(f"- {cell}" for cell in found.missing)]
    verdict = f"{len(found.slower) + len(found.refused)} regressions" if found.regressed else "no regression"
    lines += ["", f"{found.agreeing} of {found.ratios} ratios agree (their intervals overlap): {verdict}."]
    return "\n".join(lines).lstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("old", type=Path, help="a run's JSON file")
    parser.add_argument("new", type=Path, help="a later run's")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a ratio's median (default 0.05)")
    parser.add_argument("--across-machines", action="store_true", help="even if CPU or threads differ")
    args = parser.parse_args(argv)
    if args.tolerance < 0:
        parser.error("the tolerance is a share, 0 or more")
    try:
        old, new = load(args.old), load(args.new)
        if not args.across_machines:
            check_machines(old, new, args.new)
        found = compare(old, new, args.tolerance)
        if not found.ratios and not found.refused:
            raise UnusableError(f"{args.new} has no ratio that {args.old} has.")
    except UnusableError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    print(text(found, old, new), end="")
    return int(found.regressed)


if __name__ == "__main__":
    sys.exit(main())
