"""Processes that measure, one after the other, each watched and its results kept whatever happens to it.

Results are in the journal as soon as they are measured (`bench.results.journal`); the result file is
rewritten from it now and then. A process that dies, or is silent for too long, is restarted without what it
was doing.
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

SUITES = ROOT / "bench" / "suites"
NOTHING = "nothing ran"
CUT_OFF = "cut off"  # the run was, by a signal
# by exit status: all passed, some failed, three ways of not getting that far, nothing was selected
PYTEST_ENDED = {0: "passed", 1: "failed", 2: "failed", 3: "failed", 4: "failed", 5: "passed"}
STARTS = 4  # of one job at most
POLL = 0.1  # seconds
# Seconds. Rewriting the file computes all its statistics, and on a CPU what that takes would be added to
# measured times; the journal has each round at once.
REWRITE = 60.0


class Job(NamedTuple):
    """``seconds``: its time limit; ``silence``: how long it may report nothing after its first line.

    Before that it imports and collects, which takes minutes on a busy machine.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    seconds: float = float("inf")
    silence: float = float("inf")


def pytest(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pytest", *map(str, arguments)]


def suite(files: list[str], *options: str) -> list[str]:
    """pytest's command for files in ``bench/suites``."""
    return pytest(*(SUITES / file for file in files), "-c", SUITES.parent / "pytest.ini", *options)


class Run:
    """One run: its journal, which the jobs' processes write to, and its result file."""

    def __init__(self, file: Path):
        self.file = file.resolve()  # the processes have another working directory
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.journal = self.file.with_suffix(".jsonl")
        self.journal.unlink(missing_ok=True)
        os.environ[journal.VARIABLE] = str(self.journal)
        self.machine = facts()
        self._saved_at = 0.0
        self._saved_size = 0

    def start(self, job: Job) -> dict:
        """Run it to the end; returns its summary, which is also in the result file."""
        began = time.monotonic()
        try:
            for _ in range(STARTS):
                state = self._process(job, began + job.seconds)
                if state not in ("died", "hung") or not self._blame(job, state):
                    break
        except KeyboardInterrupt:
            self._note(self._summary(job, CUT_OFF, time.monotonic() - began))
            raise
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
        self._saved_at = time.monotonic()
        self._saved_size = self._size()

    def _save_sometimes(self) -> None:
        is_due = time.monotonic() - self._saved_at > REWRITE
        if is_due and self._size() != self._saved_size:
            self.save()

    def _size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def _entries(self) -> list[dict]:
        """Those of the current job: since the last one ended."""
        entries = journal.read()
        ends = [number for number, entry in enumerate(entries) if entry["kind"] == "stage"]
        return entries[ends[-1] + 1 :] if ends else entries

    def _process(self, job: Job, deadline: float) -> str:
        """How it ended: passed, failed, died, hung (silent for too long) or over time."""
        environment = {**os.environ, **job.environment, "MICA_BENCH_STAGE": job.name}
        process = subprocess.Popen(job.command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            state = self._watch(process, job.silence, deadline)
        finally:  # it, and what it has started, also when this process is told to end
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return state or PYTEST_ENDED.get(process.returncode, "died")

    def _watch(self, process: subprocess.Popen, silence: float, deadline: float) -> str | None:
        """Until it ends, or why it has to be ended. Silence begins with its first line."""
        size = self._size()
        heard = float("inf")
        while process.poll() is None:
            time.sleep(POLL)
            now = time.monotonic()
            if self._size() != size:
                size = self._size()
                heard = now
            self._save_sometimes()
            if now > deadline:
                return "over time"
            if now - heard > silence:
                return "hung"
        return None

    def _blame(self, job: Job, state: str) -> bool:
        """Note what it was doing, which the next process leaves out; whether it was doing anything."""
        entries = [one for one in self._entries() if one["kind"] in ("doing", "refused", "test")]
        if not entries:
            return False
        why = "the process died" if state == "died" else f"nothing was heard for {job.silence:.0f} s"
        last = entries[-1]
        if last["kind"] == "refused":  # it has refused that itself, and exited
            return True
        if last["kind"] == "doing" and "group" in last:
            cell = {name: last[name] for name in ("group", "implementation") if name in last}
            journal.write("refused", **cell, why=why)
            return True
        ended = {one["name"] for one in entries if one["kind"] == "test"}
        started = dict.fromkeys(one["test"] for one in entries if "test" in one)
        for name in started.keys() - ended:  # of several at once the others have continued
            journal.write("test", stage=job.name, name=name, outcome="failed", why=why, is_check=True)
        return True

    def _summary(self, job: Job, state: str, seconds: float) -> dict:
        """Machine-readable: how it ended, and how many tests had which outcome."""
        entries = self._entries()
        tests = [one for one in entries if one["kind"] == "test"]
        outcomes = Counter(one["outcome"] for one in tests)
        failed = [one["name"] for one in tests if one["outcome"] == "failed"]
        if state == "passed" and failed:
            state = "failed"
        elif state == "passed" and not outcomes["passed"]:
            state = NOTHING
        summary = {"stage": job.name, "state": state, "seconds": round(seconds, 1)}
        summary |= {name: outcomes[name] for name in ("passed", "failed", "skipped")}
        if failed:
            summary["first_failed"] = failed[:5]
        if state in ("died", "hung", "over time", CUT_OFF):
            doing = next((one for one in reversed(entries) if one["kind"] == "doing"), {})
            told = ("group", "implementation", "test")
            summary["was_doing"] = {name: doing[name] for name in told if name in doing}
        return summary
