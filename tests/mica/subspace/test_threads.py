"""Thread counts are as before, however many threads solve at a time; small items have one each, the first."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import scipy.linalg
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from mica import minor_subspace
from mica.subspace import threads
from mica.subspace.gram import extremes
from mica.subspace.threads import blas_threads, one_pool, run, set_torch_threads
from tests.mica.subspace.subspaces import solved_by

scipy.linalg.eigh(torch.eye(4).numpy())  # its library is loaded


def pools():
    return {pool["filepath"]: pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def of_a_new_thread():
    """PyTorch's count there: what ``torch.set_num_threads`` last got, anywhere."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def counts():
    return torch.get_num_threads(), of_a_new_thread(), pools()


@pytest.fixture(autouse=True)
def before():
    """The counts: two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        yield counts()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [1, 2])
def test_one_pool_holds_all_threads_and_gives_them_back(count):
    torch.set_num_threads(count)
    before = counts()
    assert before[2]

    def check_inside():
        assert torch.get_num_threads() == 1
        assert set(pools().values()) == {count}

    @one_pool()
    def inside(depth: int) -> None:
        check_inside()
        if not depth:
            raise KeyError
        inside(depth - 1)

    with one_pool():
        check_inside()
        with one_pool():
            check_inside()
        check_inside()
    for depth in range(3):
        with pytest.raises(KeyError):
            inside(depth)
        assert counts() == before


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["krylov", "gram", "svd"])
def test_so_does_the_solver_even_when_it_raises(count, method, monkeypatch):
    torch.set_num_threads(count)
    before, weight = counts(), torch.randn(140, 200)
    solved_by(method, weight, 8)
    assert counts() == before
    for name in ("mica.subspace.candidate.certify", "mica.subspace.host.HostGram.apply"):
        monkeypatch.setattr(name, Mock(side_effect=RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            solved_by(method, weight, 8)
        assert counts() == before


def test_pytorch_has_one_thread_when_blas_begins(monkeypatch):
    """After a look at the entries by two, PyTorch's threads would spin beside BLAS's."""
    inside = []

    def look(matrix):
        inside.append(torch.get_num_threads())
        return extremes(matrix)

    monkeypatch.setattr("mica.subspace.solver.extremes", look)
    minor_subspace(torch.randn(140, 200), 8)
    assert inside == [1]


def test_a_thread_that_begins_meanwhile_begins_with_what_the_caller_set():
    with one_pool():
        assert of_a_new_thread() == 2
    before = set_torch_threads(1)
    assert (before, torch.get_num_threads(), of_a_new_thread()) == (2, 1, 2)
    assert (set_torch_threads(2), of_a_new_thread()) == (1, 2)
    torch.set_num_threads(3)
    with ThreadPoolExecutor(1) as pool:  # one of its own, and then others again
        assert pool.submit(set_torch_threads, 1).result() == 3
        assert pool.submit(torch.get_num_threads).result() == 1
    assert counts()[:2] == (3, 3)


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("requested", [(1, 2), (2, 1)])
def test_the_smallest_request_holds_and_the_last_to_leave_restores(before, requested, first_out):
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        sections = [(pool, blas_threads(count)) for pool, count in zip((one, other), requested, strict=True)]
        for pool, section in sections:
            pool.submit(section.__enter__).result(60)
        assert set(pools().values()) == {1}
        last = 1 - first_out
        for index, remaining in ((first_out, {requested[last]}), (last, set(before[2].values()))):
            pool, section = sections[index]
            pool.submit(section.__exit__, None, None, None).result(60)
            assert set(pools().values()) == remaining
    assert pools() == before[2]


# Small ones at once


def in_parallel(function, items):
    return dict(run(function, items, lambda item: True))


def test_the_same_bits_as_one_after_another_with_one_thread():
    weights = [torch.randn(shape) for shape in ((40, 30), (30, 40), (64, 64), (200, 20)) * 3]
    subspaces = in_parallel(lambda i: minor_subspace(weights[i], 5), range(12))
    assert sorted(subspaces) == list(range(12))
    torch.set_num_threads(1)
    for i, weight in enumerate(weights):
        assert torch.equal(subspaces[i].basis, minor_subspace(weight, 5).basis)


def test_small_ones_first_and_in_workers_and_thread_counts_stay():
    def where(item):
        return threading.current_thread().name, torch.get_num_threads(), set(pools().values())

    places = dict(run(where, [900, 1, 800, 2, 3], lambda item: item < 10))
    order = list(places)
    assert set(order[:3]) == {1, 2, 3}
    assert order[3:] == [900, 800]
    for name, *of_torch_and_blas in (places[i] for i in (1, 2, 3)):
        assert name.startswith("mica-subspace")
        assert of_torch_and_blas == [1, {1}]
    assert places[900] == places[800] == (threading.current_thread().name, 2, {2})
    assert counts()[:2] == (2, 2)


def test_no_more_workers_than_blas_has_room_for(monkeypatch):
    monkeypatch.setattr(threads, "MOST_WORKERS", 3)
    torch.set_num_threads(8)
    together = threading.Barrier(3)

    def note(item):
        if item < 3:
            together.wait(timeout=60)  # three do run at a time
        return threading.current_thread().name

    assert len(set(in_parallel(note, range(40)).values())) == 3


def test_the_first_error_ends_it():
    # each takes longer than it takes the main thread to see the error of the second
    fail = Mock(side_effect=lambda item: time.sleep(0.01) or 1 / (item - 1))
    with pytest.raises(ZeroDivisionError):
        in_parallel(fail, range(200))
    assert fail.call_count < 200


def test_only_small_cpu_matrices_share():
    assert threads.is_small(torch.empty(threads.SMALL, 50_000, device="cpu"))
    assert not threads.is_small(torch.empty(threads.SMALL + 1, threads.SMALL + 1))
    assert not threads.is_small(torch.empty(4, 4, device="meta"))
