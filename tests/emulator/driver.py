"""A Triton driver that "launches" on the emulator: kernels are compiled and launched by Triton's own code.

`installed` makes Triton compile for a target and hands the PTX, in place of the machine code that ptxas would
make of it, to `running`. Tensors are on the CPU. Only the tensors that a launch is given may be touched,
element by element, and only those of parameters that are named as outputs may be written. Not in a process
that launches kernels otherwise: Triton keeps what it has compiled for a device by its number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from tests.emulator import running
from tests.emulator.instructions import decode
from tests.emulator.memory import Buffer, Memory
from tests.emulator.program import FaultError, Program, parse
from tests.support.no_launch import NoLaunchDriver

settings = SimpleNamespace(order="forward", seed=0)
statistics = SimpleNamespace(launches=0, by_kept_plans=0, instructions=0)
programs: dict[bytes, Program] = {}  # by their PTX
given: list[Sequence[torch.Tensor | None]] = []  # the tensors of launches whose arguments are addresses


def memory_of(named: dict[str, torch.Tensor], outputs: Sequence[str]) -> Memory:
    """What a launch may read, and write, of the storages of its tensors."""
    memory, buffers = Memory(), {}
    for name, tensor in named.items():
        storage, size = tensor.untyped_storage(), tensor.element_size()
        if storage.data_ptr() not in buffers:
            buffers[storage.data_ptr()] = Buffer(name, storage.data_ptr(), storage.nbytes())
        if not tensor.numel():
            continue
        buffer, start = buffers[storage.data_ptr()], tensor.data_ptr() - storage.data_ptr()
        for allowed in (buffer.readable, buffer.writable) if name in outputs else (buffer.readable,):
            strides = tuple(stride * size for stride in tensor.stride())
            torch.from_numpy(allowed)[start:].as_strided((*tensor.shape, size), (*strides, 1)).fill_(True)
    memory.buffers = list(buffers.values())
    return memory


def as_bits(value, kind: str) -> int:
    """An argument as an unsigned integer."""
    if kind.startswith("*"):
        return value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    bits = int(kind[1:])
    if not -(1 << bits - 1) <= value < 1 << bits - (kind[0] == "i"):
        raise FaultError(f"{value} is no {kind}")
    return value % (1 << bits)


class Driver(NoLaunchDriver):
    """Launches on the emulator. ``outputs``, ``left_at_zero``: names of parameters."""

    def __init__(self, capability: int, outputs: Sequence[str], left_at_zero: Sequence[str]):
        super().__init__(capability, None)
        self.outputs, self.left_at_zero = outputs, left_at_zero
        self.utils.load_binary = self.load_binary

    @staticmethod
    def load_binary(name, binary: bytes, shared: int, device):
        if binary not in programs:
            programs[binary] = decode(parse(binary.decode()))
        return object(), (programs[binary], shared), 64, 0, 1024

    def launcher_cls(self, source, metadata):
        kinds = source.signature.items()

        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            program, shared = function
            if isinstance(arguments[0], int):  # a kept plan's, without Triton's front end
                pointers = given[-1]
                addresses = (0 if tensor is None else tensor.data_ptr() for tensor in pointers)
                if arguments[: len(pointers)] != tuple(addresses):
                    raise FaultError("launched with addresses of other tensors")
                arguments = (*pointers, *arguments[len(pointers) :])
                statistics.by_kept_plans += 1
            named = {
                name: value
                for (name, kind), value in zip(kinds, arguments, strict=True)
                if kind.startswith("*")
            }
            values = [
                as_bits(value, kind)
                for (_, kind), value in zip(kinds, arguments, strict=True)
                if kind != "constexpr"
            ]
            values += [0, 0]  # scratch memory of the kernel and of a profiler: there is none
            memory = memory_of(named, self.outputs)
            statistics.instructions += running.launch(
                program, (x, y, z), values, shared, memory, settings.order, settings.seed
            )
            statistics.launches += 1
            for name in self.left_at_zero:
                is_own = name in named and named[name].dtype is torch.int32  # else one that stands in for it
                if is_own and named[name].any():
                    raise FaultError(f"{name} is not 0 after the launch")

        return run


@contextmanager
def installed(capability: int, outputs: Sequence[str], left_at_zero: Sequence[str] = ()):
    """Kernels are compiled for this target, and every launch of one is emulated."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted without a driver.")
    active, make_cubin = driver._active, CUDABackend.make_cubin
    driver.set_active(Driver(capability, outputs, left_at_zero))
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode()
    try:
        with knobs.cache.scope():
            # what is kept as machine code is PTX: real compilations must not find it
            knobs.cache.dir = f"{knobs.cache.dir}-emulated"
            yield
    finally:
        driver._active, CUDABackend.make_cubin = active, make_cubin
