"""What the pages say of GPUs: that nothing has been measured, or where the figures of adopted results are.

Which results those are is in kernels/measured.json (`mica.kernels.measured`): of each device and suite the
one that was adopted last.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bench.results.schema import Result
from mica.kernels import measured
from mica.kernels.measured import Measured

LIBRARIES = ("torch", "triton", "peft")
SUBSPACE = "subspace"  # the suite of the solver
Devices = dict[str, Measured]


class Sentence(NamedTuple):
    """What a page says where nothing was measured, and else, of the devices that are listed in place of {}.

    ``suite``: only devices on which this one was timed count; "": any.
    """

    nothing: str
    measured: str
    suite: str = ""

    def of(self, devices: Devices) -> str:
        names_of_devices = sorted(
            name for name, device in devices.items() if not self.suite or self.suite in device.sources
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
    devices = measured.read(root / "kernels" / measured.FILE.name)
    if name == SECTION:
        return _section(devices, root)
    return SENTENCES[name].of(devices)


def _section(devices: Devices, root: Path) -> str:
    """The reports of each device, which have the tables."""
    if not devices:
        return "\n\nNothing has been measured on a GPU yet.\n\n"
    parts = []
    for name in sorted(devices):
        parts.append(f"### {name}")
        for path in sorted({*devices[name].sources.values()}):
            parts.append(_source(path, Result.load(root / path)))
    return "\n\n" + "\n\n".join(parts) + "\n\n"


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
