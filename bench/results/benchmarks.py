"""A result as pytest-benchmark knows it: its entries, its statistics, its JSON.

A group is a cell, an entry an implementation, and its data are the seconds of all rounds; ``extra_info``
carries what pytest-benchmark has no field for: axes, facts, work and throughput. So its table, its files and
its commands (``--benchmark-json``, ``--benchmark-compare``, ``pytest-benchmark compare``) work on our runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import SimpleNamespace

from pytest_benchmark.stats import Metadata

from bench.results import throughput
from bench.results.cell import Group

RECORDS = ("refused", "checks", "stages")  # of a `Result`, beside its groups
_COMMIT = {"commit": "id", "uncommitted_changes": "dirty"}  # of a machine's facts -> in "commit_info"


def entries(groups: Iterable[Group]) -> list[Metadata]:
    """One for each implementation of each group."""
    return [_entry(group, name) for group in groups for name in group.timings]


def _entry(group: Group, name: str) -> Metadata:
    timing = group.timings[name]
    test = SimpleNamespace(
        name=name,
        fullname=f"{group.name}: {name}",
        group=group.name,
        param=None,
        params={**group.axes, "implementation": name},
        extra_info={
            "implementation": name,
            "axes": group.axes,
            "facts": timing.facts,
            "work": timing.work,
            "throughput": timing.throughput,
            "wall": timing.wall,
        },
        cprofile_stats=None,
        has_error=False,
    )
    entry = Metadata(test, iterations=1, options={})
    entry.stats.data.extend(timing.seconds)
    return entry


def rate(entry: dict) -> str:
    """How much an entry's calls do in a second, in words; "" where no work is named.

    By the median of this very entry: beside a run that it is compared with, pytest-benchmark passes the saved
    statistics with the newer run's ``extra_info``.
    """
    return throughput.in_words(entry["extra_info"].get("work", {}), entry["median"])


def info(machine: dict) -> tuple[dict, dict, str]:
    """A machine's facts as "machine_info", "commit_info" and "datetime".

    Apart, because pytest-benchmark warns where two runs have a different "machine_info".
    """
    rest = {**machine}
    when = str(rest.pop("datetime", ""))
    commit = {theirs: rest.pop(ours) for ours, theirs in _COMMIT.items() if ours in rest}
    return rest, commit, when


def facts(document: dict) -> dict:
    """The machine's facts, as `info` was given them."""
    machine = {**document["machine_info"]}
    for ours, theirs in _COMMIT.items():
        if theirs in document["commit_info"]:
            machine[ours] = document["commit_info"][theirs]
    if document["datetime"]:
        machine["datetime"] = document["datetime"]
    return machine


def records(document: dict) -> dict[str, list]:
    """What was refused and checked, and in which stages, where the file says so."""
    return {name: document.get(name, []) for name in RECORDS}


def document(machine: dict, groups: Iterable[Group], lists: dict[str, list]) -> str:
    """pytest-benchmark's JSON, a line for each of its benchmarks, so that two files can be compared by eye.

    ``lists``: `RECORDS`.
    """
    head = dict(zip(("machine_info", "commit_info", "datetime"), info(machine), strict=True))
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    benchmarks = [_rounded(entry.as_dict()) for entry in entries(groups)]
    parts += [f'"{name}": {_listed(values)}' for name, values in {**lists, "benchmarks": benchmarks}.items()]
    return "{" + ",\n".join(parts) + "}\n"


def _listed(values: list) -> str:
    if not values:
        return "[]"
    lines = ",\n".join(map(json.dumps, values))
    return f"[\n{lines}\n]"


def _rounded(entry: dict) -> dict:
    """What is computed, in six digits: the data have five."""
    for name, value in entry["stats"].items():
        if isinstance(value, float):
            entry["stats"][name] = float(f"{value:.6g}")
    rates = entry["extra_info"]["throughput"]
    entry["extra_info"]["throughput"] = {unit: float(f"{value:.6g}") for unit, value in rates.items()}
    return entry
