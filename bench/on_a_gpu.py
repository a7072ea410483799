"""What the pages say of GPUs: that nothing has been measured, or the figures of adopted results.

Those are the results of GPUs in ``bench/results``: of each device and suite the last one by its name, which
begins with the day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.report.words import in_short, markdown, waited_for
from bench.results.names import FAST
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
    """A part for each device."""
    if not devices:
        return "\n\nNothing has been measured on a GPU yet.\n\n"
    parts = []
    for name in sorted(devices):
        parts += [f"### {name}", *_device(devices[name], root)]
    return "\n\n" + "\n\n".join(parts) + "\n\n"


def _device(sources: dict[str, str], root: Path) -> Iterator[str]:
    """Where the figures are from, and how much faster the cells of each suite are."""
    results = {path: Result.load(root / path) for path in sorted({*sources.values()})}
    for path, result in results.items():
        yield _source(path, result)
    groups = [group for suite, path in sources.items() for group in results[path].select(suite=suite)]
    yield f"{FAST}, times as fast:"
    yield markdown(in_short(waited_for(Result({}, groups))))


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
