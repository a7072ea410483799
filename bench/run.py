"""Processes that measure, one after the other: each watched, its results kept whatever happens to it.

What a process has found is in the journal as soon as it is found (`bench.results.journal`); the result file
is made anew from it after every cell. A process that dies, or says nothing for too long, is started again
without what it was doing then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.measure.machine import ROOT, facts
from bench.results import journal

NOTHING = "nothing ran"
# by its exit status: all passed, some failed, three kinds of not getting so far, nothing was selected
PYTEST_ENDED = {0: "passed", 1: "failed", 2: "failed", 3: "failed", 4: "failed", 5: "passed"}
STARTS = 4  # of one job at most
# Seconds. Rewriting the file takes some 30 ms of a core, which on a CPU would be added to measured times.
POLL, REWRITE = 0.1, 10.0


class Job(NamedTuple):
    """``seconds``: it may take so long, and ``silence``: say nothing for so long."""

    name: str
    command: list[str]
    environment: dict[str, str]
    seconds: float = float("inf")
    silence: float = float("inf")


def pytest(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pytest", *map(str, arguments)]


def suite(files: list[str], selection: str = "") -> list[str]:
    """pytest's command for files of ``bench/suites``."""
    folder = ROOT / "bench" / "suites"
    chosen = ["-k", selection] if selection else []
    return pytest(*(folder / file for file in files), "-c", folder / "pytest.ini", *chosen)


class Run:
    """One run: its journal, which the jobs' processes write to, and its result file."""

    def __init__(self, file: Path):
        file = file.resolve()  # the processes work elsewhere
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.journal = file, file.with_suffix(".jsonl")
        self.journal.unlink(missing_ok=True)
        os.environ[journal.VARIABLE] = str(self.journal)
        self.machine = facts()
        self._written = (0.0, 0)

    def start(self, job: Job) -> dict:
        """Run it to its end; returns its summary, which is also in the result file."""
        began, deadline = time.monotonic(), time.monotonic() + job.seconds
        for _ in range(STARTS):
            state = self._process(job, deadline)
            if state not in ("died", "hung"):
                break
            if not self._blame(job, state):
                break
        return self._note(self._summary(job, state, time.monotonic() - began))

    def leave_out(self, name: str, why: str) -> dict:
        """The summary of a job that is not started."""
        return self._note({"stage": name, "state": "left out", "why": why})

    def _note(self, summary: dict) -> dict:
        journal.write("stage", summary=summary)
        self.save()
        return summary

    def save(self) -> None:
        journal.fold(journal.read(), self.machine).save(self.file)
        self._written = time.monotonic(), self._size()

    def _entries(self) -> list[dict]:
        """Of the job that runs: since the last one has ended."""
        entries = journal.read()
        ends = [number for number, entry in enumerate(entries) if entry["kind"] == "stage"]
        return entries[ends[-1] + 1 :] if ends else entries

    def _size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def _process(self, job: Job, deadline: float) -> str:
        """How it ended: passed, failed, died, hung (it was silent for too long) or over time."""
        environment = {**os.environ, **job.environment, "MICA_BENCH_STAGE": job.name}
        process = subprocess.Popen(job.command, cwd=ROOT, env=environment, start_new_session=True)
        size, heard = self._size(), time.monotonic()
        state = None
        while state is None and process.poll() is None:
            time.sleep(POLL)
            now = time.monotonic()
            if (grown := self._size()) != size:
                size, heard = grown, now
            if grown != self._written[1] and now - self._written[0] > REWRITE:
                self.save()
            state = "over time" if now > deadline else "hung" if now - heard > job.silence else None
        with suppress(ProcessLookupError):  # what it has started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return state or PYTEST_ENDED.get(process.returncode, "died")

    def _blame(self, job: Job, state: str) -> bool:
        """Note what it was doing, which the next process leaves out; whether it had begun to do anything."""
        entries = [one for one in self._entries() if one["kind"] in ("doing", "refused", "test")]
        if not entries:
            return False
        why = "the process died" if state == "died" else f"nothing was heard for {job.silence:.0f} s"
        last, ended = entries[-1], {one["name"] for one in entries if one["kind"] == "test"}
        if last["kind"] == "doing" and "group" in last:
            whose = (
                {"implementation": last["implementation"]} if "implementation" in last else {}
            )  # else what the cell's implementations share
            journal.write("refused", group=last["group"], **whose, why=why)
        elif last["kind"] != "refused":  # else it has said so itself, and left
            started = dict.fromkeys(one["test"] for one in entries if "test" in one)
            for name in started.keys() - ended:  # of several at once the others have gone on
                journal.write("test", stage=job.name, name=name, outcome="failed", why=why, is_check=True)
        return True

    def _summary(self, job: Job, state: str, seconds: float) -> dict:
        """Machine-readable: how it ended and how many tests did what."""
        entries = self._entries()
        tests = [one for one in entries if one["kind"] == "test"]
        outcomes = Counter(one["outcome"] for one in tests)
        failed = [one["name"] for one in tests if one["outcome"] == "failed"]
        doing = next((one for one in reversed(entries) if one["kind"] == "doing"), {})
        if state == "passed":
            state = "failed" if failed else state if outcomes["passed"] else NOTHING
        found = {"stage": job.name, "state": state, "seconds": round(seconds, 1)}
        found |= {name: outcomes[name] for name in ("passed", "failed", "skipped")}
        if failed:
            found["first_failed"] = failed[:5]
        if state in ("died", "hung", "over time"):
            found["was_doing"] = {
                name: doing[name] for name in ("group", "implementation", "test") if name in doing
            }
        return found
