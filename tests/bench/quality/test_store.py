"""Results that several workers make: each once, whole or not at all, and again after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest

from bench.quality import store


class Job(NamedTuple):
    key: str


def planned(number):
    """So many results; what is not there is to be made."""

    def planned(results):
        return [Job(f"r{n}") for n in range(number) if f"r{n}" not in results]

    return planned


def test_each_result_is_made_once_by_whoever_is_free(tmp_path):
    made = []
    lock = threading.Lock()

    def worker(name):
        def make(one):
            with lock:
                made.append((one.key, name))
            time.sleep(0.02)
            return {"by": name}

        store.work(tmp_path, planned(12), make)

    threads = [threading.Thread(target=worker, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key for key, _ in made) == sorted(f"r{n}" for n in range(12))
    assert {name for _, name in made} == {0, 1, 2}
    results = store.read(tmp_path)
    assert {key: one["by"] for key, one in results.items()} == dict(made)


def test_a_phase_is_waited_for(tmp_path):
    """What comes next depends on all results before it, also on those of others."""

    def phases(results):
        first = planned(2)(results)
        return first or [Job("last")] * ("last" not in results)

    seen = []

    def slow(one):
        time.sleep(0.3)
        return {}

    def quick(one):
        seen.append((one.key, sorted(store.read(tmp_path))))
        return {}

    other = threading.Thread(target=store.work, args=(tmp_path, phases, slow))
    other.start()
    time.sleep(0.1)  # it is at r0 now
    store.work(tmp_path, phases, quick)
    other.join()
    assert seen[0][0] == "r1"
    assert all(results == ["r0", "r1"] for key, results in seen if key == "last")


def test_what_another_has_just_finished_is_not_made_again(tmp_path):
    """Between the look at the results and the lock."""

    def stale(results):
        if results:
            return []
        (tmp_path / "r0.json").write_text('{"by": "another"}')
        return [Job("r0")]

    def make(one):
        raise AssertionError

    assert store.work(tmp_path, stale, make) == {"r0": {"by": "another"}}


def test_an_error_leaves_nothing(tmp_path):
    def make(one):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        store.work(tmp_path, planned(1), make)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.work(tmp_path, planned(1), lambda one: {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_what_is_seen_are_the_results_before_each_piece_of_work(tmp_path):
    seen = []
    store.work(tmp_path, planned(2), lambda one: {}, lambda results: seen.append(sorted(results)))
    assert seen == [[], ["r0"], ["r0", "r1"]]


_SCRIPT = """
import sys, time
from pathlib import Path
from bench.quality import store
from tests.bench.quality.test_store import planned
def make(one):
    print(one.key, flush=True)
    time.sleep(60)
store.work(Path(sys.argv[1]), planned(1), make)
"""


def test_a_killed_worker_holds_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _SCRIPT, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"r0\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    results = store.work(tmp_path, planned(1), lambda one: {"value": 1})
    assert results == {"r0": {"value": 1}}
    assert json.loads((tmp_path / "r0.json").read_text()) == {"value": 1}
