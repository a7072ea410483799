"""How many programs a GPU runs at once, modelled from registers, shared memory and threads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a multiprocessor shares among its programs, and how many multiprocessors there are.

    ``name``: of the device of this target that is modelled, the one with the most memory bandwidth.
    """

    name: str
    multiprocessors: int
    shared_memory: int
    threads: int = 2048
    programs: int = 32
    registers: int = 65536


DEVICES = {
    "sm_80": Device("A100", 108, 164 * 1024),
    "sm_90": Device("H100", 132, 228 * 1024),
    "sm_100": Device("B200", 148, 228 * 1024),
}
RESERVED = 1024  # bytes of shared memory per program that the driver takes
WARP = 32
REGISTERS_AT_A_TIME = 256  # a warp gets its registers in units of that many


def programs_at_once(device: Device, registers: int, shared_memory: int, num_warps: int) -> int:
    """On one multiprocessor, with that many registers per thread and bytes of shared memory per program."""
    units = -(-registers * WARP // REGISTERS_AT_A_TIME)
    by_registers = device.registers // (units * REGISTERS_AT_A_TIME * num_warps)
    by_shared_memory = device.shared_memory // (shared_memory + RESERVED)
    by_threads = device.threads // (WARP * num_warps)
    return min(by_registers, by_shared_memory, by_threads, device.programs)


def waves(device: Device, programs: int, at_once: int) -> float:
    """How many times the GPU is filled: each begun wave takes as long as a full one."""
    return programs / (device.multiprocessors * at_once)
