"""Where the emulator meets the project's planning: kernels, configurations, and how they are launched."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from itertools import product

from mica.kernels import configs, launching, runtime
from mica.kernels.launching import Plan
from mica.paths import choose, triton_path  # noqa: F401  (its target_of is replaced)
from tests.emulator import driver

# Parameters that a launch may write; those that it must leave at 0
OUTPUTS = ("out_ptr", "partial_ptr", "counter_ptr", "y_ptr", "grad_ptr", "dz_ptr", "sums_ptr")
LEFT_AT_ZERO = ("counter_ptr",)
TOKENS = (9999, 1)  # many and few, of an expert too: tables differ


def _fused(target, tokens, block_r, size):
    for out, aligned, dropout in product((64, 9999), (True, False), (False, True)):
        yield configs.fused_linear(target, tokens, out, block_r, aligned, size, dropout)


def _one(table):
    return lambda *arguments: [table(*arguments)]


_TABLES = {
    "down_projection": _one(configs.down_projection),
    "up_projection": _one(configs.up_projection),
    "grad_a": _one(configs.grad_a),
    "down of experts": _one(configs.experts_down),
    "up of experts": _one(configs.experts_up),
    "grad_a of experts": _one(
        lambda target, tokens, *rest: configs.experts_grad_a(target, 2**20 * tokens, *rest)
    ),
    "fused_linear": _fused,
}


def configurations(kernel: str, target: str, block_r: int, itemsize: int) -> dict[configs.Config, bool]:
    """All of a target -> whether one is the default of some call."""
    found: dict[configs.Config, bool] = {}
    for tokens in TOKENS:
        for table in _TABLES[kernel](target, tokens, block_r, itemsize):
            for place, config in enumerate(table):
                found[config] = found.get(config, False) or not place
    return found


@contextmanager
def emulated(target: str):
    """The project's kernels are available for CPU tensors, planned for this target and emulated."""
    modules = [m for name, m in sys.modules.items() if name.startswith("mica.") and hasattr(m, "target_of")]
    kept = [(module, module.target_of) for module in modules]
    why, call = runtime.why_unavailable, Plan.__call__

    def recorded(plan, *tensors):
        driver.given.append(tensors)
        try:
            call(plan, *tensors)
        finally:
            driver.given.pop()

    try:
        for module in modules:
            module.target_of = lambda device: target
        runtime.why_unavailable, Plan.__call__ = (lambda device: None), recorded
        choose.clear()
        launching.clear()
        with driver.installed(int(target[3:]), OUTPUTS, LEFT_AT_ZERO):
            yield
    finally:
        for module, function in kept:
            module.target_of = function
        runtime.why_unavailable, Plan.__call__ = why, call
        choose.clear()
        launching.clear()
