"""The work of ``solve_many`` shared among the processes of ``torch.distributed``.

Every process solves a share and all of them hold the same bits afterwards. Nothing is assumed:
processes share only if all of them request the same layers, and only those layers whose weights have the same
content everywhere (the ranks of an expert-parallel model have different weights of one name). A process that
calls alone, say under ``if rank == 0``, works alone after a while instead of waiting forever.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from mica.subspace.cache import SubspaceCache
from mica.subspace.many import Task, cost, solve_many
from mica.subspace.result import MinorSubspace, moved

_logger = logging.getLogger("mica")

# How long a process waits for the others to request the same layers.
PATIENCE = timedelta(seconds=60)

_MISSED = b"missed"  # the decision of a meeting where some have waited in vain


class Sharing:
    """Of all the calls of `solve_shared` for one model: its parts must not wait one after another."""

    is_over = False  # since not all processes came

    def agreed(self, tasks: Sequence[Task]) -> bool:
        if tasks and not self.is_over:
            self.is_over = not (_several_processes() and _all_agree(tasks))
        return bool(tasks) and not self.is_over


def solve_shared(
    tasks: Sequence[Task],
    sharing: Sharing,
    *,
    device: str | torch.device = "auto",
    cache: SubspaceCache | None = None,
) -> Iterator[tuple[int, MinorSubspace]]:
    """``solve_many``, with the work shared where several processes request the same at the same time.

    Raises:
        ValueError: as ``solve_many``, in every process if it is raised in one; RuntimeError for other errors
            of another process.
    """
    if not sharing.agreed(tasks):
        yield from solve_many(tasks, device=device, cache=cache)
        return
    everywhere = _gathered([task.key for task in tasks], tasks)
    common = [index for index in range(len(tasks)) if len({theirs[index] for theirs in everywhere}) == 1]
    mine = shares([cost(tasks[index]) for index in common], dist.get_world_size())[dist.get_rank()]
    mine = [common[position] for position in mine]
    private = sorted(set(range(len(tasks))) - set(common))

    results: dict[int, MinorSubspace] = {}
    failure: Exception | None = None
    chosen = mine + private
    try:
        for position, result in solve_many([tasks[index] for index in chosen], device=device, cache=cache):
            results[chosen[position]] = result
            yield chosen[position], result
    except Exception as error:  # out of memory, for one: the others wait to hear of it
        failure = error
    shared = {index: moved(results[index], "cpu") for index in mine if index in results}
    gathered = _gathered((shared, failure and (isinstance(failure, ValueError), str(failure))), tasks)
    if failure:
        raise failure
    for rank, (_, told) in enumerate(gathered):
        if told:
            kind = ValueError if told[0] else RuntimeError
            raise kind(f"{told[1]} (in process {rank})")
    for theirs, _ in gathered:
        for index, result in theirs.items():
            if index not in results:
                yield index, moved(result, tasks[index].weight.device)


def _gathered(value: object, tasks: Sequence[Task]) -> list:
    """``value`` of every process, by rank.

    NCCL sends from the current device, which a script need not have set: all processes may have the first.
    """
    device, local = tasks[0].weight.get_device(), int(os.environ.get("LOCAL_RANK", "0"))  # -1: a CPU's
    if device < 0 and local < torch.cuda.device_count() and torch.cuda.current_device() == 0:
        device = local
    gathered = [None] * dist.get_world_size()
    with torch.cuda.device(device):  # -1: as it is
        dist.all_gather_object(gathered, value)
    return gathered


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices of ``costs`` in ``count`` parts of nearly equal sums: largest first, to the least loaded."""
    loads, parts = [0.0] * count, [[] for _ in range(count)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        parts[least].append(index)
    return parts


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def decline(tasks: Sequence[Task]) -> None:
    """Tell the processes that request these layers not to wait for this one, which has no weights."""
    meetings = _meetings(tasks) if tasks and _several_processes() else ()
    for store, meeting in meetings:
        if store.compare_set(f"{meeting}/decision", "", "declined") != _MISSED:
            return


def _all_agree(tasks: Sequence[Task]) -> bool:
    """Whether all processes are here with the same layers, within ``PATIENCE``.

    The last one to arrive decides for sharing, the first one that has waited long enough or has no weights
    against it; the first decision in the store is that of all. A process that arrives at a meeting where
    others have waited for it in vain goes on to the next one: whether it is late, or they had called alone
    before, is unknown, and after that all are at the same meeting again.
    """
    for store, meeting in _meetings(tasks):
        decision = f"{meeting}/decision"
        if store.add(f"{meeting}/arrived", 1) == dist.get_world_size():
            decided = store.compare_set(decision, "", "together")
        else:
            if not store.check([decision]):
                try:
                    store.wait([decision], PATIENCE)
                except (RuntimeError, dist.DistError):  # timed out
                    _logger.warning(
                        "not all processes ask for these %d minor subspaces within %d s: "
                        "each computes its own.",
                        len(tasks),
                        PATIENCE.total_seconds(),
                    )
                return store.compare_set(decision, "", _MISSED.decode()) == b"together"
            decided = store.get(decision)
        if decided != _MISSED:
            return decided == b"together"
    return False


def _meetings(tasks: Sequence[Task]) -> Iterator[tuple[dist.Store, str]]:
    """Where processes that request these layers find each other: this process's next meeting, then others.

    The store counts, for each process and the same layers, the meetings at which it has arrived.
    """
    find_store = getattr(dist.distributed_c10d, "_get_default_store", None)
    if find_store is None:  # it is not public
        return
    store = find_store()
    layers = [(task.name, tuple(task.weight.shape), str(task.weight.dtype), task.rank) for task in tasks]
    prefix = f"mica/{hashlib.blake2b(repr(layers).encode(), digest_size=16).hexdigest()}"
    while True:
        yield store, f"{prefix}/{store.add(f'{prefix}/process {dist.get_rank()}', 1)}"
