"""Many weights at once: the cache first, then an accelerator by shapes, then the CPU's threads."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mica.subspace import workers
from mica.subspace.cache import SubspaceCache
from mica.subspace.device import MEMORY_AT_LEAST, batch_size, is_on_host
from mica.subspace.fingerprint import fingerprint
from mica.subspace.result import MinorSubspace, moved
from mica.subspace.solver import solve_each, without_autocast

_logger = logging.getLogger("mica")


class Task(NamedTuple):
    """``weight`` (out_features, in_features), the ``rank`` to solve for, and its name in messages."""

    name: str
    weight: torch.Tensor
    rank: int


def cost(task: Task) -> float:
    """Floating-point operations of a solution, roughly: the Gram matrix and two factorisations."""
    short, long = sorted(task.weight.shape)
    return float(short * short * (long + short))


def accelerator() -> torch.device | None:
    """The current accelerator, if there is one with fp64."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None or is_on_host(device) else device


def solve_many(
    tasks: Sequence[Task],
    *,
    device: str | torch.device = "auto",
    cache: SubspaceCache | None = None,
    keys: Sequence[str] | None = None,
) -> Iterator[tuple[int, MinorSubspace]]:
    """The minor subspace of every task with its index, each as soon as it is known, in no particular order.

    Results lie on the device of their weight. On an accelerator layers of one shape are solved together, as
    many as fit in 3 times the largest weight in fp32, or 256 MiB; the CPU takes over where that is too much.

    Args:
        tasks: weights may lie on different devices.
        device: where weights that lie on the CPU are solved: "auto" (on an accelerator, if there is one),
            or a device.
        cache: read before and written after; None for none.
        keys: the ``fingerprint`` of every weight, where the caller has them.

    Raises:
        ValueError: a weight or rank that ``minor_subspace`` refuses; the message begins with the task's name.
    """
    target = accelerator() if device == "auto" else torch.device(device)
    memory = max((3 * 4 * task.weight.numel() for task in tasks), default=0)
    memory = max(memory, MEMORY_AT_LEAST)
    solver = Solver(tasks, cache, keys, memory)
    groups: dict[tuple, list[int]] = defaultdict(list)
    on_host: list[int] = []
    for index, (_, weight, rank) in enumerate(tasks):
        where = target if weight.device.type == "cpu" and target is not None else weight.device
        if is_on_host(where):
            on_host.append(index)
        else:
            groups[where, weight.shape, weight.dtype, rank].append(index)

    for (where, shape, _, rank), indices in groups.items():
        missing = [index for index in indices if not solver.look_up(index)]
        yield from solver.pop(indices)
        size = batch_size(*shape, memory)
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            try:
                solver.solve_together(chunk, where, rank)
            except torch.OutOfMemoryError:
                _logger.warning("%s is out of memory: %d layers are solved on the CPU.", where, len(chunk))
                on_host.extend(chunk)
            yield from solver.pop(chunk)
    for index in workers.run(solver.solve, on_host, lambda index: workers.is_small(tasks[index].weight)):
        yield from solver.pop([index])


class Solver:
    """The tasks by index, and the results that have not been handed out yet."""

    def __init__(
        self, tasks: Sequence[Task], cache: SubspaceCache | None, keys: Sequence[str] | None, memory: int
    ):
        self._tasks = tasks
        self._cache = cache
        self._memory = memory
        self._keys = dict(enumerate(keys or ()))
        self._results: dict[int, MinorSubspace] = {}

    def pop(self, indices: Sequence[int]) -> Iterator[tuple[int, MinorSubspace]]:
        for index in indices:
            if index in self._results:
                yield index, self._results.pop(index)

    def look_up(self, index: int) -> bool:
        """Whether the cache has it."""
        if self._cache is None:
            return False
        _, weight, rank = self._tasks[index]
        if index not in self._keys:
            self._keys[index] = fingerprint(weight)
        result = self._cache.get(weight, rank, key=self._keys[index])
        if result is not None:
            self._results[index] = result
        return result is not None

    def solve(self, index: int) -> None:
        """One task, from the cache or where its weight lies."""
        if not self.look_up(index):
            name, weight, rank = self._tasks[index]
            # An accelerator's weight is solved here if the accelerator had no memory for it.
            self._keep(index, _solved(name, weight.cpu(), rank)[0])

    def solve_together(self, indices: Sequence[int], device: torch.device, rank: int) -> None:
        """Tasks of one shape, in one batch on ``device``."""
        weights = [self._tasks[index].weight.to(device) for index in indices]
        with without_autocast(device.type):  # under which torch.stack refuses 16-bit tensors, see `extremes`
            stacked = torch.stack(weights) if len(weights) > 1 else weights[0].unsqueeze(0)
        del weights
        names = " or ".join(self._tasks[index].name for index in indices)
        for index, result in zip(indices, _solved(names, stacked, rank, self._memory), strict=True):
            self._keep(index, result)

    def _keep(self, index: int, result: MinorSubspace) -> None:
        weight = self._tasks[index].weight
        if self._cache is not None:
            self._cache.put(weight, result, key=self._keys[index])
        self._results[index] = moved(result, weight.device)


def _solved(name: str, weights: torch.Tensor, rank: int, memory: int | None = None) -> list[MinorSubspace]:
    try:
        return solve_each(weights, rank, memory=memory)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
