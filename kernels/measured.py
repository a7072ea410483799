"""What has been measured on GPUs: the file measured.json, which ``python -m bench.gpu --adopt`` writes.

It has an entry for each device, by the name that PyTorch gives it:

    {"NVIDIA …": {
        "sources": {"forms": "bench/results/nvidia-…/….json", …},
        "forms": [[8192, 16, "fused", "split"], …],
        "host_bound": 2147483648}}

``forms`` are rows of `mica.kernels.configs.Forms`, ``host_bound`` is `mica.kernels.configs.HOST_BOUND` for
this device. Without an entry, or with null, the guesses in configs.py count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("measured.json")


class Measured(NamedTuple):
    """Of one device. ``sources``: suite of the benchmarks -> its result, a path within the checkout."""

    sources: dict[str, str]
    forms: tuple[tuple[int, int, str, str], ...] = ()
    host_bound: int | None = None


def read(file: Path = FILE) -> dict[str, Measured]:
    """Device -> what was measured on it."""
    devices = json.loads(file.read_text(encoding="utf-8"))
    found = {}
    for name, entry in devices.items():
        forms = tuple(tuple(row) for row in entry["forms"])
        found[name] = Measured(entry["sources"], forms, entry["host_bound"])
    return found


def write(devices: dict[str, Measured], file: Path = FILE) -> None:
    """In the order of their names, a line for each source and row, so that a change can be read."""
    entries = [_entry(name, devices[name]) for name in sorted(devices)]
    text = "{\n" + ",\n".join(entries) + "\n}\n" if entries else "{}\n"
    file.write_text(text, encoding="utf-8")


def _entry(name: str, device: Measured) -> str:
    sources = [f"{json.dumps(suite)}: {json.dumps(path)}" for suite, path in sorted(device.sources.items())]
    rows = [json.dumps(row) for row in device.forms]
    return (
        f"  {json.dumps(name)}: {{\n"
        f'    "sources": {{{_lines(sources)}}},\n'
        f'    "forms": [{_lines(rows)}],\n'
        f'    "host_bound": {json.dumps(device.host_bound)}\n'
        "  }"
    )


def _lines(items: list[str]) -> str:
    if not items:
        return ""
    return "\n" + ",\n".join(f"      {item}" for item in items) + "\n    "
