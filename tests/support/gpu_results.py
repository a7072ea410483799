"""Results as of a run on a GPU, with invented times: for tests of what is made of them."""

from bench.results.cell import Group, Timing
from bench.results.names import (
    BACKWARD,
    BARE,
    COPY,
    CUBLAS,
    DEVICE_TIME,
    DOWN_A,
    FORWARD,
    STOCK,
    STOCK_16,
    SVD,
    WALL,
    of_form,
)
from bench.results.schema import Result

ROUNDS = 7
SIZE = {"out": 4096, "in": 4096}  # of a layer
LAYER = {"tokens": 8192, **SIZE, "rank": 16, "dtype": "bfloat16"}


def result(*groups: Group, device: str = "a card") -> Result:
    """With enough of a machine for a report."""
    machine = {"device": device, "torch": "2.9", "triton": "3.5", "peft": "0.21", "size": "default"}
    machine |= {"commit": "0123456789abcdef", "uncommitted_changes": False, "datetime": "2026-01-02T03:04:05"}
    return Result(machine, [*groups])


def cell(suite: str, clock: str, times: dict[str, float], name: str = "", **axes) -> Group:
    """The same time in every round."""
    timings = {name: Timing([seconds] * ROUNDS) for name, seconds in times.items()}
    return Group(f"{name or suite}, {clock}", {"suite": suite, "clock": clock, **axes}, timings)


def both_passes(suite: str, times: dict[str, float]) -> list[Group]:
    """Of a layer; its forward and its backward take as long."""
    return [
        cell(suite, DEVICE_TIME, times, f"{suite}, 8192 tokens, {part}", **LAYER, **{"pass": part})
        for part in (FORWARD, BACKWARD)
    ]


def layers(fast: float) -> list[Group]:
    """A cell of the suite layer in which mica.fast takes so many seconds for each pass."""
    return both_passes("layer", {BARE: 1e-3, STOCK: 2e-3, STOCK_16: 1.5e-3, of_form("split"): fast})


FORMS = both_passes("forms", {of_form("split"): 3.0, of_form("fused"): 2.0})
KERNEL = {COPY: 9e-5, f"{DOWN_A}, default": 1e-4, f"{DOWN_A}, other": 3e-4, CUBLAS: 1.3e-4}
OTHERS = [
    cell("step", WALL, {BARE: 0.1, STOCK: 0.3, of_form("split"): 0.15}, tokens=512),
    cell("kernels", DEVICE_TIME, KERNEL, kernel=DOWN_A, tokens=8192, features=4096, rank=16),
    cell("subspace", WALL, {SVD: 0.8, "minor_subspace, r = 16": 0.04}, **SIZE),
    cell("initialisation", WALL, {STOCK: 6.0, of_form("split"): 2.0}, rank=16, dtype="float32"),
]
