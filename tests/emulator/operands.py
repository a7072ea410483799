"""Operands of instructions: registers, constants and addresses, read as one number a thread."""

from __future__ import annotations

import functools
import re

import numpy as np

from tests.emulator.program import FaultError, split_operands

SHARED_BASE = 1024  # the address of a CTA's shared memory
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32}
REGISTER_BITS = {"rs": 16, "r": 32, "rd": 64}


def bits_of(kind: str) -> int:
    """The bits of s32, u64, b16, f32 and so on; FaultError for other kinds, such as bf16x2."""
    found = re.fullmatch(r"[subf](8|16|32|64)", kind)
    if not found:
        raise FaultError(f"no arithmetic for {kind}")
    return int(found[1])


@functools.cache
def register_dtype(name: str):
    found = re.match(r"%(p|rs|r|rd)\d", name)
    if not found:
        raise FaultError(f"unknown register {name}")
    return bool if found[1] == "p" else UNSIGNED[REGISTER_BITS[found[1]]]


def dtype_of(kind: str):
    """numpy's dtype for them."""
    bits = bits_of(kind)
    return FLOATS[kind] if kind in FLOATS else (SIGNED if kind[0] == "s" else UNSIGNED)[bits]


def constant(text: str, dtype):
    if text.startswith("0f"):
        return np.array([int(text[2:], 16)], np.uint32).view(dtype)
    number = int(text.rstrip("U"), 0)
    if np.issubdtype(dtype, np.floating):
        raise FaultError(f"an integer {text} as {dtype}")
    unsigned = UNSIGNED[8 * np.dtype(dtype).itemsize]
    return np.array([number % (1 << 8 * np.dtype(dtype).itemsize)], unsigned).view(dtype)


SPECIAL = {
    "%tid.x": lambda cta: cta.threads.astype(np.uint32),
    **{
        f"%ctaid.{d}": lambda cta, i=i: np.full(len(cta.threads), cta.place[i], np.uint32)
        for i, d in enumerate("xyz")
    },
}


def reader(text: str, dtype, count: int):
    """A function of a CTA that gives an operand as an array of this dtype, one number a thread."""
    if text in SPECIAL:
        return lambda cta: SPECIAL[text](cta).view(dtype)
    if text.startswith("%p"):
        return lambda cta: cta.registers[text]
    if text.startswith("%"):
        have, want = (8 * np.dtype(each).itemsize for each in (register_dtype(text), dtype))
        if have == want:
            return lambda cta: cta.registers[text].view(dtype)
        if have > want:  # the lower bits, as PTX allows
            return lambda cta: cta.registers[text].astype(UNSIGNED[want]).view(dtype)
        raise FaultError(f"{text} as {dtype}")
    if text.startswith("global_smem"):
        extra = int(text.partition("+")[2] or 0)
        value = np.full(count, SHARED_BASE + extra).astype(dtype)
    else:
        value = np.repeat(constant(text, dtype), count)
    return lambda cta: value


def address_of(text: str, dtype, count: int):
    """The address in `[%rd1 + 8]`, `[%r1+16]`, `[global_smem]`."""
    base, _, offset = (part.strip() for part in text.strip("[] ").partition("+"))
    read, offset = reader(base, dtype, count), int(offset or 0)
    return read if not offset else lambda cta: read(cta) + np.array(offset).astype(dtype)


def vector(text: str) -> list[str]:
    return split_operands(text.strip("{} ")) if text.startswith("{") else [text]
