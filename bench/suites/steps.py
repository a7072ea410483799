"""Implementations that take steps (forward, backward, perhaps an optimizer), and the operators they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

import mica.fast
from bench.measure.machine import ON_ACCELERATOR
from bench.measure.memory import alive_bytes
from bench.results.names import (
    BARE,
    DORA,
    FAST,
    FAST_ACTIVATIONS,
    KERNELS,
    MICA,
    STOCK,
    STOCK_16,
    STOCK_UNCAST,
)
from bench.suites.harness import build_all
from bench.suites.layer import Form


@contextmanager
def norms_saved() -> Iterator[None]:
    """By every forward inside."""
    mica.fast.enable(recompute="activations")
    try:
        yield
    finally:
        mica.fast.enable(recompute="norms")


CONTEXTS = {
    BARE: nullcontext,
    STOCK: mica.fast.disabled,
    STOCK_16: mica.fast.disabled,
    STOCK_UNCAST: mica.fast.disabled,
    FAST: nullcontext,
    FAST_ACTIVATIONS: norms_saved,
}
OURS = (FAST, FAST_ACTIVATIONS, KERNELS)  # implementations that run operators


def operators(
    layers: int,
    on_kernels: bool = ON_ACCELERATOR,
    forwards: int = 1,
    adapter: str = MICA,
    has_dropout: bool = False,
) -> dict[str, int]:
    """What a forward + backward of this number of linear layers has to run, as `counting` counts it.

    ``forwards``: 2 where gradient checkpointing recomputes every forward. With dropout DoRA calls each layer
    with x and with drop(x).
    """
    calls = 2 * layers if adapter == DORA and has_dropout else layers
    ran = {"linear": forwards * calls, "linear_backward": calls}
    if adapter == DORA:
        ran["grad_magnitude"] = layers
    if on_kernels:
        ran |= {f"{name}_kernels": times for name, times in ran.items()}
        if adapter != MICA:
            ran["grad_b_kernels"] = calls
    return ran


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Yields a dict that afterwards has how often each operator ran inside, if it did, from Python or C++.

    Of grad_b only its kernels count: C++ has no call for it, Python does for the same formula.
    """
    ran: dict[str, int] = {}
    before = Counter(mica.fast.call_counts)
    yield ran
    new = Counter(mica.fast.call_counts) - before
    for name, times in new.items():
        if name != "grad_b" and not name.endswith("_native"):
            ran[name] = times


class Step(NamedTuple):
    """``grad_output``: what the backward starts from, None where the forward gives a loss.

    ``operators``: how often a step runs each operator of mica.fast.
    """

    form: Form
    grad_output: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    operators: dict[str, int] = {}  # noqa: RUF012

    def __call__(self) -> Tensor:
        """Returns y, or the loss; leaves no gradient."""
        y = self.form.forward()
        y.backward(self.grad_output)
        if self.optimizer is not None:
            self.optimizer.step()
        self._clear()
        return y

    def results(self) -> dict[str, Tensor]:
        """y, dx and the dA, dB and dm of all layers, in fp32."""
        with self.form.context():
            y = self.form.forward()
            y.backward(self.grad_output)
        values = {"y": y.detach().float(), "dx": self.form.inputs[0].grad.float()}
        for what, factor in (("dA", "lora_A"), ("dB", "lora_B"), ("dm", "lora_magnitude")):
            grads = []
            for name, parameter in self.form.module.named_parameters():
                if factor in name and parameter.grad is not None:
                    grads.append(parameter.grad.flatten())
            if grads:
                values[what] = torch.cat(grads).float()
        self._clear()
        return values

    def saved_mb(self) -> float:
        """Megabytes that a forward keeps for its backward, and its result."""
        with self.form.context():
            return alive_bytes(self.form.forward) / 1e6

    def _clear(self) -> None:
        for tensor in self.form.inputs:
            tensor.grad = None

    def time(self, once, axes: dict, calls: int = 1, call: Callable | None = None, **options) -> int:
        """One sample, after which every step must have run the operators that its name implies.

        ``call``: what is timed instead of a step; it must run operators if and only if a step does. Returns
        the number of calls, of which more are made than are timed.
        """
        run = count()

        def counted() -> object:
            next(run)
            return self() if call is None else call()

        with self.form.context(), counting() as ran:
            once(counted, axes, calls, **options)
        runs = next(run)
        per_call = {name: times / runs for name, times in ran.items()}
        if call is None:
            is_right = per_call == self.operators
        else:
            is_right = bool(per_call) == bool(self.operators)
        assert is_right, f"{once.implementation} ran {per_call} per call, not {self.operators}"
        return runs


class Prepared(NamedTuple):
    """The implementations of a cell, checked: how each takes a step, and what was counted of it."""

    steps: dict[str, Step]
    facts: dict[str, dict[str, float]]
    iterations: int = 1  # steps in a sample

    def time(self, once, axes: dict, **options) -> None:
        """One sample of the implementation that ``once`` names."""
        name = once.implementation
        self.steps[name].time(once, axes, self.iterations, **options, **self.facts[name])


def with_bytes(steps: dict[str, Step], iterations: int = 1) -> Prepared:
    """Counts what the forward of each keeps."""
    return Prepared(steps, {name: {"saved_mb": step.saved_mb()} for name, step in steps.items()}, iterations)


def checked(step: Step, expected: dict[str, Tensor], gates: dict[str, float]) -> Step:
    """``step``, whose results may differ from the expected ones by so much (Frobenius norms, relative).

    The gate of dB and dm is that of dA.

    Raises:
        AssertionError: they differ more, or came from other operators than ``step.operators``.
    """
    with counting() as ran:
        results = step.results()
    assert ran == step.operators, f"a step ran {ran}, not {step.operators}"
    for what, value in expected.items():
        error = float((results[what] - value).norm() / value.norm())
        assert error <= gates.get(what, gates["dA"]), f"{what} is {error:.1e} off what is expected"
    return step


def check_all(
    group: str,
    names: Iterable[str],
    build: Callable[[str], Step],
    gates: dict[str, float],
    unchecked: tuple[str, ...] = (BARE,),
) -> dict[str, Step]:
    """`build_all`, with results `checked` against stock PEFT's, except those of the ``unchecked``."""
    stock = build(STOCK)
    expected = stock.results()

    def build_checked(name: str) -> Step:
        if name == STOCK:
            return stock
        return checked(build(name), {} if name in unchecked else expected, gates)

    return build_all(group, names, build_checked)
