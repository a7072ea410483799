"""All instructions that are known: a parsed program gets what each of its instructions does."""

from __future__ import annotations

from tests.emulator import accesses, arithmetic, hopper, warps
from tests.emulator.program import FaultError, Instruction, Program

DECODERS = {}
for table in (arithmetic, accesses, warps, hopper):
    DECODERS |= table.DECODERS


def decode(program: Program) -> Program:
    """The program itself, ready to run.

    Raises:
        FaultError: an instruction, or a form of one, that is not known.
    """
    for block in program.blocks:
        for instruction in block:
            decode_one(instruction, program.threads)
    return program


def decode_one(instruction: Instruction, threads: int) -> None:
    if instruction.branches or instruction.ends:
        return
    name, *mods = instruction.op.split(".")
    decoder = DECODERS.get(name)
    instruction.act = decoder and decoder(mods, instruction, threads)
    if instruction.act is None:
        raise FaultError(f"unknown instruction {instruction.text}")
