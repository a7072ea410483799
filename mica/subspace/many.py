"""Many weights at once: the cache first, then an accelerator by shapes, then the CPU's threads."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mica.subspace import threads
from mica.subspace.cache import SubspaceCache
from mica.subspace.content_hash import content_hash
from mica.subspace.device import batch_size, is_on_host
from mica.subspace.result import MinorSubspace, move
from mica.subspace.solver import no_autocast, solve_stack

_logger = logging.getLogger("mica")


@dataclass(frozen=True, eq=False)
class Task:
    """One weight whose minor subspace is wanted.

    Attributes:
        name: What messages call the weight, such as "layer 'up'".
        weight: The matrix, (out_features, in_features).
        rank: The number of vectors.
    """

    name: str
    weight: Tensor
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


def run_tasks(
    tasks: Sequence[Task],
    indices: Sequence[int],
    *,
    device: str | torch.device = "auto",
    cache: SubspaceCache | None = None,
) -> Iterator[tuple[int, MinorSubspace]]:
    """Yield (index, minor subspace) of the tasks at ``indices`` as soon as it is known, in any order.

    Results lie on the device of their weight. On an accelerator, layers of one shape are solved together, up
    to 8 in a quarter of the memory that is free; layers that do not fit are solved on the CPU.

    Args:
        tasks: Tasks whose weights are finite and have room for the rank; they may lie on different devices.
        indices: The positions in ``tasks`` of those to solve.
        device: Where weights that lie on the CPU are solved: "auto" means on an accelerator, if there is one;
            otherwise it is a device.
        cache: The cache that is read before a task is solved and written afterwards; None for no cache.

    Raises:
        RuntimeError: A task could not be solved; the message has its name.
    """
    target = accelerator() if device == "auto" else torch.device(device)
    groups: dict[tuple, list[int]] = defaultdict(list)  # what an accelerator solves together
    on_host = []
    for index in indices:
        task = tasks[index]
        stored = None if cache is None else cache.get(task.key, task.rank)
        where = task.weight.device
        if where.type == "cpu" and target is not None:
            where = target
        if stored is not None:
            yield index, move(stored, task.weight.device)
        elif is_on_host(where):
            on_host.append(index)
        else:
            groups[where, task.weight.shape, task.weight.dtype, task.rank].append(index)

    def solve(chunk: Sequence[int], where: torch.device) -> list[MinorSubspace]:
        """Solve tasks of one shape, dtype and rank on a device, and store the results."""
        first = tasks[chunk[0]]
        try:
            with no_autocast():  # under which torch.stack refuses 16-bit tensors, see `extremes`
                weights = [tasks[index].weight.to(where) for index in chunk]
                stacked = weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)
            del weights
            results = solve_stack(stacked, first.rank)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            names = ", ".join(tasks[index].name for index in chunk)
            raise RuntimeError(f"the minor subspace of {names} could not be computed: {error}") from error
        moved = []
        for index, result in zip(chunk, results, strict=True):
            if cache is not None:
                cache.put(tasks[index].key, result)
            moved.append(move(result, tasks[index].weight.device))
        return moved

    for (where, shape, *_), group in groups.items():
        size = batch_size(*shape, where)
        for start in range(0, len(group), size):
            chunk = group[start : start + size]
            try:
                results = solve(chunk, where)
            except torch.OutOfMemoryError:
                _logger.warning("%s is out of memory: %d layers are solved on the CPU.", where, len(chunk))
                on_host.extend(chunk)
            else:
                yield from zip(chunk, results, strict=True)

    def solve_on_host(index: int) -> MinorSubspace:
        return solve([index], torch.device("cpu"))[0]

    yield from threads.run(solve_on_host, on_host, lambda index: threads.is_small(tasks[index].weight))
