"""A pytest plugin: each start and end of a test is a line in the journal, and no test runs twice.

A run that continues after a crash, in a new process, leaves out what has ended. Under pytest-xdist the
controlling process writes. Tests in bench_*.py are rounds of a timing; all others are checks, whose outcomes
are part of the result.
"""

from __future__ import annotations

import os

import pytest

from bench.results import journal

STAGE = os.environ.get("MICA_BENCH_STAGE", "")
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def is_check(name: str) -> bool:
    return not name.rpartition("/")[2].startswith("bench_")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ended = {one["name"] for one in journal.read() if one["kind"] == "test" and one["stage"] == STAGE}
    left_out = [item for item in items if item.nodeid in ended]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in ended]


def pytest_runtest_logstart(nodeid: str) -> None:
    if not _IS_WORKER:
        journal.write("doing", stage=STAGE, test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The outcome of a test's body, or of its fixtures where these decide."""
    if _IS_WORKER or (report.when != "call" and report.passed):
        return
    entry = {"stage": STAGE, "name": report.nodeid, "outcome": report.outcome}
    entry["is_check"] = is_check(report.nodeid.partition("::")[0])
    if not report.passed:
        entry["why"] = _why(report)
    journal.write("test", **entry)


def _why(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        _, _, reason = report.longrepr
        return str(reason)
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    first_line, _, _ = text.strip().partition("\n")
    return first_line or "failed"
