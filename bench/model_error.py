"""How far `bench.model` is from what was measured: |modelled / measured - 1| of every cell of a result file.

A result file is judged with its own rates (its suite "rate"): products, a copy, the time of a call. So what
is tested is the model's counting and its roofline, not an assumed rate.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import initialisation_cost, kernel_cost, step_cost
from bench.architectures import ARCHITECTURES
from bench.kernel_cost import BF16, DEVICES, FP32, Cost, Device, Layer
from bench.results import ATEN, BACKWARD, FAST, FORWARD, LORA, NO_GRADIENT, STOCK, Group, Result

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"bfloat16": BF16, "float32": FP32}
# `bench.gpu`'s names
GPU_FORMS = {
    "bare GEMM": "bare frozen linear",
    "mica split": "split",
    "mica fused": "fused",
    "aten control (addmm_)": "aten control",
    "stock PEFT default": kernel_cost.STOCK,
    "stock PEFT 16-bit adapters": "stock PEFT, bf16 adapters",
}


class Error(NamedTuple):
    """Median and largest |modelled / measured - 1| over ``cells``; ``rival`` may be a ratio of two."""

    suite: str
    rival: str
    median: float
    worst: float
    cells: int


def measured_device(result: Result) -> Device | None:
    """The machine of a result file by its own rates, None where it has none."""
    found = {group.axes["rate"]: next(iter(group.rivals.values())) for group in result.select(suite="rate")}
    if not {"bfloat16 product", "float32 product", "copy", "call"} <= found.keys():
        return None
    rates = {
        name: rival.facts["bytes" if name == "copy" else "flops"] / rival.median
        for name, rival in found.items()
    }
    device = str(result.machine.get("device", "cpu")).lower()
    target = next((one.target for name, one in DEVICES.items() if name in device), "cpu")
    return Device(
        target, rates["bfloat16 product"], rates["float32 product"], rates["copy"], found["call"].median
    )


def newest_rates(folder: Path = RESULTS) -> Path | None:
    """The newest result file with rates."""
    return max(
        (file for file, result in results_in(folder) if measured_device(result)),
        key=lambda file: (str(Result.load(file).machine.get("datetime", "")), file.name),
        default=None,
    )


def results_in(folder: Path = RESULTS) -> list[tuple[Path, Result]]:
    """The result files of `bench` below a folder; those of `bench.gpu` and of models are not."""
    found = []
    for file in sorted(folder.glob("*/*.json")):
        raw = json.loads(file.read_text())
        if isinstance(raw, dict) and ("groups" in raw or "benchmarks" in raw):
            found.append((file, Result.load(file)))
    return found


def _form(rival: str, size: int, device: Device) -> str | None:
    """Of a layer, by the rival's name in result files."""
    found = step_cost.rivals(device, size)
    forms = {ATEN: "aten control", FAST: "split", LORA: kernel_cost.STOCK}
    forms |= {name: one.form for name, one in found.items()}
    return forms.get(rival)


def layer_seconds(axes: dict, rival: str, device: Device) -> float | None:
    """Modelled seconds of one layer's pass, the "roofline"; None for a rival that is not modelled.

    ``axes``: tokens, out, in, rank, dtype, pass.
    """
    size = SIZES[axes["dtype"]]
    form = _form(rival, size, device)
    if form not in kernel_cost.FORMS:
        return None
    layer = Layer(axes["tokens"], axes["out"], axes["in"], axes["rank"], device.target, size=size)
    cost = kernel_cost.FORMS[form](layer)
    if rival == LORA:  # trains B, too: dB = dyᵀ h
        cost = Cost(cost.forward, [*cost.backward, kernel_cost.gemm(layer.n, layer.rank, layer.m, FP32)], 0)
    us = cost.microseconds(device)
    passes = {FORWARD: FORWARD, NO_GRADIENT: FORWARD, BACKWARD: BACKWARD}
    return 1e-6 * us[passes.get(axes["pass"], "both")]


def step_seconds(axes: dict, rival: str, device: Device) -> float | None:
    """Modelled seconds of a training step; None for what is not modelled."""
    model, size = ARCHITECTURES.get(str(axes["model"]).lower()), SIZES.get(axes["dtype"])
    if model is None or size is None:
        return None
    steps = step_cost.step_cost(model, device, axes["tokens"], axes["sequence"], axes["rank"], size)
    if FAST not in steps:
        steps[FAST] = steps[step_cost.GROUPED]
    return steps[rival].seconds if rival in steps else None


def initialisation_seconds(axes: dict, rival: str, device: Device) -> float | None:
    """Stock's SVDs on a CPU. Ours runs LAPACK's partial eigensolver there, whose work is not counted."""
    model = ARCHITECTURES.get(str(axes["model"]).lower())
    if model is None or rival != STOCK or device.target != "cpu":
        return None
    return initialisation_cost.stock_seconds(model, device.fp32, initialisation_cost.SVD_SHARE["cpu"][0])


SUITES = {"layer": layer_seconds, "step": step_seconds, "initialisation": initialisation_seconds}


def roofline_seconds(group: Group, device: Device) -> dict[str, float]:
    """rival -> modelled seconds, of those rivals of a measured group that are modelled."""
    modelled = SUITES[group.axes["suite"]]
    found = {rival: modelled(group.axes, rival, device) for rival in group.rivals}
    return {rival: seconds for rival, seconds in found.items() if seconds is not None}


def modelled_errors(result: Result, device: Device | None = None) -> list[Error]:
    """A row a suite and rival, and one a suite for stock PEFT ÷ mica.fast; none without rates.

    Forward and backward of a layer are cells of their own.
    """
    device = device or measured_device(result)
    if device is None:
        return []
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for group in result.groups:
        suite = group.axes.get("suite")
        if suite not in SUITES:
            continue
        modelled = roofline_seconds(group, device)
        for rival, seconds in modelled.items():
            errors[suite, rival].append(abs(seconds / group.rivals[rival].median - 1))
        if STOCK in modelled and FAST in modelled:
            ratio = modelled[STOCK] / modelled[FAST]
            measured = group.ratio(STOCK, FAST).median
            errors[suite, f"{STOCK} ÷ {FAST}"].append(abs(ratio / measured - 1))
    return [Error(*key, median(values), max(values), len(values)) for key, values in errors.items()]


def gpu_errors(name: str, folder: Path = RESULTS) -> list[Error]:
    """The same for a device of `bench.kernel_cost` and its assumed rates, from files of `bench.gpu`."""
    errors: dict[str, list[float]] = defaultdict(list)
    device = DEVICES[name]
    for file in sorted(folder.glob("*/*.json")):
        raw = json.loads(file.read_text())
        if "shapes" not in raw or name not in str(raw.get("machine", {}).get("device", "")).lower():
            continue
        for shape, entry in raw["shapes"].items():
            layer = Layer(*map(int, shape.split("x")), raw["rank"], device.target)
            times = entry.get("times", {})
            us = {
                rival: kernel_cost.FORMS[form](layer).microseconds(device)
                for rival, form in GPU_FORMS.items()
                if rival in times
            }
            for rival, parts in us.items():
                for part in ("forward", "backward"):
                    errors[rival].append(abs(parts[part] / times[rival][part]["us"] - 1))
    return [Error("layer", rival, median(one), max(one), len(one)) for rival, one in errors.items()]


def lines(errors: list[Error]) -> list[str]:
    """A table of them."""
    head = f"  {'suite':<16}{'rival':<42}{'median':>8}{'worst':>8}{'cells':>7}"
    rows = (
        f"  {one.suite:<16}{one.rival:<42}{one.median:>8.1%}{one.worst:>8.1%}{one.cells:>7}" for one in errors
    )
    return [head, *rows]
