"""A kernel's PTX as a program: its blocks of instructions, parsed but not yet decoded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


class FaultError(Exception):
    """Something that a GPU would not do right, or that the emulator does not know."""


@dataclass
class Instruction:
    text: str
    where: str  # the line of the Python source
    guard: str | None
    negated: bool
    op: str
    operands: list[str]
    act: Callable | None = None  # of a CTA and a mask of its threads (None: all of them)

    def __post_init__(self):
        self.branches, self.ends = self.op.startswith("bra"), self.op in ("ret", "exit")
        self.pauses = self.op.startswith(("bar.sync", "atom", "red."))  # other CTAs may run in between


@dataclass
class Program:
    name: str
    params: dict[str, int]  # name -> bits
    threads: int
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # -> number of a block


def split_operands(text: str) -> list[str]:
    parts, depth, part = [], 0, ""
    for char in text:
        depth += char in "{[("
        depth -= char in "}])"
        if char == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


def parse(ptx: str) -> Program:
    """The only function of a module.

    Raises:
        FaultError: a statement that is no instruction, or a second function.
    """
    name = re.search(r"\.entry (\w+)\s*\(", ptx)
    header, body = ptx[name.start() :].split("{", 1)
    if len(re.findall(r"\.entry|\.func", ptx)) != 1:
        raise FaultError("more than one function")
    params = {n: int(b) for b, n in re.findall(r"\.param \.[usbf](\d+)[^,()]*?(\w+)\s*[,\n)]", header)}
    threads = int(re.search(r"\.reqntid (\d+)", header)[1])
    program = Program(name[1], params, threads, [[]], {})
    where, pending, targets = "", "", set(re.findall(r"\bbra[.\w]*\s+(\$\w+)", body))
    for line in body.splitlines():
        location = re.search(r"//\s*([\w.]+:\d+):\d+", line)
        line = line.split("//")[0].strip()
        if line.startswith(".loc"):
            where = location[1] if location else where
            continue
        label = re.match(r"(\$\w+):$", line)
        if label and not pending:
            if label[1] not in targets:  # of debugging information
                continue
            if program.blocks[-1]:
                program.blocks.append([])
            program.labels[label[1]] = len(program.blocks) - 1
            continue
        if not line or (not pending and line[0] in "}"):
            if line == "}":  # of the function; what follows are debugging sections
                break
            continue
        if not pending and re.match(r"\.(reg|pragma)\b", line):
            continue
        pending += " " + line
        if not pending.endswith(";"):
            continue
        text, pending = pending.strip().rstrip(";").strip(), ""
        if re.match(r"\{|\.", text):
            raise FaultError(f"not understood: {text}")
        match = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
        negated, guard, op, rest = match.groups()
        program.blocks[-1].append(Instruction(text, where, guard, negated == "!", op, split_operands(rest)))
        if op.split(".")[0] in ("bra", "ret", "exit"):
            program.blocks.append([])
    return program


def describe(instruction: Instruction, cta=None) -> str:
    place = f" in CTA {cta.place}" if cta else ""
    return f"`{instruction.text}` ({instruction.where}){place}"
