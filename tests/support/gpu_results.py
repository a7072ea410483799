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

DEVICE = "a card"
ROUNDS = 7
SIZE = 4096  # in and out features of a layer


def result(*groups: Group, device: str = DEVICE) -> Result:
    """With enough of a machine for a report."""
    machine = {"device": device, "torch": "2.9", "triton": "3.5", "peft": "0.21", "size": "default"}
    machine |= {"commit": "0123456789abcdef", "uncommitted_changes": False, "datetime": "2026-01-02T03:04:05"}
    return Result(machine, [*groups])


def rounds(seconds: float | list[float]) -> Timing:
    """The same time in every round, or these."""
    return Timing(seconds if isinstance(seconds, list) else [seconds] * ROUNDS)


def of_forms(
    tokens: int,
    part: str,
    times: dict[str, float | list[float]],
    rank: int = 16,
    clock: str = DEVICE_TIME,
    out: int = SIZE,
) -> Group:
    """A cell of the suite forms: form -> seconds."""
    axes = {"suite": "forms", "tokens": tokens, "out": out, "in": SIZE, "rank": rank, "dtype": "bfloat16"}
    axes |= {"pass": part, "clock": clock}
    name = f"forms of a layer, {tokens} tokens, {out} x {SIZE}, r = {rank}, bfloat16, {part}, {clock}"
    return Group(name, axes, {of_form(form): rounds(seconds) for form, seconds in times.items()})


def both_passes(tokens: int, times: dict[str, float | list[float]], **axes) -> list[Group]:
    """Forward and backward of such a cell, which take as long."""
    return [of_forms(tokens, part, times, **axes) for part in (FORWARD, BACKWARD)]


def layers(fast: float) -> list[Group]:
    """A cell of the suite layer, in both passes, in which mica.fast takes so many seconds for each."""
    groups = []
    for part in (FORWARD, BACKWARD):
        axes = {"suite": "layer", "tokens": 8192, "out": SIZE, "in": SIZE, "rank": 16, "dtype": "bfloat16"}
        axes |= {"pass": part, "clock": DEVICE_TIME}
        times = {BARE: 1e-3, STOCK: 2e-3, STOCK_16: 1.5e-3, of_form("split"): fast}
        name = f"layer, 8192 tokens, {part}, {DEVICE_TIME}"
        groups.append(Group(name, axes, {name: rounds(seconds) for name, seconds in times.items()}))
    return groups


def step() -> Group:
    axes = {"suite": "step", "tokens": 512, "clock": WALL}
    times = {BARE: 0.1, STOCK: 0.3, of_form("split"): 0.15}
    return Group(f"a step, {WALL}", axes, {name: rounds(seconds) for name, seconds in times.items()})


def kernel() -> Group:
    axes = {"suite": "kernels", "kernel": DOWN_A, "tokens": 8192, "features": SIZE, "rank": 16}
    axes |= {"clock": DEVICE_TIME}
    times = {COPY: 9e-5, f"{DOWN_A}, default": 1e-4, f"{DOWN_A}, other": 3e-4, CUBLAS: 1.3e-4}
    name = f"{DOWN_A}, 8192 tokens, {DEVICE_TIME}"
    return Group(name, axes, {name: rounds(seconds) for name, seconds in times.items()})


def subspace() -> Group:
    axes = {"suite": "subspace", "out": SIZE, "in": SIZE, "clock": WALL}
    times = {SVD: 0.8, "minor_subspace, r = 16": 0.04}
    name = f"minor subspace, {SIZE} x {SIZE}, {WALL}"
    return Group(name, axes, {name: rounds(seconds) for name, seconds in times.items()})


def initialisation() -> Group:
    axes = {"suite": "initialisation", "rank": 16, "dtype": "float32", "clock": WALL}
    times = {STOCK: 6.0, of_form("split"): 2.0}
    name = f"get_peft_model, a model, float32, {WALL}"
    return Group(name, axes, {name: rounds(seconds) for name, seconds in times.items()})
