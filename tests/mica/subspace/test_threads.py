"""Thread counts are as before, however many threads solve at a time."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import scipy.linalg
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from mica import minor_subspace
from mica.subspace import threads, workers
from mica.subspace.threads import blas_threads, one_pool, set_torch_threads

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
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threadpool_limits(2, user_api="blas"):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
def test_one_pool_holds_all_threads_and_gives_them_back(count):
    torch.set_num_threads(count)
    before = counts()
    assert before[2]

    @one_pool()
    def inside(depth: int) -> None:
        assert torch.get_num_threads() == 1
        if depth:
            inside(depth - 1)
            assert torch.get_num_threads() == 1
        else:
            raise KeyError

    with one_pool():
        assert torch.get_num_threads() == 1
        assert set(pools().values()) == {count}
        with one_pool():
            assert torch.get_num_threads() == 1
            assert set(pools().values()) == {count}
        assert torch.get_num_threads() == 1
        assert set(pools().values()) == {count}
    for depth in range(3):
        with pytest.raises(KeyError):
            inside(depth)
        assert counts() == before


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


def test_workers_leave_new_threads_alone():
    assert len(list(workers.run(lambda item: None, range(4), lambda item: True))) == 4
    assert counts()[:2] == (2, 2)


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("requested", [(1, 2), (2, 1)])
def test_the_smallest_request_holds_and_the_last_to_leave_restores(requested, first_out):
    before = pools()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        sections = [(pool, blas_threads(count)) for pool, count in zip((one, other), requested, strict=True)]
        for pool, section in sections:
            pool.submit(section.__enter__).result(60)
        assert set(pools().values()) == {1}
        for index, remaining in (
            (first_out, {requested[1 - first_out]}),
            (1 - first_out, set(before.values())),
        ):
            pool, section = sections[index]
            pool.submit(section.__exit__, None, None, None).result(60)
            assert set(pools().values()) == remaining
    assert pools() == before


@pytest.mark.parametrize("round_", range(3))
def test_solving_in_several_threads_at_once(round_):
    """Single matrices, small ones in workers, and some that raise."""
    before = counts()
    weights = [torch.randn(60 + 10 * i, 50) for i in range(4)]
    broken = torch.full((20, 20), torch.nan)
    expected = [minor_subspace(weight, 4).basis for weight in weights]
    inside = []

    def solve(seed):
        order = random.Random(seed)
        inside.append(torch.get_num_threads())
        for _ in range(6):
            kind = order.randrange(3)
            if kind == 0:
                index = order.randrange(4)
                basis = minor_subspace(weights[index], 4).basis
                torch.testing.assert_close(basis, expected[index], rtol=0, atol=1e-6)
            elif kind == 1:
                list(workers.run(lambda i: minor_subspace(weights[i], 4), range(4), lambda i: True))
            else:
                with pytest.raises(ValueError, match="finite"):
                    minor_subspace(broken, 2)
        inside.append(torch.get_num_threads())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(solve, range(10 * round_, 10 * round_ + 12)))
    assert set(inside) == {2}
    assert counts() == before


def test_a_section_that_cannot_begin_ends(monkeypatch):
    before = counts()

    def refuse(count):
        raise RuntimeError("no")

    monkeypatch.setattr(threads, "blas_threads", refuse)
    with pytest.raises(RuntimeError, match="no"), one_pool():
        pass
    monkeypatch.undo()
    assert counts() == before
    with one_pool():
        assert torch.get_num_threads() == 1
    assert counts() == before
