"""Programs of a grid, run one after another or in turns."""

from __future__ import annotations

import random

import numpy as np

from tests.emulator.memory import Memory, Shared
from tests.emulator.operands import UNSIGNED, register_dtype
from tests.emulator.program import FaultError, Program, describe

POISON = 0xDEAD  # of a register that only some threads have written
MOST_INSTRUCTIONS = 400_000  # of one CTA: one that takes more does not end


class CTA:
    def __init__(self, program, memory, place, grid, params, shared_size):
        self.program, self.memory, self.params = program, memory, params
        self.place = place
        self.index = place[0] + grid[0] * (place[1] + grid[1] * place[2])
        self.threads = np.arange(program.threads)
        self.registers: dict[str, np.ndarray] = {}
        self.shared = Shared(self, shared_size)
        self.epoch, self.warp_epoch = 1, np.zeros(program.threads // 32 + 1, np.int32)
        self.uncommitted, self.groups = [], []  # of cp.async
        self.products, self.product_groups = [], []  # of wgmma
        self.written: dict[str, int] = {}  # register -> the instruction that did, of `executed`
        self.fenced = -1  # the last wgmma.fence
        self.executed = 0

    def run(self):
        """A generator that pauses where other CTAs may run in between: at barriers and atomics."""
        blocks, pc = self.program.blocks, np.zeros(self.program.threads, np.int32)
        end = len(blocks)
        while True:
            block = int(pc.min())
            if block == end:
                return
            active = None if (pc == block).all() else pc == block
            following = np.full(pc.shape, block + 1, np.int32)
            if self.executed > MOST_INSTRUCTIONS:
                raise FaultError(f"CTA {self.place} does not end")
            for instruction in blocks[block]:
                mask = active
                if instruction.guard:
                    mask = self.registers[instruction.guard]
                    mask = ~mask if instruction.negated else mask
                    mask = mask if active is None else mask & active
                self.executed += 1
                if instruction.branches:
                    target = self.program.labels[instruction.operands[0]]
                    following = np.where(True if mask is None else mask, target, following)
                elif instruction.ends:
                    following = np.where(True if mask is None else mask, end, following)
                else:
                    try:
                        if instruction.guard and mask.all():
                            mask = None
                        instruction.act(self, mask)
                    except KeyError as error:
                        raise FaultError(
                            f"register {error} is read unwritten: {describe(instruction, self)}"
                        ) from None
                    if instruction.pauses:
                        yield
            pc = (
                following.astype(np.int32)
                if active is None
                else np.where(active, following, pc).astype(np.int32)
            )

    # values ----------------------------------------------------------------------------------------

    def put(self, register: str, values, mask):
        """Store unsigned bits (or booleans) in a register where the mask is set."""
        if register == "_":
            return
        wide = register_dtype(register)
        if values.dtype != wide:
            if wide is bool or values.dtype.itemsize > wide().itemsize:
                raise FaultError(f"{values.dtype} into {register}")
            values = values.view(UNSIGNED[8 * values.dtype.itemsize])
            if values.dtype != wide:
                values = values.astype(wide)
        if mask is not None:
            old = self.registers.get(register)
            if old is None:
                old = np.full(values.shape, POISON % 256 if values.dtype == bool else POISON).astype(
                    values.dtype
                )
            values = np.where(mask, values, old)
        self.registers[register], self.written[register] = values, self.executed

    def all_threads(self, mask, instruction):
        if mask is not None:
            raise FaultError(f"not by all threads: {describe(instruction, self)}")

    def lanes(self, mask):
        return self.threads if mask is None else self.threads[mask]

    def warps(self, mask, instruction) -> np.ndarray:
        """The warps that execute a warp-wide instruction: all of their threads, or none."""
        if mask is None:
            return np.arange(len(self.threads) // 32)
        per_warp = mask.reshape(-1, 32)
        if (per_warp.any(1) != per_warp.all(1)).any():
            raise FaultError(f"not all threads of a warp are here: {describe(instruction, self)}")
        return np.flatnonzero(per_warp.all(1))


def launch(
    program: Program,
    grid: tuple[int, int, int],
    values: list[int],
    shared_size: int,
    memory: Memory,
    order: str = "forward",
    seed: int = 0,
) -> int:
    """Run a grid; returns the number of instructions.

    Args:
        values: of the parameters, as unsigned integers.
        order: of the CTAs: "forward", "backward", "random", or "interleaved", six at a time in turns.
    """
    names = list(program.params)
    params = {name: (value, program.params[name]) for name, value in zip(names, values, strict=True)}
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    rng = random.Random(seed)
    if order == "backward":
        places.reverse()
    elif order in ("random", "interleaved"):
        rng.shuffle(places)
    at_once, running, executed = 6 if order == "interleaved" else 1, [], 0
    for buffer in memory.buffers:
        buffer.forget()
    with np.errstate(all="ignore"):
        while places or running:
            while places and len(running) < at_once:
                cta = CTA(program, memory, places.pop(0), grid, params, shared_size)
                running.append((cta, cta.run()))
            cta, steps = running[rng.randrange(len(running))] if at_once > 1 else running[0]
            for _ in steps:
                if at_once > 1:
                    break
            else:
                running.remove((cta, steps))
                executed += cta.executed
    return executed
