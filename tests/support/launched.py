"""What compiled kernels are launched with, recorded by a driver that launches nothing; run as a program.

Each case is a call after another call, "kept", whose plan it must not use. What was launched must be what the
call launches where nothing was planned before: grid, compiled variant, numbers, and pointers to its own
operands. Prints {case: what is wrong, or ""} and the other results as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import _allocation

from mica.kernels import configs, launching, tuning
from mica.kernels.common import NotLoadedError
from mica.kernels.configs import Config
from mica.kernels.down_projection import down_projection, plan_down_projection
from mica.kernels.embedding import embedding, grad_a_embedding
from mica.kernels.fused_linear import fused_linear, plan_fused_linear
from mica.kernels.grad_a import grad_a
from mica.kernels.up_projection import up_projection_
from tests.support import no_launch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_seen: list[tuple] = []
_allocators: list = []  # Triton's, at each launch
_HOOKS, _FIRST_ARGUMENT = slice(6, 9), 9


def record(*args) -> None:
    _seen.append(args)
    _allocators.append(_allocation._allocator.get())


def matrix(rows: int, columns: int, dtype=BF16, stride: int | None = None, offset: int = 0) -> torch.Tensor:
    stride = stride or columns
    buffer = torch.zeros(offset + rows * stride, dtype=dtype)
    return buffer.as_strided((rows, columns), (stride, 1), offset)


def launched(call) -> dict:
    """What the launches of a call were, with the names of its operands for their addresses."""
    _seen.clear()
    function, args, options = call
    out = function(*args, **options)
    own = [a for a in (*args, *options.values()) if isinstance(a, torch.Tensor)]
    names = {tensor.data_ptr(): f"operand {place}" for place, tensor in enumerate(own)}
    names.setdefault(out.data_ptr(), "out")
    summary = {
        "grid": [seen[:3] for seen in _seen],
        "stream": [seen[3] for seen in _seen],
        "compiled": tuple(id(seen[4]) for seen in _seen),
        "arguments": [],
        "direct": all(seen[_HOOKS] == (None, None, None) for seen in _seen),
        "out": (out.shape, out.dtype, out.stride()),
    }
    for value in (value for seen in _seen for value in seen[_FIRST_ARGUMENT:]):
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        is_pointer = isinstance(address, int) and address > 2**32
        name = names.setdefault(address, f"new {len(names)}") if is_pointer else value
        summary["arguments"].append(name)
    return summary


def differences(kept, call, change=None) -> str:
    """ "" if a call launches the same after ``kept`` as alone; ``change``: made in between."""
    launching.forget()
    undo = None
    try:
        launched(kept), launched(kept)
        undo = change() if change else None
        launched(call)
        replanned = launched(call)
        launching.forget()
        alone = launched(call)
    finally:
        if undo:
            undo()
    if not replanned["direct"]:
        return "not launched directly"
    keys = ("grid", "stream", "compiled", "arguments", "out")
    return "; ".join(f"{k}: {replanned[k]} instead of {alone[k]}" for k in keys if replanned[k] != alone[k])


def refused(kept, call) -> str:
    """ "" if a call is refused although the plan of ``kept`` is there."""
    launching.forget()
    launched(kept)
    try:
        launched(call)
    except (TypeError, ValueError):
        return ""
    return "not refused"


def tf32():
    torch.set_float32_matmul_precision("high")
    return lambda: torch.set_float32_matmul_precision("highest")


def two_launches():
    """As if the device were one where the last arriver does not add the parts of a split sum."""
    modules = [sys.modules[function.__module__] for function in (down_projection, grad_a)]
    before = modules[0].target_of
    for module in modules:
        module.target_of = lambda device: "gfx942"
    return lambda: [setattr(module, "target_of", before) for module in modules]


def tuned():
    """As if a file had another configuration for everything."""
    tables, is_idle, pick = dict(vars(configs)), tuning.is_idle, tuning.pick
    tuning.forget()
    tuning.is_idle = lambda: False
    tuning.pick = lambda name, device, key, choices, updates=(): list(choices)[-1]
    only = configs.embedding  # it has one configuration
    configs.embedding = lambda *args: (*only(*args), Config(32, 64, 32, 8, 2))

    def undo():
        tuning.is_idle, tuning.pick = is_idle, pick
        vars(configs).update(tables)

    return undo


def cases() -> dict[str, tuple]:
    """Name -> (kept call, call[, change])."""

    def down(x=None, factor=None, **options):
        x, factor = matrix(4, 32) if x is None else x, matrix(16, 32) if factor is None else factor
        return down_projection, (x, factor), options

    def up(base=None, h=None, factor=None, **options):
        base = matrix(4, 64) if base is None else base
        h, factor = matrix(4, 16) if h is None else h, matrix(16, 64) if factor is None else factor
        return up_projection_, (base, h, factor), options

    def grad(g=None, x=None, rank=16, **options):
        return grad_a, (matrix(4, 16) if g is None else g, matrix(4, 32) if x is None else x, rank), options

    def fused(x=None, w=None, h=None, factor=None, **options):
        x, w = matrix(4, 32) if x is None else x, matrix(32, 64) if w is None else w
        h, factor = matrix(4, 16) if h is None else h, matrix(16, 64) if factor is None else factor
        return fused_linear, (x, w, h, factor), options

    def embed(indices=None, a=None, factor=None, **options):
        indices = torch.zeros(4, dtype=torch.int64) if indices is None else indices
        a, factor = matrix(16, 48) if a is None else a, matrix(16, 64) if factor is None else factor
        return embedding, (indices, a, factor), options

    def scatter(g=None, indices=None, rank=16, size=48, **options):
        indices = torch.zeros(4, dtype=torch.int64) if indices is None else indices
        return grad_a_embedding, (matrix(4, 16) if g is None else g, indices, rank, size), options

    seed, fp32 = torch.zeros(1, dtype=torch.int64), {"dtype": FP32}
    dropped = {"dropout_p": 0.5, "seed": seed}
    small = Config(16, 64, 32, 4, 1)
    bias = torch.zeros(64, dtype=BF16)
    x32, f32, h32 = matrix(4, 32, **fp32), matrix(16, 32, **fp32), matrix(4, 16, **fp32)
    pairs = {
        # what the shapes, strides and dtypes of each operand are
        "down: tokens": (down(), down(matrix(300, 32))),
        "down: stride of x": (down(), down(matrix(4, 32, stride=48))),
        "down: x transposed": (down(matrix(32, 32)), down(matrix(32, 32).t())),
        "down: dtype of x": (down(compute_dtype=BF16), down(matrix(4, 32, FP16), compute_dtype=BF16)),
        "down: rank": (down(), down(factor=matrix(7, 32))),
        "down: stride of factor": (down(), down(factor=matrix(16, 32, stride=40))),
        "down: dtype of factor": (down(), down(factor=f32)),
        "down: compute dtype": (down(), down(compute_dtype=FP16)),
        "down: scale": (down(scale=1.0), down(scale=0.5)),
        "down: dropout": (down(), down(**dropped)),
        "down: p of dropout": (down(**dropped), down(dropout_p=0.25, seed=seed)),
        "down: split": (down(matrix(4, 4096), matrix(16, 4096)), down(matrix(8, 4096), matrix(16, 4096))),
        "down: two launches": (down(), down(matrix(4, 4096), matrix(16, 4096)), two_launches),
        "down: precision": (down(x32, f32), down(x32, f32), tf32),
        "up: tokens": (up(), up(matrix(300, 64), matrix(300, 16))),
        "up: stride of base": (up(), up(matrix(4, 64, stride=80))),
        "up: dtype of base": (up(), up(matrix(4, 64, FP16))),
        "up: stride of h": (up(), up(h=matrix(4, 16, stride=48))),
        "up: dtype of h": (up(compute_dtype=BF16), up(h=h32, compute_dtype=BF16)),
        "up: factor transposed": (up(), up(factor=matrix(64, 16).t())),
        "up: dtype of factor": (up(), up(factor=matrix(16, 64, FP32))),
        "up: out": (up(), up(out=matrix(4, 64))),
        "up: stride of out": (up(out=matrix(4, 64)), up(out=matrix(4, 64, stride=96))),
        "up: dtype of out": (up(out=matrix(4, 64)), up(out=matrix(4, 64, FP32))),
        "up: scale": (up(), up(scale=0.5)),
        "up: compute dtype": (up(), up(compute_dtype=FP16)),
        "up: dropout": (up(**dropped), up(dropout_p=0.25, seed=seed)),
        "up: precision": (up(h=h32), up(h=h32), tf32),
        "grad: tokens": (grad(), grad(matrix(300, 16), matrix(300, 32))),
        "grad: stride of g": (grad(), grad(matrix(4, 16, stride=48))),
        "grad: dtype of g": (grad(x=x32), grad(h32, x32)),
        "grad: stride of x": (grad(), grad(x=matrix(4, 32, stride=48))),
        "grad: dtype of x": (grad(h32), grad(h32, x32)),
        "grad: rank": (grad(), grad(rank=9)),
        "grad: dtype of out": (grad(), grad(out_dtype=BF16)),
        "grad: dropout": (grad(**dropped), grad(dropout_p=0.25, seed=seed)),
        "grad: split": (grad(matrix(700, 16), matrix(700, 32)), grad(matrix(900, 16), matrix(900, 32))),
        "grad: two launches": (grad(), grad(matrix(700, 16), matrix(700, 32)), two_launches),
        "grad: precision": (grad(h32, x32), grad(h32, x32), tf32),
        "fused: x": (fused(), fused(matrix(4, 32, stride=48))),
        "fused: w": (fused(), fused(w=matrix(64, 32).t())),
        "fused: h": (fused(), fused(h=matrix(4, 16, stride=48))),
        "fused: factor": (fused(), fused(factor=matrix(9, 64))),
        "fused: bias": (fused(), fused(bias=bias)),
        "fused: dropout": (fused(**dropped), fused(dropout_p=0.25, seed=seed)),
        "fused: descriptor": (fused(), fused(descriptor=True)),
        "fused: precision": (fused(h=h32), fused(h=h32), tf32),
        "embedding: indices": (embed(), embed(torch.zeros(5, dtype=torch.int32))),
        "embedding: A": (embed(), embed(a=matrix(16, 48, stride=64))),
        "embedding: factor": (embed(), embed(factor=matrix(64, 16).t())),
        "embedding: scale": (embed(), embed(scale=0.5)),
        "embedding: compute dtype": (embed(), embed(compute_dtype=FP16)),
        "embedding: precision": (embed(a=matrix(16, 48, FP32)), embed(a=matrix(16, 48, FP32)), tf32),
        "scatter: g": (scatter(), scatter(h32)),
        "scatter: indices": (scatter(), scatter(indices=torch.zeros(4, dtype=torch.int32))),
        "scatter: rank": (scatter(), scatter(rank=9)),
        "scatter: size": (scatter(), scatter(size=50)),
        "scatter: padding": (scatter(), scatter(padding_idx=3)),
        "scatter: dtype of out": (scatter(), scatter(out_dtype=BF16)),
    }  # fmt: skip
    for name, of in (("down", down), ("up", up), ("fused", fused), ("grad", grad), ("embedding", embed)):
        pairs[f"{name}: config"] = (of(), of(config=small))
        pairs[f"{name}: tuning"] = (of(), of(), tuned)
    # an address that 16 does not divide: another compiled variant, at each place
    return pairs | {
        "down: alignment of x": (down(), down(matrix(4, 32, offset=1))),
        "down: alignment of factor": (down(), down(factor=matrix(16, 32, offset=1))),
        "up: alignment of base": (up(), up(matrix(4, 64, offset=1))),
        "up: alignment back": (up(matrix(4, 64, offset=1)), up()),
        "grad: alignment of g": (grad(), grad(matrix(4, 16, offset=1))),
        "grad: alignment of x": (grad(), grad(x=matrix(4, 32, offset=1))),
    }


def refusals() -> dict[str, tuple]:
    seed = torch.zeros(1, dtype=torch.int64)
    x, factor, base, h = matrix(4, 32), matrix(16, 32), matrix(4, 64), matrix(4, 16)
    dropped = {"dropout_p": 0.5, "seed": seed}
    wrong = dropped | {"seed": seed.int()}
    up, grad, fused = (base, h, matrix(16, 64)), (h, x, 16), (x, matrix(32, 64), h, matrix(16, 64))
    pairs = {
        name: ((function, args, dropped), (function, args, wrong))
        for name, function, args in (
            ("down", down_projection, (x, factor)),
            ("up", up_projection_, up),
            ("grad", grad_a, grad),
            ("fused", fused_linear, fused),
        )
    }
    shifted = matrix(4, 32, offset=1)
    descriptor = {"descriptor": True}
    pairs["descriptor"] = (
        (fused_linear, fused, descriptor),
        (fused_linear, (shifted, *fused[1:]), descriptor),
    )
    return pairs


def variants(call_of) -> int:
    """How many variants a kernel has for 1 to 3000 tokens."""
    launching.forget()
    return len({launched(call_of(tokens))["compiled"] for tokens in (1, 2, 15, 16, 17, 200, 300, 304, 3000)})


def observers() -> dict[str, list]:
    """What observes launches -> which are direct: before, with, after it; two after a first with it."""
    call = (down_projection, (matrix(4, 32), matrix(16, 32)), {})
    calls: list = []

    def hook(*args, **kwargs):
        calls.append(1)

    def with_attribute(owner, name, value):
        before = getattr(owner, name)
        return lambda: setattr(owner, name, value), lambda: setattr(owner, name, before)

    chains = {name: getattr(knobs.runtime, name) for name in ("launch_enter_hook", "launch_exit_hook")}
    direct_launches = {}
    changes = {
        name: (lambda chain=chain: chain.add(hook), lambda chain=chain: chain.remove(hook))
        for name, chain in chains.items()
    }
    hooks = plan_down_projection(*call[1]).bound()[1].kernel.pre_run_hooks
    changes["pre_run_hooks"] = (lambda: hooks.append(hook), hooks.clear)
    changes["debug"] = with_attribute(knobs.runtime, "debug", True)
    if hasattr(knobs.compilation, "instrumentation_mode"):  # from Triton 3.6 on
        changes["instrumentation_mode"] = with_attribute(knobs.compilation, "instrumentation_mode", "consan")
    for name, (change, undo) in changes.items():
        launching.forget()
        launched(call)
        direct = [launched(call)["direct"]]
        change()
        try:
            direct.append(launched(call)["direct"])
        except Exception:  # a mode of the compiler that needs more than this driver
            direct.append(False)
        undo()
        direct.append(launched(call)["direct"])
        # what was compiled for it is not what runs directly afterwards
        launching.forget()
        change()
        with contextlib.suppress(Exception):
            launched(call)
        undo()
        direct_launches[name] = [*direct, launched(call)["direct"], launched(call)["direct"]]
    return direct_launches


def other_interfaces() -> list[bool]:
    """Whether a Triton that launches compiled kernels otherwise is noticed, for some ways of it."""

    def without_hooks(self, grid):
        return lambda *args, stream=None: self.run(*grid, stream, self.function, *args)

    def other_order(self, grid):
        parts = (self.function, self.packed_metadata, None, None, None)
        return lambda *args, stream=None: self.run(*grid, stream, *parts, *reversed(args))

    before, noticed = CompiledKernel.__getitem__, []
    call = (down_projection, (matrix(4, 32), matrix(16, 32)), {})
    try:
        for other in (without_hooks, other_order):
            CompiledKernel.__getitem__ = other
            launching.can_run_directly.cache_clear()
            launching.forget()
            launched(call)
            noticed.append(not launched(call)["direct"])
    finally:
        CompiledKernel.__getitem__ = before
        launching.can_run_directly.cache_clear()
    return noticed


def own_allocators() -> list[bool]:
    """Whether the launch has an allocator of its own, first and planned; and the user's is there after it."""

    def users(size, alignment, stream):
        raise AssertionError("it is for the user's kernels")

    operands = matrix(4, 32), matrix(32, 64), matrix(4, 16), matrix(16, 64)
    launching.forget()
    before = _allocation._allocator.get()
    triton.set_allocator(users)
    _allocators.clear()
    for _ in range(2):
        launched((fused_linear, operands, {"descriptor": True}))
        plan_fused_linear(*operands, descriptor=True).bound()[1]()
    own = [allocator not in (users, before) for allocator in _allocators]
    return [*own, _allocation._allocator.get() is users]


def in_a_capture() -> dict[str, bool]:
    """Which calls launch, in order; but for "eager" while a CUDA graph is captured."""
    calls = {"met first": 8, "again": 8, "eager": 8, "planned": 8, "another plan, of a loaded kernel": 7}
    is_capturing, launches = launching.is_capturing, {}
    launching.forget()
    for name, tokens in calls.items():
        launching.is_capturing = lambda device, name=name: name != "eager"
        with contextlib.suppress(NotLoadedError):
            launched((grad_a, (matrix(tokens, 24, FP16), matrix(tokens, 80, FP16), 24), {}))
        launches[name] = bool(_seen)
    launching.is_capturing = is_capturing
    return launches


def main() -> None:
    with no_launch.installed(launch=record):
        wrong = {name: differences(*case) for name, case in cases().items()}
        wrong |= {f"refused: {name}": refused(*case) for name, case in refusals().items()}
        rest = {
            "variants": {
                "down": variants(lambda m: (down_projection, (matrix(m, 64), matrix(16, 64)), {})),
                "up": variants(
                    lambda m: (up_projection_, (matrix(m, 64), matrix(m, 16), matrix(16, 64)), {})
                ),
                "grad": variants(lambda m: (grad_a, (matrix(m, 16), matrix(m, 64), 16), {})),
            },
            "observers": observers(),
            "other interfaces": other_interfaces(),
            "own allocators": own_allocators(),
            "in a capture": in_a_capture(),
            "triton": triton.__version__,
        }
    print(json.dumps({"cases": wrong, **rest}))


if __name__ == "__main__":
    sys.exit(main())
