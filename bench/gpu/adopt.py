"""A run on a GPU becomes part of the checkout: ``python -m bench.gpu --adopt FILE``.

1. The result is copied to ``bench/results/<device>/``.
2. The pages are written (`bench.pages`), each suite's figures from the last result, by name, that has it.

What remains is to look at the difference, run the tests, and commit. Adopting the same file again changes
nothing. Which form of a layer runs is no part of this: each device measures that itself.
"""

from __future__ import annotations

from pathlib import Path

from bench import pages
from bench.measure.machine import device_folder
from bench.results import journal
from bench.results.schema import Result


class RefusedError(Exception):
    """A file that cannot be adopted; the message says why, in one sentence."""


def adopt(file: Path, root: Path | None = None) -> Path:
    """Into the checkout in ``root``; returns the copied result.

    ``root``: by default this checkout.

    Raises:
        RefusedError: see `load`; or another result has this name.
    """
    root = root or pages.ROOT
    result = load(file)
    copied = _copy(result, file, root / "bench" / "results" / device_folder(result.machine["device"]))
    pages.write(root)
    return copied


def load(file: Path) -> Result:
    """A result, or what the journal of a run that was cut off folds into.

    Raises:
        RefusedError: it is neither, is of no GPU, or has measured nothing.
    """
    if not file.is_file():
        raise RefusedError(f"there is no {file}.")
    try:
        result = journal.load(file)
    except (KeyError, TypeError, ValueError):
        raise RefusedError(f"{file} is not a result of the benchmarks.") from None
    device = result.machine.get("device")
    if device == "dry run" or result.machine.get("size") == "dry":
        raise RefusedError(f"{file} is of a dry run, whose times are not measurements.")
    if device is None:
        raise RefusedError(f"{file} does not say which machine it is of.")
    if device == "cpu":
        raise RefusedError(f"{file} is of a CPU: only a run on a GPU can be adopted.")
    if not result.groups:
        raise RefusedError(f"{file} has no measurement.")
    return result


def _copy(result: Result, file: Path, folder: Path) -> Path:
    """The result as a file of the folder; where it lies there already, it stays."""
    copied = folder / f"{file.stem}.json"
    is_there = file.resolve().with_suffix(".json") == copied.resolve()
    if copied.exists() and not is_there and Result.load(copied) != result:
        raise RefusedError(f"{copied} is another result: rename {file}.")
    folder.mkdir(parents=True, exist_ok=True)
    result.save(copied)
    return copied
