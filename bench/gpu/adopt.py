"""A run on a GPU becomes part of the checkout: ``python -m bench.gpu --adopt FILE``.

1. The result is copied to ``bench/results/<device>/``.
2. What it has measured of `mica.kernels.configs` replaces what kernels/measured.json has for this device.
3. The pages are written from both (`bench.pages`).

What remains is to look at the difference, run the tests, and commit. Adopting the same file again changes
nothing. A result of some stages replaces the suites that it has timed, and leaves the others.
"""

from __future__ import annotations

from pathlib import Path

from bench import pages
from bench.gpu import forms
from bench.measure.machine import device_folder
from bench.results import journal
from bench.results.schema import Result
from mica.kernels import measured
from mica.kernels.measured import Measured


class RefusedError(Exception):
    """A file that cannot be adopted; the message says why, in one sentence."""


def adopt(file: Path, root: Path | None = None) -> tuple[Path, Measured]:
    """Into the checkout in ``root``; returns the copied result, and what its device's entry is now.

    ``root``: by default this checkout.

    Raises:
        RefusedError: see `load`; or another result has this name.
    """
    root = root or pages.ROOT
    result = load(file)
    device = result.machine["device"]
    copied = _copy(result, file, root / "bench" / "results" / device_folder(device))
    table = root / "kernels" / measured.FILE.name
    devices = measured.read(table)
    source = copied.relative_to(root).as_posix()
    entry = _merged(devices.get(device, Measured({})), result, source)
    measured.write({**devices, device: entry}, table)
    pages.write(root)
    return copied, entry


def load(file: Path) -> Result:
    """A result, or what the journal of a run that was cut off folds into.

    Raises:
        RefusedError: it is neither, is of no GPU, or has measured nothing.
    """
    if not file.is_file():
        raise RefusedError(f"there is no {file}.")
    try:
        result = _of_journal(file) if file.suffix == ".jsonl" else Result.load(file)
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


def _of_journal(file: Path) -> Result:
    beside = file.with_suffix(".json")
    machine = Result.load(beside).machine if beside.is_file() else {}
    return journal.fold(journal.read(file), machine)


def _copy(result: Result, file: Path, folder: Path) -> Path:
    """The result as a file of the folder; where it lies there already, it stays."""
    copied = folder / f"{file.stem}.json"
    is_there = file.resolve().with_suffix(".json") == copied.resolve()
    if copied.exists() and not is_there and Result.load(copied) != result:
        raise RefusedError(f"{copied} is another result: rename {file}.")
    folder.mkdir(parents=True, exist_ok=True)
    result.save(copied)
    return copied


def _merged(entry: Measured, result: Result, source: str) -> Measured:
    """The device's entry with what this result has timed in place of what was there."""
    suites = {group.axes["suite"] for group in result.groups if "suite" in group.axes}
    entry = entry._replace(sources={**entry.sources, **dict.fromkeys(suites, source)})
    if "forms" not in suites:
        return entry
    rows = forms.rows(result)
    return entry._replace(
        forms=tuple((row.tokens, row.rank, row.forward, row.backward) for row in rows),
        host_bound=forms.host_bound(result, rows),
    )
