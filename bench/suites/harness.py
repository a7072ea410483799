"""Shared by the suites: the size of a run, building and checking implementations one by one, refusals."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import ceil
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from bench.measure.machine import DEVICE, IS_DRY, ON_ACCELERATOR, SIZE
from bench.results import journal
from bench.results.cell import is_refused

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


def pick(
    default: T, quick: T | None = None, full: T | None = None, cuda: T | None = None, dry: T | None = None
) -> T:
    """The value for this size of run on this device, else ``default``; a dry run tries ``dry``, ``quick``."""
    if IS_DRY:
        choices = dry, quick
    elif DEVICE == "cuda" and cuda is not None:
        choices = (cuda,)
    else:
        choices = ({"quick": quick, "default": None, "full": full}[SIZE],)
    return next((one for one in choices if one is not None), default)


def iterations(seconds: float, sample: float = 0.005) -> int:
    """How many calls of this length make a sample of about ``sample`` seconds: 1 to 100.

    The calls are those of the bare layer, the fastest; the others take up to five times as long.
    """
    return 1 if IS_DRY else min(100, max(1, ceil(sample / seconds)))


def under_autocast(module: nn.Module) -> Callable:
    """Its call, as Trainer makes it with ``bf16=True``: the forward only."""
    return torch.autocast(DEVICE, torch.bfloat16)(module.__call__)


def turns(
    cells: Iterable[Any],
    parts: Sequence[str],
    rounds: Callable[[Any], int],
    names: Callable[[Any, str], Iterable[str]],
) -> pytest.MarkDecorator:
    """Parametrises by cell, round_, part and implementation, the innermost: they take turns in a round."""
    cases = [
        pytest.param(cell, round_, part, name, id=f"{cell.key}-{part}-{round_}-{name}")
        for cell in cells
        for round_, part in product(range(rounds(cell)), parts)
        for name in names(cell, part)
    ]
    return pytest.mark.parametrize(("cell", "round_", "part", "implementation"), cases)


def whole_turns(cells: Iterable[Any]) -> pytest.MarkDecorator:
    """The same of cells without parts, which know their ``rounds`` and ``implementations``."""
    cases = [
        pytest.param(cell, round_, name, id=f"{getattr(cell, 'key', cell.name)}-{round_}-{name}")
        for cell in cells
        for round_, name in product(range(cell.rounds), cell.implementations)
    ]
    return pytest.mark.parametrize(("cell", "round_", "implementation"), cases)


def refuse(group: str, why: str, name: str | None = None) -> None:
    """For good: the cell, or this implementation in it."""
    if why_refused(group, name or "") is None:
        refusals[group, name] = why
        whose = {} if name is None else {"implementation": name}
        journal.write("refused", group=group, **whose, why=why)


def sentence(error: BaseException) -> str:
    """The first line of its message, with its type unless it is a failed check."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"


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


def why_refused(group: str, implementation: str) -> str | None:
    for (name, refused), why in refusals.items():
        if is_refused({"group": name, "implementation": refused}, group, implementation):
            return why
    return None


def leave_if_crashed() -> None:
    """A device error persists: all that follows in this process would fail, and be blamed for it."""
    if DEVICE != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(CRASHED)
