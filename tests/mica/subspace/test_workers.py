import threading

import pytest
import scipy.linalg
import torch
from threadpoolctl import threadpool_info

from mica import minor_subspace
from mica.subspace import workers


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_same_bits_as_one_after_another_with_one_thread():
    weights = [torch.randn(shape) for shape in ((40, 30), (30, 40), (64, 64), (200, 20)) * 3]
    subspaces = {}
    done = list(
        workers.run(
            lambda i: subspaces.__setitem__(i, minor_subspace(weights[i], 5)), range(12), lambda i: True
        )
    )
    assert sorted(done) == list(range(12))
    torch.set_num_threads(1)
    for i, weight in enumerate(weights):
        assert torch.equal(subspaces[i].basis, minor_subspace(weight, 5).basis)


def test_small_ones_first_and_in_workers_and_thread_counts_stay():
    where = {}

    def note(item):
        where[item] = (threading.current_thread().name, torch.get_num_threads())

    order = list(workers.run(note, [900, 1, 800, 2, 3], lambda item: item < 10))
    assert set(order[:3]) == {1, 2, 3}
    assert order[3:] == [900, 800]
    main = threading.current_thread().name
    assert all(
        name.startswith("mica-subspace") and threads == 1 for name, threads in (where[i] for i in (1, 2, 3))
    )
    assert where[900] == where[800] == (main, 2)
    assert torch.get_num_threads() == 2


def test_no_more_workers_than_blas_has_room_for(monkeypatch):
    monkeypatch.setattr(workers, "MOST_WORKERS", 3)
    torch.set_num_threads(8)
    threads, together = set(), threading.Barrier(3)

    def note(item):
        threads.add(threading.current_thread().name)
        if item < 3:
            together.wait(timeout=60)  # three do run at a time

    list(workers.run(note, range(40), lambda item: True))
    assert len(threads) == 3


def test_no_blas_has_threads_of_its_own_meanwhile():
    scipy.linalg.eigh(torch.eye(4).numpy())  # its library is loaded
    seen = []

    def note(item):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    list(workers.run(note, range(4), lambda item: True))
    assert seen
    assert set(seen) == {1}


def test_the_first_error_ends_it():
    called = []

    def fail(item):
        called.append(item)
        if item == 1:
            raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        list(workers.run(fail, range(200), lambda item: True))
    assert len(called) < 200


def test_only_small_cpu_matrices_share():
    assert workers.is_small(torch.empty(workers.SMALL, 50_000, device="cpu"))
    assert not workers.is_small(torch.empty(workers.SMALL + 1, workers.SMALL + 1))
    assert not workers.is_small(torch.empty(4, 4, device="meta"))
