"""The work of ``solve_many`` shared among the processes of ``torch.distributed``.

Every process solves a share of the layers, and all of them hold the same bits afterwards. Processes share
only if all of them request the same layers, and only those layers whose weights have the same content
everywhere (the ranks of an expert-parallel model have different weights under one name). A process that calls
alone, say under ``if rank == 0``, works alone after a while instead of waiting forever.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from mica.subspace.cache import SubspaceCache
from mica.subspace.fingerprint import is_weight, quick_fingerprint
from mica.subspace.many import Task, cost, solve_many
from mica.subspace.result import MinorSubspace, moved

_logger = logging.getLogger("mica")

# How long a process waits for the others to request the same layers.
PATIENCE = timedelta(seconds=60)

# What a meeting can decide.
_TOGETHER = b"together"
_DECLINED = b"declined"
_MISSED = b"missed"  # some have waited in vain


class Sharing:
    """Whether processes share a model's layers, for all calls of `solve_shared` on its parts.

    Once not all processes have come, no further part waits for them.
    """

    is_over = False

    def agreed(self, tasks: Sequence[Task]) -> bool:
        """Whether all processes are here with these tasks, and share them."""
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
        ValueError: as ``solve_many``, in every process if it is raised in one of them.
        RuntimeError: another process has failed for another reason.
    """
    if not sharing.agreed(tasks):
        yield from solve_many(tasks, device=device, cache=cache)
        return

    mine, private = _divided(tasks)
    chosen = mine + private
    results: dict[int, MinorSubspace] = {}
    failure: Exception | None = None
    try:
        for position, result in solve_many([tasks[index] for index in chosen], device=device, cache=cache):
            results[chosen[position]] = result
            yield chosen[position], result
    except Exception as error:  # out of memory, for example: the others wait to hear of it
        failure = error

    shared = {index: _as_arrays(results[index]) for index in mine if index in results}
    gathered = _gathered((shared, _described(failure)), tasks)
    if failure:
        raise failure
    for rank, (_, failed) in enumerate(gathered):
        if failed is not None:
            kind, message = failed
            raise kind(f"{message} (in process {rank})")
    for theirs, _ in gathered:
        for index, result in theirs.items():
            if index not in results:
                yield index, moved(_as_tensors(result), tasks[index].weight.device)


def _divided(tasks: Sequence[Task]) -> tuple[list[int], list[int]]:
    """The indices of the tasks that this process solves for all, and of those that it solves for itself."""
    contents = _gathered([_content(task) for task in tasks], tasks)
    common = []
    private = []
    for index, (first, *others) in enumerate(zip(*contents, strict=True)):
        if first is not None and all(other == first for other in others):
            common.append(index)
        else:
            private.append(index)
    costs = [cost(tasks[index]) for index in common]
    share = shares(costs, dist.get_world_size())[dist.get_rank()]
    return [common[position] for position in share], private


def _content(task: Task) -> str | None:
    """A key that tells the processes' weights apart; None where there is none, and the solver will say why.

    Not the cache's key, which takes ten times as long and is needed only for the layers that this process
    solves: with it, all processes would hash every weight before they share any.
    """
    if not is_weight(task.weight):
        return None
    return quick_fingerprint(task.weight)


def _as_arrays(result: MinorSubspace) -> MinorSubspace:
    """For a message: NumPy's arrays are pickled in a tenth of the time of tensors.

    The 105 results of one of two processes for SmolLM2-135M are written and read in 9 instead of 60 ms.
    """
    on_host = moved(result, "cpu")
    return replace(on_host, basis=on_host.basis.numpy(), singular_values=on_host.singular_values.numpy())


def _as_tensors(message: MinorSubspace) -> MinorSubspace:
    return replace(
        message,
        basis=torch.from_numpy(message.basis),
        singular_values=torch.from_numpy(message.singular_values),
    )


def _described(failure: Exception | None) -> tuple[type[Exception], str] | None:
    """A failure as the other processes raise it."""
    if failure is None:
        return None
    if isinstance(failure, ValueError):
        return ValueError, str(failure)
    return RuntimeError, str(failure)


def _gathered(value: object, tasks: Sequence[Task]) -> list:
    """``value`` of every process, by rank.

    NCCL sends from the current device, which a script need not have set: all processes may have the first.
    """
    device = tasks[0].weight.get_device()
    if device < 0:  # on a CPU
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count() and torch.cuda.current_device() == 0:
            device = local
    gathered = [None] * dist.get_world_size()
    with torch.cuda.device(device):  # -1 leaves the current device as it is
        dist.all_gather_object(gathered, value)
    return gathered


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices of ``costs`` in ``count`` parts of nearly equal sums: largest first, to the least loaded."""
    loads = [0.0] * count
    parts: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        parts[least].append(index)
    return parts


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def decline(tasks: Sequence[Task]) -> None:
    """Tell the processes that request these layers not to wait for this one, which has no weights."""
    if not tasks or not _several_processes():
        return
    for store, meeting in _meetings(tasks):
        if _decided(store, meeting, _DECLINED) != _MISSED:
            return


def _all_agree(tasks: Sequence[Task]) -> bool:
    """Whether all processes are here with the same layers, within ``PATIENCE``.

    The last process to arrive decides for sharing. One that has no weights decides against it, and so does
    one that has waited long enough; the first decision in the store binds all. A process that arrives at a
    meeting where others have waited for it in vain goes on to the next meeting: it cannot know whether it is
    late or the others had called alone before, and after that all are at the same meeting again.
    """
    for store, meeting in _meetings(tasks):
        decision = f"{meeting}/decision"
        if store.add(f"{meeting}/arrived", 1) == dist.get_world_size():
            decided = _decided(store, meeting, _TOGETHER)
        elif store.check([decision]):
            decided = store.get(decision)
        else:
            _wait_for(store, decision, len(tasks))
            return _decided(store, meeting, _MISSED) == _TOGETHER
        if decided != _MISSED:
            return decided == _TOGETHER
    return False


def _wait_for(store: dist.Store, decision: str, count: int) -> None:
    """Wait for the decision on ``count`` layers, with a warning if it does not come within ``PATIENCE``."""
    try:
        store.wait([decision], PATIENCE)
    except (RuntimeError, dist.DistError):  # timed out
        _logger.warning(
            "not all processes asked for these %d minor subspaces within %d s: each computes its own.",
            count,
            PATIENCE.total_seconds(),
        )


def _decided(store: dist.Store, meeting: str, proposed: bytes) -> bytes:
    """The decision of a meeting: what is ``proposed`` here, unless there was one before."""
    return store.compare_set(f"{meeting}/decision", "", proposed.decode())


def _meetings(tasks: Sequence[Task]) -> Iterator[tuple[dist.Store, str]]:
    """Where processes that request these layers find each other: this process's next meetings, in order.

    The store counts, for each process and the same layers, the meetings at which it has arrived.
    """
    find_store = getattr(dist.distributed_c10d, "_get_default_store", None)
    if find_store is None:  # it is not public, and may go
        return

    store = find_store()
    rank = dist.get_rank()
    layers = [(task.name, tuple(task.weight.shape), str(task.weight.dtype), task.rank) for task in tasks]
    digest = hashlib.blake2b(repr(layers).encode(), digest_size=16).hexdigest()
    prefix = f"mica/{digest}"
    while True:
        number = store.add(f"{prefix}/process {rank}", 1)
        yield store, f"{prefix}/{number}"
