"""Instructions taken out of a program for a while."""

from __future__ import annotations

from collections.abc import Container
from contextlib import contextmanager

from tests.emulator.program import Program


@contextmanager
def removed(program: Program, op: str, which: Container[int]):
    """Without the instructions whose name begins so: the first is 0.

    Raises:
        LookupError: there are none.
    """
    found = [i for block in program.blocks for i in block if i.op.startswith(op)]
    gone = {id(instruction) for place, instruction in enumerate(found) if place in which}
    if not gone:
        raise LookupError(f"no {op} in {program.name}")
    kept = program.blocks
    program.blocks = [[i for i in block if id(i) not in gone] for block in kept]
    try:
        yield
    finally:
        program.blocks = kept
