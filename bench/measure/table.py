"""A pytest plugin: pytest-benchmark's table and files have an entry for each implementation of a cell.

Rounds of a cell are timed by `bench.suites.rounds`, since pytest-benchmark cannot alternate functions. Before
it ends its session it gets the cells that the journal folds into. What was refused has no entry, and neither
has a round that not all implementations of its cell have.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark import plugin

from bench.measure.machine import facts
from bench.results import journal
from bench.results.benchmarks import RECORDS, entries, info, rate


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Around pytest-benchmark's own, which computes, saves and compares."""
    own = session.config.pluginmanager.get_plugin("pytest-benchmark")
    if own is not None:
        own.benchmarks[:] = entries(journal.fold(journal.own(), {}).groups)
    return (yield)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict:
    """Without the name of the host, which has no place in a committed file."""
    machine_info, _, _ = info(facts())
    return machine_info


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict:
    """The commit, also where there is no git: see `bench.measure.machine.facts`."""
    _, commit_info, _ = info(facts())
    return commit_info


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """What has no number, and why."""
    result = journal.fold(journal.own(), {})
    output_json.update({name: getattr(result, name) for name in RECORDS})


def pytest_benchmark_group_stats(config: pytest.Config | None, benchmarks: list[dict], group_by: str):
    """pytest-benchmark's groups; the name of a row ends with its throughput, below those of the others."""
    groups = plugin.pytest_benchmark_group_stats(config, benchmarks, group_by)
    for _, rows in groups:
        rates = [rate(row) for row in rows]
        name_width = max(len(row["name"]) for row in rows)
        rate_width = max(map(len, rates))
        for row, words in zip(rows, rates, strict=True):
            row["name"] = f"{row['name']:<{name_width}}  {words:>{rate_width}}".rstrip()
    return groups
