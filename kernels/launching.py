"""How kernels are launched: planned once per kind of call, after that only pointers are filled in.

`plan_x` of a kernel checks the arguments and returns a `Choice`: one `Plan` per configuration, and the
tensors of the call. The first call of a kind tries the plans in order, through Triton's own front end, and
the kernel's table keeps the one that ran. Later calls look it up by all that the checks, the configuration
and the arithmetic depend on, and launch the compiled kernel itself. Binding 25 arguments in Triton costs 15
µs per launch and planning another 15 µs; this way both together take 3 µs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from mica.kernels import tuning
from mica.kernels.common import INTERPRETED, LaunchError, NotLoadedError, raw_stream
from mica.kernels.configs import Config

# Plans in a table before it is emptied: a varying number of tokens must not fill the memory. One is 2 KB.
MOST_PLANS = 4096

# `_cuda_getDevice` is missing in builds without CUDA.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_addresses = torch.Tensor.data_ptr


@dataclass
class Launch:
    """A kernel launch that is ready but not yet made: the static gate compiles it, a call runs it.

    ``args`` in the order of the kernel's parameters; ``then``: the launch that follows it, if any.
    """

    kernel: Callable
    grid: tuple[int, ...]
    args: dict
    meta: dict
    num_warps: int
    num_stages: int
    then: Launch | None = None

    def __call__(self) -> None:
        self.alone()
        if self.then is not None:
            self.then()

    def alone(self):
        """Make only this launch. Returns the compiled kernel, or None (interpreted, or nothing to do).

        Raises:
            NotLoadedError: a CUDA graph is captured, and Triton has not launched such a kernel before.
        """
        if 0 in self.grid:  # no tokens
            return None
        device = next(iter(self.args.values())).device
        # Triton launches on the current device, wherever the tensors are
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if is_capturing(device) and not self._is_loaded():
                raise NotLoadedError(
                    "a kernel for this kind of call is not loaded, which it cannot be while a CUDA graph is "
                    "captured: make the call once before the capture."
                )
            return self.kernel[self.grid](*self.args.values(), **self.meta, **self.options())

    def _is_loaded(self) -> bool:
        """Compiles what has to be, which calls no driver."""
        compiled = self.kernel.warmup(*self.args.values(), grid=self.grid, **self.meta, **self.options())
        return getattr(compiled, "module", None) is not None

    def options(self) -> dict:
        # explicit, because the default of fused multiply-adds changes with Triton 3.10
        fusion = {} if INTERPRETED.value else {"enable_fp_fusion": True}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **fusion}


@dataclass
class Plan:
    """A launch without its tensors, which are the first parameters of every kernel here, before the numbers.

    ``shape``, ``dtype``: of the output, where the call allocates it. ``parts``: how many fp32 numbers the
    parts of a split sum have together, 0 where nothing is split. ``then``: the launch that follows it, on the
    tensors whose parameters have the same names.
    """

    launch_class = Launch

    kernel: Callable
    grid: tuple[int, int]
    numbers: dict
    meta: dict
    config: Config
    shape: tuple[int, ...] = (0, 0)
    dtype: torch.dtype = torch.float32
    parts: int = 0
    then: Plan | None = None
    # which pointers are aligned (True: all) -> how to launch the kernel that Triton compiled for that
    _compiled: dict = field(default_factory=dict)
    _tail: tuple = field(init=False)
    _passed_on: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self):
        values = self.numbers | self.meta
        self._tail = tuple(values[name] for name in self.kernel.arg_names[-len(values) :])
        if self.then is not None:
            names = self.then.kernel.arg_names[: -len(self.then._tail)]
            self._passed_on = tuple(map(self.kernel.arg_names.index, names))

    def bind(self, tensors: Sequence[Tensor]) -> Launch:
        """The launch with these tensors, in the order of the kernel's parameters."""
        args = dict(zip(self.kernel.arg_names, tensors, strict=False)) | self.numbers
        then = self.then and self.then.bind([tensors[place] for place in self._passed_on])
        options = self.config.num_warps, self.config.num_stages
        return self.launch_class(self.kernel, self.grid, args, self.meta, *options, then)

    def __call__(self, *tensors: Tensor) -> None:
        addresses = tuple(map(_addresses, tensors))
        # Triton compiles for pointers that are divisible by 16 and for others; nearly always all of them are
        aligned = math.gcd(16, *addresses) == 16 or tuple(address % 16 == 0 for address in addresses)
        direct, index = self._compiled.get(aligned), tensors[0].get_device()
        if direct is None or _is_observed(self.kernel):
            self._launch(tensors, aligned)
        elif index < 0:  # a driver of another kind
            self._run(direct, driver.active.get_current_stream(0), addresses)
        elif index == current_device():
            self._run(direct, raw_stream(index), addresses)
        else:
            with torch.cuda.device(index):
                self._run(direct, raw_stream(index), addresses)
        if self.then is not None:
            self.then(*[tensors[place] for place in self._passed_on])

    def _launch(self, tensors: Sequence[Tensor], aligned: bool | tuple[bool, ...]) -> None:
        """Through Triton's own front end, which compiles and calls the hooks."""
        is_observed = _is_observed(self.kernel)
        compiled = self.bind(tensors).alone()
        if compiled is not None and not is_observed and can_run_directly(type(compiled)):
            self._compiled[aligned] = (compiled, compiled.run, compiled.function, compiled.packed_metadata)

    def _run(self, direct: tuple, stream: int, addresses: tuple[int, ...]) -> None:
        _, run, function, metadata = direct  # the first keeps the others alive
        run(*self.grid, 1, stream, function, metadata, None, None, None, *addresses, *self._tail)


class Choice(NamedTuple):
    """The plans of one call, one per configuration, and the tensors that they are launched with."""

    name: str
    device: torch.device
    depends_on: tuple  # what determines the fastest configuration, spelled the same in every run
    configs: Sequence[Config]  # the default first
    plan: Callable[[Config], Plan]
    operands: Callable[[Plan], tuple[Tensor, tuple[Tensor, ...]]]  # the output, and all tensors in order
    updates: tuple[Tensor, ...] = ()  # tensors that a launch reads and writes: the tuner restores them

    def bound(self) -> tuple[Tensor, Launch]:
        """The output, not yet written, and the launch that writes it."""
        return self._bound(self._best())

    def first(self, plans: Plans, key: Hashable) -> Tensor:
        """The output, by the first plan that can be launched; ``plans`` keeps it for calls with this key.

        Raises:
            LaunchError: none can be compiled and launched. It names the kernel and the reason of the last.
            NotLoadedError: see `Launch.alone`.
        """
        best, reason = self._best(), None
        for config in (best, *(other for other in self.configs if other != best)):
            plan = self.plan(config)
            out, tensors = self.operands(plan)
            form = (self.device, config, *plan.meta.values(), *(tensor.dtype for tensor in tensors))
            if form not in plans.refused:
                try:
                    plan(*tensors)
                except NotLoadedError:
                    raise
                except Exception as error:
                    if not _is_refusal(error):
                        raise
                    plans.refused[form] = str(error).strip() or type(error).__name__
                else:
                    if tuning.is_settled(self.device):
                        plans.keep(key, plan)
                    return out
            reason = plans.refused[form]
        raise LaunchError(f"the kernel {self.name} can be launched in none of its configurations: {reason}")

    def _best(self) -> Config:
        return tuning.pick_config(
            self.name, self.device, self.depends_on, self.configs, lambda c: self._bound(c)[1], self.updates
        )

    def _bound(self, config: Config) -> tuple[Tensor, Launch]:
        plan = self.plan(config)
        out, tensors = self.operands(plan)
        return out, plan.bind(tensors)


class Plans:
    """A kernel's table of plans, and of configurations that cannot be launched."""

    def __init__(self):
        self._kept: dict[Hashable, Plan] = {}
        self.get = self._kept.get
        self.refused: dict[Hashable, str] = {}  # compiling one again would take seconds each time
        _tables.append(self)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, key: Hashable, plan: Plan) -> None:
        if len(self._kept) >= MOST_PLANS:
            self._kept.clear()
        self._kept[key] = plan

    def forget(self) -> None:
        self._kept.clear()
        self.refused.clear()


_tables: list[Plans] = []


def forget() -> None:
    """Plan every kind of call again, and retry what could not be launched: after a change of driver."""
    for table in _tables:
        table.forget()


def strides(**matrices: Tensor) -> dict[str, int]:
    """By the names of kernels' parameters: ``strides(xm_xk=x)`` gives stride_xm and stride_xk."""
    return {
        f"stride_{name}": matrix.stride(dim)
        for names, matrix in matrices.items()
        for dim, name in enumerate(names.split("_"))
    }


def layout(tensor: Tensor | None) -> tuple | None:
    """Everything that the checks, the plan and Triton depend on in a tensor, except for its address."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the current stream of this device, the current one."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_observed(kernel) -> bool:
    """Whether something else runs at a launch, or is compiled into the kernel: profilers, debuggers."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains, which may be empty
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or getattr(kernel, "pre_run_hooks", None)
        or getattr(knobs.compilation, "instrumentation_mode", None)
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


@functools.cache
def can_run_directly(kind: type) -> bool:
    """Whether this Triton launches compiled kernels as `Plan` does: a probe sees what its launcher passes."""
    if torch.version.hip is not None:
        return False  # for AMD, variants also depend on the sizes of storages, which are slow to query
    seen: list = []
    probe = SimpleNamespace(
        function=object(),
        packed_metadata=object(),
        launch_metadata=lambda *args: None,
        run=lambda *args: seen.extend(args),
        _init_handles=lambda: None,
    )
    try:
        kind.__getitem__(probe, (3, 2, 1))("x", "y", stream=7)
    except Exception:
        return False
    hooks = seen[7:9]
    return seen == [3, 2, 1, 7, probe.function, probe.packed_metadata, None, *hooks, "x", "y"]


def _is_refusal(error: Exception) -> bool:
    """Whether it means that a kernel cannot be compiled or launched. Then no operand has changed.

    Nothing ran; or, where the second of two launches is refused, only the first, which writes scratch only.
    """
    if isinstance(error, LaunchError):
        return not isinstance(error, triton.runtime.errors.InterpreterError)  # an error of the kernel's own
    return isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)
