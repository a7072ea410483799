"""The processes of a comparison on several GPUs, which processes on a CPU stand in for."""

import os
import time
from pathlib import Path

import pytest

from mica.cli.compare import workers
from mica.cli.compare.schedule import SHORT, Planned

TODO = [Planned(SHORT, "mica", rate, 1, 0) for rate in (0.5, 0.1, 0.1, 0.1)]


class Comparison:
    """Each training takes as many seconds as its learning rate says."""

    def make(self, planned, latest):
        time.sleep(planned.rate)
        if planned.rate > latest:
            return None
        return {"process": os.getpid(), "gpu": os.environ["CUDA_VISIBLE_DEVICES"]}


def begin(gpus, settings, output):
    """As `workers._begin`, without a model."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    workers._comparison = Comparison()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(workers, "_begin", begin)


@pytest.mark.parametrize("visible", ["", "4,6"])
def test_each_process_has_a_gpu_of_its_own(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if not visible:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with workers.pool(2, {}, Path()) as pool:
        made = list(workers.make(pool, TODO, latest=1.0))
        late = list(workers.make(pool, TODO[:1], latest=0.0))
    assert sorted(planned.rate for planned, _ in made) == [0.1, 0.1, 0.1, 0.5]
    assert len({result["process"] for _, result in made}) == 2
    assert sorted({result["gpu"] for _, result in made}) == (visible or "0,1").split(",")
    assert late == [(TODO[0], None)]


def test_a_stop_gives_up_what_is_under_way():
    def stopped(pool):
        pool.submit(workers._make, TODO[0]._replace(rate=60.0), 100.0)
        time.sleep(3)
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), workers.pool(1, {}, Path()) as pool:
        stopped(pool)
    assert time.monotonic() - begun < 50
