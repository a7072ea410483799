"""How kernels are launched: planned once per kind of call, after that only pointers are filled in.

A kernel's public function is a `Launcher`. The first call of a kind tries the plans of its configurations in
order, through Triton's own front end, and the launcher's cache keeps the one that ran. Later calls look that
plan up by everything that the configuration and the arithmetic depend on, and launch the compiled kernel
directly. Binding 25 arguments in Triton costs 15 µs per launch and planning another 15 µs; this way both
together take 3 µs. `RecordedLaunches` looks up the launches of a whole formula at once.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from mica.kernels.common import INTERPRETED, LaunchError, NotLoadedError, fp32_setting, raw_stream
from mica.kernels.configs import Config

# A table with this many entries, of 2 KB each, is emptied: a varying number of tokens must not fill memory.
MOST_ENTRIES = 4096

# `_cuda_getDevice` is missing in builds without CUDA.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_address = torch.Tensor.data_ptr


@dataclass
class Launch:
    """A kernel launch that is ready but not yet made: the static gate compiles it, a call runs it.

    ``args`` has the tensors and numbers, in the order of the kernel's parameters; ``meta`` the constants.
    """

    kernel: Callable
    grid: tuple[int, ...]
    args: dict
    meta: dict
    num_warps: int
    num_stages: int

    def __call__(self):
        """Launch, and return the compiled kernel, or None (interpreted, or nothing to do).

        Raises:
            NotLoadedError: a CUDA graph is captured, and Triton has not launched such a kernel before.
        """
        if 0 in self.grid:  # no tokens
            return None

        device = next(iter(self.args.values())).device
        # Triton launches on the current device, wherever the tensors are
        made_current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with made_current:
            if is_capturing(device) and not self._is_loaded():
                raise NotLoadedError(
                    "a kernel for this kind of call is not loaded yet, and none can be loaded while a CUDA "
                    "graph is being captured: make such a call once before the capture."
                )
            return self.kernel[self.grid](*self.args.values(), **self.meta, **self.options())

    def _is_loaded(self) -> bool:
        """Whether the device has the kernel. Compiles it if need be, which calls no driver."""
        compiled = self.kernel.warmup(*self.args.values(), grid=self.grid, **self.meta, **self.options())
        return getattr(compiled, "module", None) is not None

    def options(self) -> dict:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if not INTERPRETED.value:
            options["enable_fp_fusion"] = True  # explicit, because the default changes with Triton 3.10
        return options


@dataclass
class Plan:
    """A launch without its tensors, which are the first parameters of every kernel here, before the numbers.

    ``shape`` and ``dtype`` are the output's, where the call allocates it. ``parts`` counts the fp32 numbers
    that the parts of a split sum have together; it is 0 where nothing is split.
    """

    kernel: Callable
    grid: tuple[int, int]
    numbers: dict
    meta: dict
    config: Config
    shape: tuple[int, ...] = (0, 0)
    dtype: torch.dtype = torch.float32
    parts: int = 0
    # which pointers are aligned (True: all of them) -> how to launch the kernel that Triton compiled for that
    _compiled: dict = field(default_factory=dict)
    _tail: tuple = field(init=False)

    def __post_init__(self):
        values = self.numbers | self.meta
        self._tail = tuple(values[name] for name in self.kernel.arg_names[-len(values) :])

    def bind(self, tensors: Sequence[Tensor | None]) -> Launch:
        """The launch with these tensors, in the order of the kernel's parameters, None if not used."""
        named = dict(zip(self.kernel.arg_names, tensors, strict=False))
        return Launch(
            kernel=self.kernel,
            grid=self.grid,
            args=named | self.numbers,
            meta=self.meta,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
        )

    def __call__(self, *tensors: Tensor | None) -> None:
        addresses = [0 if tensor is None else _address(tensor) for tensor in tensors]
        # Triton compiles one variant for pointers that 16 divides, as nearly always all are, and others else
        aligned = math.gcd(16, *addresses) == 16 or tuple(address % 16 == 0 for address in addresses)
        direct = self._compiled.get(aligned)
        if direct is None or _is_observed(self.kernel):
            self._launch(tensors, aligned)
            return

        index = tensors[0].get_device()
        if index < 0:  # a driver of another kind
            self._run(direct, driver.active.get_current_stream(0), addresses)
        elif index == current_device():
            self._run(direct, raw_stream(index), addresses)
        else:
            with torch.cuda.device(index):
                self._run(direct, raw_stream(index), addresses)

    def _launch(self, tensors: Sequence[Tensor | None], aligned: bool | tuple[bool, ...]) -> None:
        """Launch through Triton's own front end, which compiles and calls the hooks."""
        is_observed = _is_observed(self.kernel)
        compiled = self.bind(tensors)()
        if compiled is not None and not is_observed and can_run_directly(type(compiled)):
            self._compiled[aligned] = (compiled, compiled.run, compiled.function, compiled.packed_metadata)

    def _run(self, direct: tuple, stream: int, addresses: list[int]) -> None:
        _, run, function, metadata = direct  # the first keeps the others alive
        run(*self.grid, 1, stream, function, metadata, None, None, None, *addresses, *self._tail)


class PlannedCall(NamedTuple):
    """A call of a kernel that is not yet made: its plan for each configuration, and its tensors."""

    launcher: Launcher
    tensors: tuple[Tensor | None, ...]
    configs: Sequence[Config]  # the default first
    plan: Callable[[Config], Plan]

    def bind(self, config: Config | None = None) -> tuple[Tensor, Launch]:
        """The output, not yet written, and the launch that writes it."""
        plan = self.plan(config or self.configs[0])
        bound: list[Tensor | None] = []

        def remember(*tensors: Tensor | None) -> None:
            bound.extend(tensors)

        out = self.launcher.run(remember, plan, *self.tensors)
        return out, plan.bind(bound)

    def launch_first(self, key: Hashable) -> Tensor:
        """The output, by the first plan that can be launched, which is kept for calls with this key.

        Raises:
            LaunchError: none can be compiled and launched. It names the kernel and why the last one failed.
            NotLoadedError: see `Launch`.
        """
        launcher = self.launcher
        for config in self.configs:
            plan = self.plan(config)
            variant = self._variant(plan)
            reason = launcher.refused.get(variant)
            if reason is not None:
                continue
            try:
                out = launcher.run(plan, plan, *self.tensors)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                reason = str(error).strip() or type(error).__name__
                launcher.refused.keep(variant, reason)
            else:
                launcher.cache.keep(key, plan)
                return out

        name = launcher.__name__
        raise LaunchError(f"the kernel {name} cannot be launched in any of its configurations: {reason}")

    def _variant(self, plan: Plan) -> tuple:
        """What decides whether a kernel can be compiled and launched."""
        dtypes = [tensor if tensor is None else tensor.dtype for tensor in self.tensors]
        device = self.tensors[0].device
        return (device, plan.config, *plan.meta.values(), plan.dtype, *dtypes)


Planned = tuple[Sequence[Config], Callable[[Config], Plan]]


class Launcher:
    """A kernel as a function of its tensors and, as keywords, of numbers.

    ``planned(*tensors, **numbers)`` gives the configurations, the default first, and the plan for each.
    ``run(launch, plan, *tensors)`` allocates the output, hands all tensors to ``launch`` in the order of the
    kernel's parameters, and returns the output. A tensor that is None, or left out, is no pointer there.
    """

    def __init__(self, planned: Callable[..., Planned], run: Callable[..., Tensor]):
        self.planned = planned
        self.run = run
        self.cache = Table()
        # variant -> why it cannot be launched: compiling it again would take seconds each time
        self.refused = Table()
        functools.update_wrapper(self, planned)

    def __call__(self, *tensors: Tensor | None, **numbers: Hashable) -> Tensor:
        key = self.key(*tensors, **numbers)
        plan = self.cache.get(key)
        if plan is None:
            return self.plan(*tensors, **numbers).launch_first(key)
        return self.run(plan, plan, *tensors)

    def key(self, *tensors: Tensor | None, **numbers: Hashable) -> tuple:
        """Everything that the plan may depend on."""
        return fp32_setting(), *map(layout, tensors), *numbers.items()

    def plan(self, *tensors: Tensor | None, config: Config | None = None, **numbers: Hashable) -> PlannedCall:
        """The call, not yet made; with ``config``, in this configuration only."""
        configs, plan = self.planned(*tensors, **numbers)
        if config:
            configs = (config,)
        return PlannedCall(self, tensors, configs, plan)


def launcher(run: Callable[..., Tensor]) -> Callable[[Callable[..., Planned]], Launcher]:
    """Decorates a ``planned``, see `Launcher`."""
    return functools.partial(Launcher, run=run)


class Table:
    """What has been found out about a kind of call, until `clear`."""

    def __init__(self):
        self._entries: dict[Hashable, Any] = {}
        self.get = self._entries.get
        self.clear = self._entries.clear
        _tables.append(self)

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, key: Hashable, entry: Any) -> None:
        if len(self) >= MOST_ENTRIES:
            self.clear()
        self._entries[key] = entry


class RecordedLaunches(Table):
    """The launches of one formula, whose plans follow from one key: a layer looks up one entry, not three."""

    def __init__(self, *launchers: Launcher):
        super().__init__()
        self.launchers = launchers

    def record(self, key: Hashable, *numbers: dict[str, Hashable]) -> list[Callable[..., Tensor]]:
        """What ``get(key)`` gives from now on: for each launcher a function of its tensors.

        ``numbers`` has that launcher's keywords. A step is planned at its first call.
        """
        steps: list[Callable[..., Tensor]] = []
        self.keep(key, steps)
        for place, (launcher, own) in enumerate(zip(self.launchers, numbers, strict=True)):
            steps.append(functools.partial(_recorded, steps, place, launcher, own))
        return steps


def _recorded(steps: list, place: int, launcher: Launcher, numbers: dict, *tensors: Tensor | None) -> Tensor:
    """Call the launcher, and put the plan that it has found in its place among the steps."""
    out = launcher(*tensors, **numbers)
    plan = launcher.cache.get(launcher.key(*tensors, **numbers))
    if plan is not None:  # another thread may have filled the cache, which empties it
        steps[place] = functools.partial(launcher.run, plan, plan)
    return out


_tables: list[Table] = []


def clear() -> None:
    """Plan every kind of call again, and retry what could not be launched: after a change of driver."""
    for table in _tables:
        table.clear()


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """Strides by the names of a kernel's parameters: ``strides(xm_xk=x)`` gives stride_xm and stride_xk.

    They are 0 for None, and for leading dimensions that a tensor lacks.
    """
    numbers = {}
    for keyword, tensor in tensors.items():
        names = keyword.split("_")
        own = () if tensor is None else tensor.stride()
        missing = (0,) * (len(names) - len(own))
        for name, stride in zip(names, missing + own, strict=True):
            numbers[f"stride_{name}"] = stride
    return numbers


def layout(tensor: Tensor | None) -> tuple | None:
    """Everything about a tensor that its plan and Triton depend on, except for its address."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the current stream of ``device``, which is the current device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_observed(kernel) -> bool:
    """Whether something else runs at a launch, or is compiled into the kernel: profilers, debuggers."""
    runtime = knobs.runtime
    enter = runtime.launch_enter_hook  # a chain of hooks, which may be empty
    leave = runtime.launch_exit_hook
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
    """Whether an error means that a kernel cannot be compiled or launched. Then no operand has changed.

    Not an error of the interpreted kernel itself, nor that of a kernel which can be loaded after a capture.
    """
    if isinstance(error, LaunchError):
        return not isinstance(error, (triton.runtime.errors.InterpreterError, NotLoadedError))
    return isinstance(error, RuntimeError) and "PassManager::run failed" in str(error)
