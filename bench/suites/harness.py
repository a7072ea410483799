"""Shared by the suites: what depends on the device, building implementations one by one, refusals."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any, TypeVar

import pytest
import torch

from bench.measure.machine import DEVICE, IS_DRY, ON_ACCELERATOR
from bench.results import journal
from bench.results.cell import is_refused
from bench.results.names import in_words

T = TypeVar("T")

# Why a cell, or an implementation in it, has no number: (group, implementation or None) -> a sentence. After
# a crash the run continues in a new process, which must not retry what crashed.
refusals: dict[tuple[str, str | None], str] = {
    (one["group"], one.get("implementation")): one["why"]
    for one in journal.read()
    if one["kind"] == "refused"
}
needs_accelerator = pytest.mark.skipif(not ON_ACCELERATOR, reason="needs a GPU, or a dry run")
CRASHED = 86  # exit status of a process whose device no longer responds


def pick(default: T, cuda: T | None = None, dry: T | None = None) -> T:
    """The value for a GPU or a dry run, else ``default``."""
    chosen = None
    if IS_DRY:
        chosen = dry
    elif DEVICE == "cuda":
        chosen = cuda
    return default if chosen is None else chosen


def iterations(seconds: float, sample: float = 0.005) -> int:
    """How many calls of this length make a sample of about ``sample`` seconds: 1 to 100.

    The calls are those of the bare layer, the fastest; the others take up to five times as long.
    """
    if IS_DRY:
        return 1
    return min(100, max(1, ceil(sample / seconds)))


@dataclass(frozen=True)
class Cell:
    """A piece of work, which the cells of each suite describe."""

    @property
    def axes(self) -> dict[str, str | int]:
        """Its suite, and what tells it from the others; the dtype comes last.

        A name that begins with another one's would share its refusals.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        return in_words(self.axes)


def each(cells: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises by cell."""
    return pytest.mark.parametrize("cell", [pytest.param(cell, id=_key(cell)) for cell in cells])


def each_part(cells: Iterable[Any], parts: Sequence[str]) -> pytest.MarkDecorator:
    """The same by cell and part, where ``cell.implementations(part)`` has any."""
    cases = []
    for cell, part in product(cells, parts):
        if cell.implementations(part):
            cases.append(pytest.param(cell, part, id=f"{_key(cell)}-{part}"))
    return pytest.mark.parametrize(("cell", "part"), cases)


def _key(cell: Cell) -> str:
    """Its name for ``-k``, as "layer-MiCA-1024-tokens-2048x2048-r16-bfloat16"."""
    return cell.name.replace(" x ", "x").replace(" = ", "").replace(", ", "-").replace(" ", "-")


def refuse(group: str, why: str, name: str | None = None) -> None:
    """For good: the cell, or this implementation in it."""
    if why_refused(group, name or "") is None:
        refusals[group, name] = why
        whose = {} if name is None else {"implementation": name}
        journal.write("refused", group=group, **whose, why=why)


def why_refused(group: str, implementation: str) -> str | None:
    for (name, refused), why in refusals.items():
        if is_refused({"group": name, "implementation": refused}, group, implementation):
            return why
    return None


def sentence(error: BaseException) -> str:
    """The first line of its message, with its type unless it is a failed check."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, AssertionError) and text:
        return text
    return f"{type(error).__name__}: {text}"


def build_all(group: str, implementations: Iterable[str], build: Callable[[str], T]) -> dict[str, T]:
    """What ``build(implementation)``, which also checks results, returns for each.

    One that raises is refused in ``group`` and in all groups whose names begin with it; the others continue.
    """
    built = {}
    for name in implementations:
        if why_refused(group, name):
            continue
        journal.write("doing", group=group, implementation=name)
        try:
            built[name] = build(name)
        except Exception as error:
            refuse(group, sentence(error), name)
            leave_if_crashed()
    return built


def leave_if_crashed() -> None:
    """A device error persists: all that follows in this process would fail, and be blamed for it."""
    if DEVICE != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(CRASHED)
