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

from mica.kernels import launching
from mica.kernels.common import NotLoadedError
from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear
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
    own = [tensor for tensor in args if tensor is not None]
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
        summary["arguments"].append(name or 0)  # what is None for Triton's front end has the address 0
    return summary


def differences(kept, call, change=None) -> str:
    """ "" if a call launches the same after ``kept`` as alone; ``change``: made in between."""
    launching.clear()
    undo = None
    try:
        launched(kept), launched(kept)
        undo = change() if change else None
        launched(call)
        replanned = launched(call)
        launching.clear()
        alone = launched(call)
    finally:
        if undo:
            undo()
    if not replanned["direct"]:
        return "not launched directly"
    keys = ("grid", "stream", "compiled", "arguments", "out")
    return "; ".join(f"{k}: {replanned[k]} instead of {alone[k]}" for k in keys if replanned[k] != alone[k])


def tf32():
    torch.set_float32_matmul_precision("high")
    return lambda: torch.set_float32_matmul_precision("highest")


def cases() -> dict[str, tuple]:
    """Name -> (kept call, call[, change]); what is the launcher's is tried on one of its kernels."""

    def down(x=None, factor=None, seed=None, ends=None, **numbers):
        x, factor = matrix(4, 32) if x is None else x, matrix(16, 32) if factor is None else factor
        return down_projection, (x, factor, seed, ends), numbers

    def up(base=None, h=None, factor=None, seed=None, out=None, bias=None, ends=None, **numbers):
        base = matrix(4, 64) if base is None else base
        h, factor = matrix(4, 16) if h is None else h, matrix(16, 64) if factor is None else factor
        return up_projection_, (base, h, factor, seed, out, bias, ends), numbers

    def grad(g=None, x=None, seed=None, ends=None, **numbers):
        g, x = matrix(4, 16) if g is None else g, matrix(4, 32) if x is None else x
        return grad_a, (g, x, seed, ends), {"rank": 16, **numbers}

    def fused(w=None, bias=None, seed=None, x=None, **numbers):
        x, w = matrix(4, 32) if x is None else x, matrix(32, 64) if w is None else w
        return fused_linear, (x, w, matrix(4, 16), matrix(16, 64), bias, seed), numbers

    def stacked(*shape):
        return torch.zeros(*shape, dtype=BF16)

    seed, ends = torch.zeros(1, dtype=torch.int64), torch.tensor([1, 4], dtype=torch.int32)
    half, quarter = {"seed": seed, "dropout_p": 0.5}, {"seed": seed, "dropout_p": 0.25}
    x32, f32, h32 = matrix(4, 32, FP32), matrix(16, 32, FP32), matrix(4, 16, FP32)
    a, p, own = stacked(2, 16, 32), stacked(2, 16, 64), stacked(2, 64)
    wide = matrix(4, 4096), matrix(16, 4096)
    return {
        # what the shapes, strides and dtypes of each operand are
        "tokens": (down(), down(matrix(300, 32))),
        "stride of x": (down(), down(matrix(4, 32, stride=48))),
        "x transposed": (down(matrix(32, 32)), down(matrix(32, 32).t())),
        "dtype of x": (down(compute_dtype=BF16), down(matrix(4, 32, FP16), compute_dtype=BF16)),
        "rank": (down(), down(factor=matrix(7, 32))),
        "stride of factor": (down(), down(factor=matrix(16, 32, stride=40))),
        "dtype of factor": (down(), down(factor=f32)),
        "compute dtype": (down(), down(compute_dtype=FP16)),
        "scale": (down(scale=1.0), down(scale=0.5)),
        "dropout": (down(), down(**half)),
        "p of dropout": (down(**half), down(**quarter)),
        "a seed that nothing needs": (down(), down(seed=seed)),
        "split": (down(), down(*wide)),
        "splits": (down(*wide), down(matrix(80, 4096), wide[1])),
        "experts": (down(), down(factor=a, ends=ends)),
        "number of experts": (down(factor=a, ends=ends), down(factor=stacked(1, 16, 32), ends=ends[1:])),
        "type of the ends": (down(factor=a, ends=ends), down(factor=a, ends=ends.long())),
        "precision": (down(x32, f32), down(x32, f32), tf32),
        "up: stride of base": (up(), up(matrix(4, 64, stride=80))),
        "up: stride of h": (up(), up(h=matrix(4, 16, stride=48))),
        "up: dtype of h": (up(compute_dtype=BF16), up(h=h32, compute_dtype=BF16)),
        "up: factor transposed": (up(), up(factor=matrix(64, 16).t())),
        "up: out": (up(), up(out=matrix(4, 64))),
        "up: stride of out": (up(out=matrix(4, 64)), up(out=matrix(4, 64, stride=96))),
        "up: dtype of out": (up(out=matrix(4, 64)), up(out=matrix(4, 64, FP32))),
        "up: dropout": (up(**half), up(**quarter)),
        "up: experts": (up(), up(factor=p, ends=ends)),
        "up: bias": (up(factor=p, ends=ends), up(factor=p, bias=own, ends=ends)),
        "up: precision": (up(h=h32), up(h=h32), tf32),
        "grad: rank": (grad(), grad(rank=9)),
        "grad: dtype of out": (grad(), grad(out_dtype=BF16)),
        "grad: dropout": (grad(**half), grad(**quarter)),
        "grad: split": (grad(matrix(700, 16), matrix(700, 32)), grad(matrix(900, 16), matrix(900, 32))),
        "grad: experts": (grad(), grad(ends=ends)),
        "grad: precision": (grad(h32, x32), grad(h32, x32), tf32),
        "fused: w": (fused(), fused(matrix(64, 32).t())),
        "fused: bias": (fused(), fused(bias=own[0])),
        "fused: dropout": (fused(**half), fused(**quarter)),
        "fused: descriptor": (fused(), fused(descriptor=True)),
        # an address that 16 does not divide: another compiled variant, at each place
        "alignment of x": (down(), down(matrix(4, 32, offset=1))),
        "alignment of factor": (down(), down(factor=matrix(16, 32, offset=1))),
        "alignment back": (up(matrix(4, 64, offset=1)), up()),
    }  # fmt: skip


def variants(call_of) -> int:
    """How many variants a kernel has for 1 to 3000 tokens."""
    launching.clear()
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
    hooks = down_projection.plan(*call[1]).bind()[1].kernel.pre_run_hooks
    changes["pre_run_hooks"] = (lambda: hooks.append(hook), hooks.clear)
    changes["debug"] = with_attribute(knobs.runtime, "debug", True)
    if hasattr(knobs.compilation, "instrumentation_mode"):  # from Triton 3.6 on
        changes["instrumentation_mode"] = with_attribute(knobs.compilation, "instrumentation_mode", "consan")
    for name, (change, undo) in changes.items():
        launching.clear()
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
        launching.clear()
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
            launching.clear()
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
    launching.clear()
    before = _allocation._allocator.get()
    triton.set_allocator(users)
    _allocators.clear()
    for _ in range(2):
        launched((fused_linear, operands, {"descriptor": True}))
        fused_linear.plan(*operands, descriptor=True).bind()[1]()
    own = [allocator not in (users, before) for allocator in _allocators]
    return [*own, _allocation._allocator.get() is users]


def in_a_capture() -> dict[str, bool]:
    """Which calls launch, in order; but for "eager" while a CUDA graph is captured."""
    calls = {"met first": 8, "again": 8, "eager": 8, "planned": 8, "another plan, of a loaded kernel": 7}
    is_capturing, launches = launching.is_capturing, {}
    launching.clear()
    for name, tokens in calls.items():
        launching.is_capturing = lambda device, name=name: name != "eager"
        with contextlib.suppress(NotLoadedError):
            launched((grad_a, (matrix(tokens, 24, FP16), matrix(tokens, 80, FP16)), {"rank": 24}))
        launches[name] = bool(_seen)
    launching.is_capturing = is_capturing
    return launches


def main() -> None:
    with no_launch.installed(launch=record):
        wrong = {name: differences(*case) for name, case in cases().items()}
        rest = {
            "variants": {
                "down": variants(lambda m: (down_projection, (matrix(m, 64), matrix(16, 64)), {})),
                "up": variants(
                    lambda m: (up_projection_, (matrix(m, 64), matrix(m, 16), matrix(16, 64)), {})
                ),
                "grad": variants(lambda m: (grad_a, (matrix(m, 16), matrix(m, 64)), {"rank": 16})),
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
