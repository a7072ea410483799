"""Many weights: the cache first, then an accelerator, one after the other, then the CPU's threads."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mica.subspace import threads
from mica.subspace.cache import SubspaceCache
from mica.subspace.content_hash import content_hash
from mica.subspace.device import is_on_host
from mica.subspace.result import MinorSubspace, move
from mica.subspace.solver import solve

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


def run_tasks(
    tasks: Sequence[Task],
    indices: Sequence[int],
    *,
    device: str | torch.device = "auto",
    cache: SubspaceCache | None = None,
) -> Iterator[tuple[int, MinorSubspace]]:
    """Yield (index, minor subspace) of the tasks at ``indices`` as soon as it is known, in any order.

    Results lie on the device of their weight. Layers for which an accelerator has no memory are solved on the
    CPU.

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

    def solved(index: int, where: torch.device) -> MinorSubspace:
        """Solve a task on a device, and store the result."""
        task = tasks[index]
        try:
            result = solve(task.weight.to(where), task.rank)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(f"the minor subspace of {task.name} could not be computed: {error}") from error
        if cache is not None:
            cache.put(task.key, result)
        return move(result, task.weight.device)

    on_host: list[int] = []
    for index in indices:
        task = tasks[index]
        result = None
        if cache is not None:
            result = cache.get(task.key, task.rank)
        where = task.weight.device
        if where.type == "cpu" and target is not None:
            where = target
        if result is not None:
            yield index, move(result, task.weight.device)
        elif is_on_host(where):
            on_host.append(index)
        else:
            try:
                result = solved(index, where)
            except torch.OutOfMemoryError:
                _logger.warning("%s is out of memory: %s is solved on the CPU.", where, task.name)
                on_host.append(index)
            else:
                yield index, result

    def solved_on_host(index: int) -> MinorSubspace:
        return solved(index, torch.device("cpu"))

    yield from threads.run(solved_on_host, on_host, lambda index: threads.is_small(tasks[index].weight))
