"""The work of ``solve_many`` shared among the processes of ``torch.distributed``.

Every process solves a share of the layers, and all of them hold the same bits afterwards. Processes share
only if all of them request the same layers, and only those layers whose weights have the same content
everywhere (the ranks of an expert-parallel model have different weights under one name).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from mica.subspace.cache import SubspaceCache
from mica.subspace.content_hash import is_weight, quick_content_hash
from mica.subspace.many import Task, cost, solve_many
from mica.subspace.result import MinorSubspace, move

# How long a process waits for the others to begin.
TIMEOUT = timedelta(minutes=5)


def all_request(layers: object) -> bool:
    """Whether there are several processes, and all of them request these layers.

    All processes must call this, and, where it is true, `solve_shared` for the same tasks in the same order.
    It waits by the store, not by a collective: that would take 10 to 30 minutes to fail, and NCCL ends the
    process then.

    Args:
        layers: what is requested; processes compare its ``repr``.

    Raises:
        RuntimeError: not all processes have called this within ``TIMEOUT``.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    store = dist.group.WORLD.get_group_store()
    rank = dist.get_rank()
    number = store.add(f"mica/calls of {rank}", 1)
    keys = [f"mica/{number}/{process}" for process in range(dist.get_world_size())]
    description = repr(layers)
    store.set(keys[rank], description)
    try:
        store.wait(keys, TIMEOUT)
    except RuntimeError as error:  # DistStoreError, but for a file store
        raise RuntimeError(
            f"all {len(keys)} processes of torch.distributed compute MiCA's minor subspaces together, but "
            f"not all of them have begun within {TIMEOUT.total_seconds():.0f} s: create the adapter in every "
            "process at the same time, not under `if rank == 0` or in one process after another."
        ) from error
    return all(store.get(key) == description.encode() for key in keys)


def solve_shared(
    tasks: Sequence[Task],
    *,
    share: bool,
    device: str | torch.device = "auto",
    cache: SubspaceCache | None = None,
) -> Iterator[tuple[int, MinorSubspace]]:
    """``solve_many`` of the tasks whose weights hold data, not those on the meta device.

    Args:
        share: whether all processes call this for the same tasks (`all_request`); a weight may be on the meta
            device in some of them.

    Raises:
        ValueError: as ``solve_many``, in every process if it is raised in one of them.
        RuntimeError: another process has failed for another reason.
    """
    if not share:
        present = [index for index, task in enumerate(tasks) if not task.weight.is_meta]
        yield from _solve(tasks, present, device, cache)
        return

    mine, private = _divide(tasks)
    shared: dict[int, MinorSubspace] = {}
    failure: Exception | None = None
    notice: Exception | None = None
    try:
        for index, result in _solve(tasks, mine + private, device, cache):
            if index in mine:
                shared[index] = move(result, "cpu")
            yield index, result
    except Exception as error:  # out of memory, for example: the others wait to hear of it
        failure = error
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        notice = kind(f"{error} (in process {dist.get_rank()})")  # which can be sent, unlike some exceptions

    gathered = _all_gather((shared, notice), tasks)
    if failure:
        raise failure
    for _, their_notice in gathered:
        if their_notice is not None:
            raise their_notice
    for theirs, _ in gathered:
        for index, result in theirs.items():
            if index not in mine:
                yield index, move(result, tasks[index].weight.device)


def _solve(
    tasks: Sequence[Task], indices: list[int], device: str | torch.device, cache: SubspaceCache | None
) -> Iterator[tuple[int, MinorSubspace]]:
    """``solve_many`` of the tasks at ``indices``."""
    chosen = [tasks[index] for index in indices]
    for position, result in solve_many(chosen, device=device, cache=cache):
        yield indices[position], result


def _divide(tasks: Sequence[Task]) -> tuple[list[int], list[int]]:
    """The indices of the tasks that this process solves for all, and of those that it solves for itself."""
    contents = _all_gather([_content(task) for task in tasks], tasks)
    common = []
    private = []
    for index, (first, *others) in enumerate(zip(*contents, strict=True)):
        if first is not None and all(other == first for other in others):
            common.append(index)
        elif not tasks[index].weight.is_meta:
            private.append(index)
    # Dealt out from the largest on: no two shares differ by more than one layer
    common.sort(key=lambda index: -cost(tasks[index]))
    return common[dist.get_rank() :: dist.get_world_size()], private


def _content(task: Task) -> str | None:
    """A key that tells the processes' weights apart; None where there is none, and the solver will say why.

    Not the cache's key, which takes ten times as long and is needed only for the layers that this process
    solves: with it, all processes would hash every weight before they share any.
    """
    if not is_weight(task.weight):
        return None
    return quick_content_hash(task.weight)


def _all_gather(value: object, tasks: Sequence[Task]) -> list:
    """``value`` of every process, by rank.

    NCCL sends from the current device, which a script need not have set: all processes may have the first.
    """
    device = tasks[0].weight.get_device()
    if device < 0:  # on a CPU
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count() and torch.cuda.current_device() == 0:
            device = local
    values = [None] * dist.get_world_size()
    with torch.cuda.device(device):  # -1 leaves the current device as it is
        dist.all_gather_object(values, value)
    return values
