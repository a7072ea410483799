"""Many weights at once: the cache first, then an accelerator by shapes, then the CPU's threads."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mica.subspace import threads
from mica.subspace.cache import SubspaceCache
from mica.subspace.content_hash import content_hash
from mica.subspace.device import batch_size, is_on_host
from mica.subspace.result import MinorSubspace, move
from mica.subspace.solver import solve_each, without_autocast

_logger = logging.getLogger("mica")


@dataclass(frozen=True, eq=False)
class Task:
    """A weight (out_features, in_features), its ``name`` in messages, and the ``rank`` to solve for."""

    name: str
    weight: torch.Tensor
    rank: int

    @cached_property
    def key(self) -> str:
        """The weight's content hash."""
        return content_hash(self.weight)


def cost(task: Task) -> float:
    """Floating-point operations of a solution, roughly: the Gram matrix and two factorisations."""
    short, long = sorted(task.weight.shape)
    return float(short * short * (long + short))


def accelerator() -> torch.device | None:
    """The current accelerator, if there is one with fp64."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    if device is None or is_on_host(device):
        return None
    return device


def solve_many(
    tasks: Sequence[Task], *, device: str | torch.device = "auto", cache: SubspaceCache | None = None
) -> Iterator[tuple[int, MinorSubspace]]:
    """Yield (index, minor subspace) for every task as soon as it is known, in no particular order.

    Results lie on the device of their weight. On an accelerator, layers of one shape are solved together, up
    to 8 in a quarter of the memory that is free; layers that do not fit are solved on the CPU.

    Args:
        tasks: weights may lie on different devices.
        device: where weights that lie on the CPU are solved: "auto" (on an accelerator, if there is one),
            or a device.
        cache: read before a task is solved and written afterwards; None: no cache.

    Raises:
        TypeError, ValueError: a weight or rank that ``minor_subspace`` refuses; the message begins with the
            task's name.
    """
    if device == "auto":
        target = accelerator()
    else:
        target = torch.device(device)
    groups, on_host = _group(tasks, target)
    for (where, shape, *_), indices in groups.items():
        missing: list[int] = []
        for index in indices:
            stored = _look_up(tasks[index], cache)
            if stored is None:
                missing.append(index)
            else:
                yield index, stored

        size = batch_size(*shape, where)
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            try:
                results = solve_together([tasks[index] for index in chunk], where, cache)
            except torch.OutOfMemoryError:
                _logger.warning("%s is out of memory: %d layers are solved on the CPU.", where, len(chunk))
                on_host.extend(chunk)
            else:
                yield from zip(chunk, results, strict=True)

    yield from threads.run(
        lambda index: _solve(tasks[index], cache),
        on_host,
        lambda index: threads.is_small(tasks[index].weight),
    )


def _group(tasks: Sequence[Task], target: torch.device | None) -> tuple[dict[tuple, list[int]], list[int]]:
    """The indices of the tasks that an accelerator solves together, by device, shape, dtype and rank.

    And those of the tasks that the CPU solves. ``target`` takes the weights that lie on the CPU.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    on_host: list[int] = []
    for index, task in enumerate(tasks):
        where = task.weight.device
        if where.type == "cpu" and target is not None:
            where = target
        if is_on_host(where):
            on_host.append(index)
        else:
            groups[where, task.weight.shape, task.weight.dtype, task.rank].append(index)
    return groups, on_host


def solve_together(
    tasks: Sequence[Task], device: torch.device, cache: SubspaceCache | None
) -> list[MinorSubspace]:
    """The minor subspaces of tasks of one shape and rank, solved in one batch on ``device``."""
    weights = [task.weight.to(device) for task in tasks]
    with without_autocast(device.type):  # autocast's torch.stack refuses 16-bit tensors, see `extremes`
        if len(weights) > 1:
            stacked = torch.stack(weights)
        else:
            stacked = weights[0].unsqueeze(0)  # no copy
    del weights
    names = " or ".join(task.name for task in tasks)
    results = _solve_each(names, stacked, tasks[0].rank)
    return [_store(task, result, cache) for task, result in zip(tasks, results, strict=True)]


def _solve(task: Task, cache: SubspaceCache | None) -> MinorSubspace:
    """The minor subspace, from the cache or solved on the CPU."""
    stored = _look_up(task, cache)
    if stored is not None:
        return stored
    # The weight is still on an accelerator if there was no memory to solve it there
    (result,) = _solve_each(task.name, task.weight.cpu(), task.rank)
    return _store(task, result, cache)


def _look_up(task: Task, cache: SubspaceCache | None) -> MinorSubspace | None:
    if cache is None:
        return None
    return cache.get(task.weight, task.rank, key=task.key)


def _store(task: Task, result: MinorSubspace, cache: SubspaceCache | None) -> MinorSubspace:
    """Store ``result`` in the cache, and return it on the weight's device."""
    if cache is not None:
        cache.put(task.weight, result, key=task.key)
    return move(result, task.weight.device)


def _solve_each(name: str, weights: torch.Tensor, rank: int) -> list[MinorSubspace]:
    """``solve_each``, whose errors begin with the name."""
    try:
        return solve_each(weights, rank)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
