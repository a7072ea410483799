"""Instructions of a program taken out, or changed, for a while."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

from tests.emulator.instructions import decode_one
from tests.emulator.program import Instruction, Program


def found(program: Program, op: str) -> list[Instruction]:
    """The instructions whose name begins so."""
    return [i for block in program.blocks for i in block if i.op.startswith(op)]


@contextmanager
def changed(program: Program, op: str, only: Instruction | None = None, words: tuple[str, str] | None = None):
    """Without the instructions whose name begins so, or ``only`` one of them.

    Args:
        words: what becomes what in the name; without it the instruction is left out.

    Raises:
        LookupError: there are none.
    """
    gone = {id(i) for i in found(program, op) if only is None or i is only}
    if not gone:
        raise LookupError(f"no {op} in {program.name}")

    def other(instruction):
        if id(instruction) not in gone:
            return [instruction]
        if words is None:
            return []
        made = replace(instruction, op=instruction.op.replace(*words))
        decode_one(made, program.threads)
        return [made]

    kept = program.blocks
    program.blocks = [[new for i in block for new in other(i)] for block in kept]
    try:
        yield
    finally:
        program.blocks = kept
