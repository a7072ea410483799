"""What compiled kernels are launched with, recorded by a driver that launches nothing; run as a program.

It ends with an error at the first launch that is not as it should be. Kernels are compiled as far as Triton's
first representation, into a cache of this process's own: a variant takes 0.1 s instead of 1. `make static`
compiles all of them to machine code.
"""

import tempfile
from contextlib import contextmanager, nullcontext, suppress
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel

from mica.kernels import launching
from mica.kernels.common import NotLoadedError
from mica.kernels.down_projection import down_projection
from mica.kernels.fused_linear import fused_linear
from mica.kernels.grad_a import grad_a
from mica.kernels.up_projection import up_projection_
from tests.support import no_launch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_seen: list[tuple] = []
_HOOKS, _FIRST_ARGUMENT = slice(6, 9), 9


def record(*args) -> None:
    _seen.append(args)


def stages(backend, found: dict, options, *language) -> None:
    """In place of the compiler's own: no machine code."""

    def no_code(module, metadata: dict) -> bytes:
        metadata |= {"name": "kernel", "shared": 0}
        return b""

    found |= {"ttir": lambda module, metadata: module, backend.binary_ext: no_code}


@contextmanager
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


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


def check_case(name: str, kept, call, change=nullcontext) -> None:
    """A call launches the same after ``kept`` as alone, both under ``change``.

    Grid, compiled variant, numbers, and pointers to its own operands.
    """
    launching.clear()
    launched(kept), launched(kept)
    with change():
        launched(call)
        replanned = launched(call)
        launching.clear()
        alone = launched(call)
    assert replanned.pop("direct"), f"{name}: not launched directly"
    for key, value in replanned.items():
        assert value == alone[key], f"{name}: another {key}"


def cases() -> dict[str, tuple]:
    """Name -> (a call, another whose launch is not its own[, change]).

    What is the launcher's (its key) is tried on one kernel.
    """

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
    x32, f32 = matrix(4, 32, FP32), matrix(16, 32, FP32)
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
        "up: out": (up(), up(out=matrix(4, 64))),
        "up: dropout": (up(**half), up(**quarter)),
        "up: experts": (up(), up(factor=p, ends=ends)),
        "up: bias": (up(factor=p, ends=ends), up(factor=p, bias=own, ends=ends)),
        "grad: rank": (grad(), grad(rank=9)),
        "grad: dtype of out": (grad(), grad(out_dtype=BF16)),
        "grad: dropout": (grad(**half), grad(**quarter)),
        "grad: split": (grad(matrix(700, 16), matrix(700, 32)), grad(matrix(900, 16), matrix(900, 32))),
        "grad: experts": (grad(), grad(ends=ends)),
        "fused: bias": (fused(), fused(bias=own[0])),
        "fused: dropout": (fused(**half), fused(**quarter)),
        # an address that 16 does not divide: another compiled variant, at each place
        "alignment of x": (down(), down(matrix(4, 32, offset=1))),
        "alignment of factor": (down(), down(factor=matrix(16, 32, offset=1))),
        "alignment back": (up(matrix(4, 64, offset=1)), up()),
    }  # fmt: skip


SMALL = (down_projection, (matrix(4, 32), matrix(16, 32)), {})


def check_variants() -> None:
    """A varying batch, 1 to 3000 tokens, compiles one for few tokens and one for many.

    Of grad_a one for few tokens with a split and one without.
    """
    calls = (
        (2, lambda m: (down_projection, (matrix(m, 64), matrix(16, 64)), {})),
        (2, lambda m: (up_projection_, (matrix(m, 64), matrix(m, 16), matrix(16, 64)), {})),
        (3, lambda m: (grad_a, (matrix(m, 16), matrix(m, 64)), {"rank": 16})),
    )
    launching.clear()
    for most, call in calls:
        tokens = (1, 2, 15, 16, 17, 200, 300, 304, 3000)
        assert len({launched(call(m))["compiled"] for m in tokens}) <= most, most


def check_observers() -> None:
    """Profilers and debuggers see a launch."""

    def hook(*args, **kwargs): ...

    def is_direct() -> bool:
        return launched(SMALL)["direct"]

    runtime, compilation = knobs.runtime, knobs.compilation
    kernel = SMALL[0].plan(*SMALL[1]).bind()[1].kernel
    changes = [
        (runtime.launch_enter_hook, "calls", [hook]),
        (runtime.launch_exit_hook, "calls", [hook]),
        (kernel, "pre_run_hooks", [hook]),
        (runtime, "debug", True),
        (compilation, "instrumentation_mode", "consan"),  # from Triton 3.6 on
    ]
    for change in changes if hasattr(compilation, "instrumentation_mode") else changes[:-1]:
        launching.clear()
        launched(SMALL)
        assert is_direct(), change
        with patch.object(*change):
            assert not is_direct(), change
        assert is_direct(), change
        # what was compiled for it is not what runs directly afterwards
        launching.clear()
        with patch.object(*change):
            launched(SMALL)
        assert not is_direct(), change
        assert is_direct(), change


def check_another_interface() -> None:
    """A Triton that launches compiled kernels otherwise is noticed."""

    def without_hooks(self, grid):
        return lambda *args, stream=None: self.run(*grid, stream, self.function, *args)

    def with_one_more(self, grid):
        metadata = self.packed_metadata, None, None, None
        return lambda *args, stream=None: self.run(*grid, stream, self.function, *metadata, *args, None)

    for other in (without_hooks, with_one_more):
        with patch.object(CompiledKernel, "__getitem__", other):
            launching.can_run_directly.cache_clear()
            launching.clear()
            launched(SMALL)
            assert not launched(SMALL)["direct"]
    launching.can_run_directly.cache_clear()


def check_a_capture() -> None:
    """What launches: not what is met first, nor again, but outside of a capture and from then on.

    The last has another plan, of the kernel that is loaded.
    """
    launching.clear()
    for call, tokens in enumerate((8, 8, 8, 8, 7)):
        capturing = patch.object(launching, "is_capturing", lambda device, call=call: call != 2)
        with capturing, suppress(NotLoadedError):
            launched((grad_a, (matrix(tokens, 24, FP16), matrix(tokens, 80, FP16)), {"rank": 24}))
        assert bool(_seen) == (call >= 2), call


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.object(knobs.cache, "dir", cache),
        patch.object(CUDABackend, "add_stages", stages),
        no_launch.installed(launch=record),
    ):
        for name, case in cases().items():
            check_case(name, *case)
        check_variants()
        check_observers()
        check_another_interface()
        check_a_capture()
