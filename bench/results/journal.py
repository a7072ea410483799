"""A run as it happens: lines appended to a file, so that nothing is lost whatever ends the run.

A line is JSON with a ``kind``: "sample" (a round of one implementation), "refused" (a cell, or an
implementation in it, has no number), "test" (a test has ended), "doing" (what is about to happen: after a
crash, what caused it), "stage", "machine" (its facts, where a run has noted them). `fold` makes a `Result`
of them at any time.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

from bench.results.cell import Group, Timing, is_refused
from bench.results.schema import Result

VARIABLE = "MICA_BENCH_JOURNAL"  # the journal's path, for the processes that a run starts

_own: list[dict] = []


def own() -> list[dict]:
    """What this process has written, whether there is a file or not."""
    return _own


def write(kind: str, **entry) -> None:
    """Append one whole line to the journal of this run, if it has one, from any process."""
    entry = {"kind": kind, **entry}
    _own.append(entry)
    path = os.environ.get(VARIABLE)
    if not path:
        return
    line = json.dumps(entry) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(path: Path | str | None = None) -> list[dict]:
    """The entries so far, by default of the journal of this run; a truncated line is skipped."""
    path = path or os.environ.get(VARIABLE)
    if path is None or not Path(path).exists():
        return []
    entries = []
    for line in Path(path).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def load(file: Path) -> Result:
    """A result, or what a journal folds into; of an old one the result beside it knows the machine."""
    if file.suffix != ".jsonl":
        return Result.load(file)
    beside = file.with_suffix(".json")
    machine = Result.load(beside).machine if beside.is_file() else {}
    return fold(read(file), machine)


def fold(entries: list[dict], machine: dict) -> Result:
    """The result that these entries describe.

    What was refused at any time has no number, whatever was timed before. If the run ended within a round,
    only the rounds that every implementation has count. ``machine``: its facts, unless the journal has them.
    """
    by_kind: dict[str, list[dict]] = defaultdict(list)
    for entry in entries:
        by_kind[entry["kind"]].append(entry)
    for entry in by_kind["machine"]:
        machine = entry["facts"]
    refused = [_without_kind(entry) for entry in by_kind["refused"]]
    timed: dict[str, Group] = {}
    for entry in by_kind["sample"]:
        add_sample(timed, entry)
    groups = []
    for group in timed.values():
        _drop_refused(group, refused)
        if group.timings:
            _drop_incomplete_rounds(group)
            groups.append(group)
    stages = [entry["summary"] for entry in by_kind["stage"]]
    return Result(machine, groups, refused, _checks(by_kind["test"]), stages)


def _without_kind(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name != "kind"}


def add_sample(groups: dict[str, Group], entry: dict) -> None:
    """To its group in ``groups``, by name."""
    group = groups.setdefault(entry["group"], Group(entry["group"], entry["axes"]))
    timing = group.timings.setdefault(entry["implementation"], Timing())
    timing.seconds.append(_rounded(entry["seconds"]))
    if "wall" in entry:
        timing.wall.append(_rounded(entry["wall"]))
    timing.facts |= entry["facts"]
    timing.work |= entry["work"]


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.5g}")


def _drop_refused(group: Group, refused: list[dict]) -> None:
    for name in [*group.timings]:
        if any(is_refused(one, group.name, name) for one in refused):
            del group.timings[name]


def _drop_incomplete_rounds(group: Group) -> None:
    complete = min(len(timing.seconds) for timing in group.timings.values())
    for timing in group.timings.values():
        del timing.seconds[complete:]
        del timing.wall[complete:]


def _checks(tests: list[dict]) -> list[dict[str, str]]:
    """Those that time nothing."""
    checks = []
    for entry in tests:
        if entry.get("is_check"):
            told = ("stage", "name", "outcome", "why")
            checks.append({name: entry[name] for name in told if entry.get(name)})
    return checks
