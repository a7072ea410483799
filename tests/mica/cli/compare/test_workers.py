"""The processes of a comparison: which number and GPU each has, and when it ends."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from mica.cli import lock
from mica.cli.compare import workers

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MICA_COMPARE_WORKER")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in GROUP:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("given", "place", "devices"),
    [
        ({}, (0, 1), None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1), None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4), "1"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}, (1, 2), "6"),
        ({"RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}, (1, 2), ""),  # none, as it was told
        ({"MICA_COMPARE_WORKER": "[2, 77]", "CUDA_VISIBLE_DEVICES": "5"}, (2, 1), "5"),
    ],
)
def test_a_process_leaves_the_group_with_a_gpu_of_its_own(monkeypatch, given, place, devices):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert workers.place() == (*place, 77 if "MICA_COMPARE_WORKER" in given else os.getppid())
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == devices
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()


def test_others_wait_until_it_is_open_and_have_its_clock(tmp_path):
    found = []
    watched = []

    def wait():
        found.append(workers.wait_until_open(tmp_path, lambda: watched.append(1)))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    assert not found
    with workers.opened(tmp_path, elapsed=100.0, jobs=3) as session:
        thread.join(timeout=30)
        assert found == [session]
        assert session.jobs == 3
        assert session.clock() == pytest.approx(100, abs=5)
    assert watched
    with lock.held(tmp_path / "open.lock"):
        pass  # closed again


_ORPHAN = """
import os, time
from mica.cli.compare.workers import watch_of
parent = os.getpid()
if os.fork() == 0:
    {before}
    watch = watch_of(parent)
    print("started", flush=True)
    while True:
        watch()
        time.sleep(0.05)
time.sleep(0.3)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", ["pass", "time.sleep(1)"])
def test_an_orphan_ends_itself(before):
    """Also one whose parent has gone before it looks for the first time."""
    code = _ORPHAN.format(before=before)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)  # until both have closed it
    assert output == b"started\n"


def test_as_many_trainings_as_there_are_cores_and_memory(monkeypatch):
    import psutil

    base = torch.nn.Linear(1000, 1000, bias=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for available, number in ((10**12, 4), (3 * 40 * 10**6, 3), (10**6, 1)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: Memory(available))
        assert workers.suitable(base) == number
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    assert workers.suitable(base) == 8


class Memory:
    def __init__(self, available):
        self.available = available
