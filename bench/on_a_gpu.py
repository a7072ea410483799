"""What the pages say of GPUs: that nothing has been measured, or the figures of adopted results.

Those are the results of GPUs in ``bench/results``: of each device and suite the last one by its name, which
begins with the day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.report.targets import KERNELS, default_configuration
from bench.report.words import Row, markdown, shape_in_words, speedup
from bench.results import names
from bench.results.cell import Group
from bench.results.names import BARE, BOTH, COPY, CUBLAS, DEVICE_TIME, FAST, STOCK, STOCK_16, WALL
from bench.results.schema import Result

LIBRARIES = ("torch", "triton", "peft")
SUBSPACE = "subspace"  # the suite of the solver
Devices = dict[str, dict[str, str]]  # device -> suite -> its result, a path within the checkout


class Sentence(NamedTuple):
    """What a page says where nothing was measured, and else, of the devices that are listed in place of {}.

    ``suite``: only devices on which this one was timed count; "": any.
    """

    nothing: str
    measured: str
    suite: str = ""

    def of(self, devices: Devices) -> str:
        names_of_devices = sorted(
            name for name, sources in devices.items() if not self.suite or self.suite in sources
        )
        if not names_of_devices:
            return self.nothing
        *others, last = names_of_devices
        return self.measured.format(f"{', '.join(others)} and {last}" if others else last)


SENTENCES = {
    "gpu-readme": Sentence(
        "**Nothing here has been measured on a GPU yet**: see [limits](#limits).",
        "[Measurements on a GPU](bench/README.md#on-a-gpu) are of {}.",
    ),
    "gpu-limits": Sentence(
        "**They and the solver have not been run on a GPU**: all measurements are from CPUs.",
        "**GPU figures are of {} only.**",
    ),
    "gpu-kernels": Sentence(
        "**They have not been run on a GPU yet.**",
        "They have been [measured](../bench/README.md#on-a-gpu) on {}.",
    ),
    "gpu-solver": Sentence(
        "It has not been run on a GPU yet.",
        "It has been [measured](../../bench/README.md#on-a-gpu) on {}.",
        SUBSPACE,
    ),
    "gpu-summary": Sentence(
        "**Nothing has been measured on a GPU yet.**",
        "[On a GPU](#on-a-gpu), measurements are of {}.",
    ),
}
SECTION = "gpu-section"
TEXTS = (*SENTENCES, SECTION)


def text(name: str, root: Path) -> str:
    """One of `TEXTS`, from the results of the checkout in ``root``."""
    devices = adopted(root)
    if name == SECTION:
        return _section(devices, root)
    return SENTENCES[name].of(devices)


def adopted(root: Path) -> Devices:
    """Of the checkout in ``root``."""
    devices: Devices = {}
    for file in sorted((root / "bench" / "results").glob("*/*.json"), key=lambda file: file.name):
        content = json.loads(file.read_text(encoding="utf-8"))
        device = content.get("machine_info", {}).get("device", "cpu")
        if device != "cpu":
            path = file.relative_to(root).as_posix()
            suites = {group.axes["suite"] for group in Result.load(file).groups}
            devices.setdefault(device, {}).update(dict.fromkeys(suites, path))
    return devices


def _section(devices: Devices, root: Path) -> str:
    """All figures, a part for each device."""
    if not devices:
        return "\n\nNothing has been measured on a GPU yet.\n\n"
    parts = []
    for name in sorted(devices):
        parts += [f"### {name}", *_device(devices[name], root)]
    return "\n\n" + "\n\n".join(parts) + "\n\n"


def _device(sources: dict[str, str], root: Path) -> Iterator[str]:
    results = {path: Result.load(root / path) for path in sorted({*sources.values()})}
    for path, result in results.items():
        yield _source(path, result)
    suites = {suite: results[path].with_both() for suite, path in sources.items()}
    yield from _table(
        "Forward + backward of a layer in bf16, by device time:",
        ["layer", "bare", "stock PEFT", "mica.fast", "speedup", "against bf16 adapters"],
        _layers(suites),
    )
    yield from _table(
        "Blocks and training steps, by the wall clock:",
        ["", "bare", "stock PEFT", "mica.fast", "speedup"],
        _steps(suites),
    )
    yield from _table(
        "Kernels, by device time: their bandwidth as a share of a copy's, and their speed against cuBLAS.",
        ["kernel", "cells", "share of a copy", "median", "against cuBLAS", "median"],
        _kernels(suites),
    )
    yield from _table(
        "Initialisation of a model, and minor subspaces of single weights:",
        ["", "stock PEFT, or the SVD", "mica.fast", "speedup"],
        [*_initialisation(suites), *_subspaces(suites)],
    )


def _source(path: str, result: Result) -> str:
    """Where figures are from. The links are those of a page in ``bench``."""
    machine = result.machine
    libraries = ", ".join(f"{name} {machine[name]}" for name in LIBRARIES if name in machine)
    raw = path.removeprefix("bench/")
    report = raw.removesuffix(".json") + ".md"
    commit = str(machine.get("commit"))[:12]
    return (
        f"Measured by `make gpu` at commit {commit} ({libraries};\n[report]({report}), [raw results]({raw}))."
    )


def _table(title: str, header: Row, rows: list[Row]) -> Iterator[str]:
    if rows:
        yield title
        yield markdown(header, rows)


def _cells(suites: dict[str, Result], suite: str, **axes: str) -> list[Group]:
    return [*suites[suite].select(suite=suite, **axes)] if suite in suites else []


def _layers(suites: dict[str, Result]) -> list[Row]:
    rows = []
    for cell in _cells(suites, "layer", dtype="bfloat16", clock=DEVICE_TIME, **{"pass": BOTH}):
        theirs, ours = (STOCK, FAST)
        if "compiler" in cell.axes:
            theirs, ours = (names.COMPILED, names.COMPILED_FAST)
        if not {BARE, theirs, ours} <= cell.timings.keys():
            continue
        shape = shape_in_words(cell.axes)
        label = f"{shape['out × in']}, {cell.axes['tokens']:,} tokens, r = {cell.axes['rank']}"
        if cell.axes.get("adapter", names.MICA) != names.MICA:
            label = f"{label}, {cell.axes['adapter']}"
        if "dropout" in cell.axes:
            label = f"{label}, dropout {cell.axes['dropout']}"
        if "compiler" in cell.axes:
            label = f"{label}, both under {cell.axes['compiler']}"
        against_16 = speedup(cell.ratio(ours, STOCK_16)) if STOCK_16 in cell.timings else ""
        rows.append([label, *_times(cell, theirs, ours), speedup(cell.ratio(ours, theirs)), against_16])
    return rows


def _steps(suites: dict[str, Result]) -> list[Row]:
    rows = []
    for suite in ("block", "step"):
        for cell in _cells(suites, suite, clock=WALL):
            if {BARE, STOCK, FAST} <= cell.timings.keys():
                label = cell.name.removesuffix(f", {WALL}")
                rows.append([label, *_times(cell, STOCK, FAST), speedup(cell.ratio(FAST, STOCK))])
    return rows


def _initialisation(suites: dict[str, Result]) -> list[Row]:
    rows = []
    for cell in _cells(suites, "initialisation"):
        if cell.axes.get("clock", WALL) == WALL and {STOCK, FAST} <= cell.timings.keys():
            rows.append(_against(cell, cell.name.removesuffix(f", {WALL}"), FAST, STOCK))
    return rows


def _subspaces(suites: dict[str, Result]) -> list[Row]:
    rows = []
    for cell in _cells(suites, SUBSPACE):
        if cell.axes.get("clock", WALL) != WALL or names.SVD not in cell.timings:
            continue
        shape = shape_in_words(cell.axes)["out × in"]
        for name in cell.timings:
            if name.startswith("minor_subspace"):
                rows.append(_against(cell, f"{shape}, {name}", name, names.SVD))
    return rows


def _against(cell: Group, label: str, ours: str, theirs: str) -> Row:
    seconds = [f"{cell.timings[name].median:.3g} s" for name in (theirs, ours)]
    return [label, *seconds, speedup(cell.ratio(ours, theirs))]


def _times(cell: Group, theirs: str, ours: str) -> list[str]:
    milliseconds = [1e3 * cell.timings[name].median for name in (BARE, theirs, ours)]
    return [f"{value:.3g} ms" for value in milliseconds]


def _kernels(suites: dict[str, Result]) -> list[Row]:
    """A row a kernel, in its default configuration."""
    rows = []
    for kernel in KERNELS:
        shares = []
        speeds = []
        for cell in _cells(suites, "kernels", kernel=kernel, clock=DEVICE_TIME):
            default = default_configuration(cell)
            if default is None or COPY not in cell.timings:
                continue
            shares.append(cell.ratio(COPY, default).median)
            if CUBLAS in cell.timings:
                speeds.append(cell.ratio(CUBLAS, default).median)
        if shares:
            rows.append([kernel, str(len(shares)), *_span(shares), *_span(speeds, "×")])
    return rows


def _span(values: list[float], unit: str = "") -> list[str]:
    """From the least to the most, and the median."""
    if not values:
        return ["", ""]
    least, most = (f"{value:.2f}{unit}" for value in (min(values), max(values)))
    return [f"{least} to {most}", f"{median(values):.2f}{unit}"]
