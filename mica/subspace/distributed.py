"""The work of ``run_tasks`` shared among the processes of ``torch.distributed``.

Every process solves a share of the layers, and all of them hold the same bits afterwards. Processes share
only if all of them request the same layers within ``TIMEOUT``. A result that was made of another weight than
this process has is not taken (the ranks of an expert-parallel model have different weights under one name).

They meet in the store of the process group, and send their results through it: a collective would wait 10 to
30 minutes for a process that does not come, and NCCL ends the others then. Through a TCP store on one machine
100 MB, B of 8 billion parameters at rank 16, take 0.8 s.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from mica.subspace.cache import SubspaceCache
from mica.subspace.many import Task, cost, run_tasks
from mica.subspace.result import MinorSubspace, move

_logger = logging.getLogger("mica")

# How long a process waits for others that do not come.
TIMEOUT = timedelta(seconds=10)

# Bytes of a message under one key; a TCP store refuses more than 8 MiB.
_PIECE = 2**22


class Meeting:
    """The processes that solve the same layers together, and the messages between them.

    Attributes:
        rank, size: the number of this process, and how many there are.
        is_over: whether this process works alone: there is no other, not all have requested the same layers
            within ``TIMEOUT``, or a message has not come. A line in the log says so if there are others.
    """

    def __init__(self, layers: object):
        """All processes that call this within ``TIMEOUT`` meet, if the ``repr`` of the layers is the same."""
        self.is_over = True
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._processes = range(self.size)
        self._store = dist.group.WORLD.get_group_store()
        self._exchanges = 0
        if self._store is None:
            self._work_alone("the process group has no store")
            return
        try:
            self.is_over = not self._agree(repr(layers).encode())
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            self._work_alone(f"the store of the process group cannot be used ({first_line})")
            return
        if self.is_over:
            seconds = TIMEOUT.total_seconds()
            self._work_alone(f"not all processes have requested the same layers within {seconds:.0f} s")
        self._since = time.monotonic()  # the end of the last exchange

    def _agree(self, request: bytes) -> bool:
        """Whether the outcome of the meeting is that all work together; the first to be written holds.

        Whoever comes looks for the first meeting without an outcome: how often a process has called plays no
        part, and may differ.
        """
        number = 0
        if self._store.check(["mica/no key"]):  # PyTorch 2.15's FakeStore; the loop would not end
            raise RuntimeError("it says that it has every key")
        while self._store.check([f"mica/{number}/outcome"]):
            number += 1
        self._key = f"mica/{number}"
        outcome = f"{self._key}/outcome"
        seats = [f"{self._key}/request of {rank}" for rank in self._processes]
        self._store.set(seats[self.rank], request)
        proposal = "alone"
        try:
            deadline = time.monotonic() + TIMEOUT.total_seconds()
            _wait(lambda: self._store.check(seats) or self._store.check([outcome]), deadline)
            if self._store.check(seats) and all(self._store.get(seat) == request for seat in seats):
                proposal = "together"
        finally:  # after Ctrl-C, too: nobody shall wait for a process that has left
            decided = self._store.compare_set(outcome, "", proposal)
        return decided == b"together"

    def _work_alone(self, reason: str) -> None:
        self.is_over = True
        _logger.warning(
            "Process %d of torch.distributed computes MiCA's minor subspaces alone: %s.", self.rank, reason
        )

    def exchange(self, message: object) -> list:
        """``message`` of every process, by rank; None in place of one that has not come.

        All processes must call this equally often. Each waits for the others for twice the time that it has
        worked itself since the last exchange, and ``TIMEOUT``.
        """
        now = time.monotonic()
        deadline = now + TIMEOUT.total_seconds() + 2 * (now - self._since)
        key = f"{self._key}/message {self._exchanges}"
        messages = [None] * self.size
        messages[self.rank] = message
        try:
            self._send(f"{key} of {self.rank}", message)
            for rank in self._processes:
                if rank != self.rank:
                    messages[rank] = self._receive(f"{key} of {rank}", deadline)
        except RuntimeError:  # the store has gone, with the process that held it
            pass
        self._exchanges += 1
        self._since = time.monotonic()
        absent = [str(rank) for rank in self._processes if messages[rank] is None]
        if absent:
            waited = self._since - now
            self._work_alone(f"nothing came from process {', '.join(absent)} within {waited:.0f} s")
        return messages

    def _send(self, key: str, message: object) -> None:
        content = pickle.dumps(message)
        starts = range(0, len(content), _PIECE)
        for piece, start in enumerate(starts):
            self._store.set(f"{key}/{piece}", content[start : start + _PIECE])
        self._store.set(key, str(len(starts)))

    def _receive(self, key: str, deadline: float) -> object:
        """The message, which the last to receive it removes from the store; None if it does not come."""
        if not _wait(lambda: self._store.check([key]), deadline):
            return None
        pieces = [f"{key}/{piece}" for piece in range(int(self._store.get(key)))]
        content = b"".join(map(self._store.get, pieces))
        if self._store.add(f"{key}/received", 1) == self.size - 1:
            for piece in pieces:
                self._store.delete_key(piece)
        return pickle.loads(content)


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    """Whether the condition becomes true in time. Not by ``Store.wait``, which writes to stderr if not."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def run_shared(
    tasks: Sequence[Task],
    meeting: Meeting,
    *,
    device: str | torch.device = "auto",
    cache: SubspaceCache | None = None,
) -> Iterator[tuple[int, MinorSubspace]]:
    """``run_tasks`` of the tasks whose weights hold data, shared among the processes of a meeting.

    Args:
        tasks: The tasks, the same in the same order in every process of the meeting; a weight may be on the
            meta device in some of them.
        meeting: The processes that share the work.
        device, cache: As ``run_tasks`` takes them.

    Raises:
        RuntimeError: A task could not be solved, here or in another process.
    """
    present = [index for index, task in enumerate(tasks) if not task.weight.is_meta]
    if meeting.is_over:
        yield from run_tasks(tasks, present, device=device, cache=cache)
        return

    share = share_of(tasks, meeting.rank, meeting.size)
    mine = [index for index in share if not tasks[index].weight.is_meta]
    solved: dict[int, tuple[str, MinorSubspace]] = {}
    failure = notice = None
    try:
        for index, result in run_tasks(tasks, mine, device=device, cache=cache):
            solved[index] = tasks[index].key, move(result, "cpu")
            yield index, result
    except Exception as error:  # out of memory, for example: the others wait to hear of it
        failure = error
        notice = f"{error} (in process {meeting.rank})"

    messages = meeting.exchange((solved, notice))
    if failure:
        raise failure
    received = {}
    for results, notice in filter(None, messages):
        if notice is not None:
            raise RuntimeError(notice)
        received |= results
    rest = []
    for index in present:
        key, result = received.get(index, (None, None))
        if key != tasks[index].key:
            rest.append(index)
        elif index not in solved:
            yield index, move(result, tasks[index].weight.device)
    yield from run_tasks(tasks, rest, device=device, cache=cache)


def share_of(tasks: Sequence[Task], rank: int, size: int) -> list[int]:
    """The indices of the tasks that the process of this rank solves for all ``size`` processes.

    They are dealt out from the largest on: no two shares differ by more than one layer.
    """
    order = sorted(range(len(tasks)), key=lambda index: -cost(tasks[index]))
    return order[rank::size]
