"""A Triton driver whose compiled kernels launch nothing: what a call costs the host, measured without a GPU.

Kernels are compiled for a real target (sm_90) and "launched" on CPU tensors by a function that returns at
once, so what is timed is all of the code around them. Outputs stay as they were allocated: no numbers can be
checked here. Not with TRITON_INTERPRET, and not in a process that means to launch kernels afterwards: Triton
keeps what it has compiled for a device by its number. Tried with Triton 3.5.1, 3.6.0, 3.7.1 and 3.9.0.
"""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from mica.kernels import launching, runtime
from mica.paths import choose

launches = 0


def count(*args) -> None:
    global launches
    launches += 1


class NoLaunchDriver:
    """What Triton 3.5 to 3.9 need of a driver to compile and launch."""

    def __init__(self, capability: int, launch: Callable[..., None]):
        self.launch = launch
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), object(), 64, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "max_shared_mem": (227 if capability >= 90 else 163) * 1024,
                "multiprocessor_count": 132,
                "max_num_regs": 65536,
                "warpSize": 32,
            },
        )

    def launcher_cls(self, source, metadata):
        return self.launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


@contextmanager
def installed(capability: int = 90, launch: Callable[..., None] = count):
    """Kernels "run" on every device, the CPU too, and only call ``launch``."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted without a driver.")
    why, before = runtime.why_unavailable, driver._active  # None: Triton has not looked for one yet
    runtime.why_unavailable = lambda device: None
    driver.set_active(NoLaunchDriver(capability, launch))
    choose.clear()
    launching.clear()
    try:
        yield
    finally:
        runtime.why_unavailable = why
        choose.clear()
        launching.clear()
        driver._active = before
