"""Instructions on each thread's own numbers: integers, fp32, predicates, conversions.

A decoder takes an instruction's modifiers, the instruction and the number of threads. It returns a function
of a CTA and a mask, or None for a form that is not known.
"""

from __future__ import annotations

import operator
import re

import numpy as np

from tests.emulator.operands import FLOATS, UNSIGNED, bits_of, dtype_of, reader, vector
from tests.emulator.program import FaultError, describe


def elementwise(compute, result: str, sources: list, instruction, count):
    """``compute`` of operands, which have the dtypes ``sources``, into the first operand."""
    if len(instruction.operands) != len(sources) + 1:
        return None
    reads = [
        reader(text, dtype, count) for text, dtype in zip(instruction.operands[1:], sources, strict=True)
    ]
    target, dtype = instruction.operands[0], None if result == "pred" else dtype_of(result)

    def act(cta, mask):
        value = compute(*[read(cta) for read in reads])
        cta.put(target, value if dtype is None else value.astype(dtype, copy=False), mask)

    return act


def fused(a, b, c):
    """a b + c in fp32, rounded once but for ties at 2^-53: the product is exact in fp64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def shifted(function):
    def shift(a, amount):
        width = 8 * a.dtype.itemsize
        inside = np.minimum(amount, width - 1).astype(a.dtype)
        over = np.where(a < 0, -1, 0).astype(a.dtype) if function is np.right_shift else np.zeros_like(a)
        return np.where(amount < width, function(a, inside), over)

    return shift


def divided(a, b):
    b = np.where(b == 0, 1, b)
    if not np.issubdtype(a.dtype, np.signedinteger):
        return a // b
    quotient = np.abs(a.astype(np.float64)).astype(
        np.int64
    )  # exact below 2^53, checked for 64 bits by its caller
    return (np.sign(a).astype(np.int64) * np.sign(b) * (quotient // np.abs(b.astype(np.int64)))).astype(
        a.dtype
    )


def smaller(a, b):
    return np.fmin(a, b) if np.issubdtype(a.dtype, np.floating) else np.minimum(a, b)


def larger(a, b):
    return np.fmax(a, b) if np.issubdtype(a.dtype, np.floating) else np.maximum(a, b)


BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": smaller, "max": larger, "shl": shifted(np.left_shift), "shr": shifted(np.right_shift),
    "div": divided, "rem": lambda a, b: a - divided(a, b) * b,
}  # fmt: skip


def binary(name):
    def decoder(mods, instruction, count):
        if mods == ["pred"]:
            return elementwise(BINARY[name], "pred", [bool, bool], instruction, count)
        if not mods or mods[-1] in ("f64",) or mods[:-1] not in ([], ["rn"]):
            return None
        kind = mods[-1]
        if (name == "div" or name == "rem") and kind not in ("s32", "u32"):
            return None
        dtype = dtype_of(kind)
        second = np.uint32 if name in ("shl", "shr") else dtype
        if (
            name in ("shl", "shr")
            and instruction.operands[2].isdigit()
            and int(instruction.operands[2]) < bits_of(kind)
        ):
            function, amount = (
                (np.left_shift if name == "shl" else np.right_shift),
                dtype(instruction.operands[2]),
            )
            return elementwise(lambda a, b: function(a, amount), kind, [dtype, second], instruction, count)
        return elementwise(BINARY[name], kind, [dtype, second], instruction, count)

    return decoder


def multiply(mods, instruction, count):
    """mul.lo, mul.wide, mul.hi, mul.f32 and mad.*; fma.rn.f32."""
    kind = mods[-1]
    dtype, adds = dtype_of(kind), len(instruction.operands) == 4
    if kind == "f32":
        if adds:
            return elementwise(fused, "f32", [dtype] * 3, instruction, count) if mods[:-1] == ["rn"] else None
        return (
            elementwise(np.multiply, "f32", [dtype] * 2, instruction, count)
            if mods[:-1] in ([], ["rn"])
            else None
        )
    form, bits = mods[0], bits_of(kind)
    if len(mods) != 2 or form not in ("lo", "wide", "hi") or (form != "lo" and bits == 64):
        return None
    if form == "lo":
        compute, result = (lambda a, b, c=None: a * b if c is None else a * b + c), kind
    elif form == "wide":
        result = f"{kind[0]}{2 * bits}"
        wide = dtype_of(result)
        compute = lambda a, b, c=None: a.astype(wide) * b.astype(wide) + (0 if c is None else c)  # noqa: E731
    else:
        if adds:
            return None
        wide, result = dtype_of(f"{kind[0]}64"), kind
        compute = lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(dtype)  # noqa: E731
    third = [dtype_of(result)] if adds else []
    return elementwise(compute, result, [dtype, dtype, *third], instruction, count)


COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def compare(mods, instruction, count):
    if len(mods) != 2 or len(instruction.operands) != 3:
        return None
    word, kind = mods
    dtype = dtype_of(kind)
    if kind in FLOATS:
        ordered = lambda a, b: ~(np.isnan(a) | np.isnan(b))  # noqa: E731
        if word == "num":
            compute = ordered
        elif word == "nan":
            compute = lambda a, b: ~ordered(a, b)  # noqa: E731
        elif word[-1] == "u" and word[:-1] in COMPARE:
            compute = lambda a, b: COMPARE[word[:-1]](a, b) | ~ordered(a, b)  # noqa: E731
        elif word in COMPARE:
            compute = lambda a, b: COMPARE[word](a, b) & ordered(a, b)  # noqa: E731
        else:
            return None
    elif word in COMPARE:
        compute = COMPARE[word]
    else:
        return None
    return elementwise(compute, "pred", [dtype, dtype], instruction, count)


def select(mods, instruction, count):
    dtype = dtype_of(mods[0])
    return elementwise(lambda a, b, c: np.where(c, a, b), mods[0], [dtype, dtype, bool], instruction, count)


def unary(name):
    def decoder(mods, instruction, count):
        if mods == ["pred"] and name == "not":
            return elementwise(np.logical_not, "pred", [bool], instruction, count)
        compute = {"not": np.invert, "neg": np.negative, "abs": np.abs}[name]
        return (
            elementwise(compute, mods[-1], [dtype_of(mods[-1])], instruction, count)
            if len(mods) == 1
            else None
        )

    return decoder


def field_extract(mods, instruction, count):
    dtype, bits = dtype_of(mods[0]), bits_of(mods[0])
    if bits != 32:
        return None

    def compute(a, position, length):
        position, length = (v & np.uint32(255) for v in (position, length))
        if ((position + length > 32) | (length == 0)).any():
            raise FaultError(f"bits beyond the number: {describe(instruction)}")
        left = np.uint32(32) - length - position
        right = np.uint32(32) - length
        raised = np.left_shift(a.view(np.uint32), left).view(dtype)
        return np.right_shift(raised, right.astype(dtype))

    return elementwise(compute, mods[0], [dtype, np.uint32, np.uint32], instruction, count)


def move(mods, instruction, count):
    target, source = instruction.operands
    kind = mods[0]
    if kind == "pred":
        value = np.full(count, int(source) != 0) if not source.startswith("%") else None
        return lambda cta, mask: cta.put(target, cta.registers[source] if value is None else value, mask)
    dtype = UNSIGNED[bits_of(kind)]
    if source.startswith("{"):
        parts = vector(source)
        reads = [reader(part, UNSIGNED[bits_of(kind) // len(parts)], count) for part in parts]
        return lambda cta, mask: cta.put(
            target, np.stack([read(cta) for read in reads], 1).view(dtype).reshape(count), mask
        )
    read = reader(source, dtype, count)
    if target.startswith("{"):
        targets = vector(target)
        part = UNSIGNED[bits_of(kind) // len(targets)]

        def unpack(cta, mask):
            values = np.ascontiguousarray(read(cta)).view(part).reshape(count, len(targets))
            for index, name in enumerate(targets):
                cta.put(name, values[:, index].copy(), mask)

        return unpack
    return lambda cta, mask: cta.put(target, read(cta), mask)


def generic_address(mods, instruction, count):
    """cvta: global addresses are generic ones here."""
    if mods not in (["global", "u64"], ["to", "global", "u64"]):
        return None
    return elementwise(lambda a: a, "u64", [np.uint64], instruction, count)


def to_bf16(a):
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_f16(a):
    return np.where(np.isnan(a), np.uint16(0x7FFF), a.astype(np.float16).view(np.uint16)).astype(np.uint16)


def from_bf16(a):
    return (a.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(a):
    """To nearest, ties away from zero: 10 bits behind the point."""
    bits = a.view(np.uint32)
    return np.where(np.isfinite(a), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).astype(
        np.uint32
    )


def convert(mods, instruction, count):
    form = ".".join(mods)
    to_16 = {"bf16": to_bf16, "f16": to_f16}
    if form in ("rn.bf16.f32", "rn.f16.f32"):
        return elementwise(to_16[mods[1]], "u16", [np.float32], instruction, count)
    if form in ("rn.bf16x2.f32", "rn.f16x2.f32"):
        half = to_16[mods[1][:-2]]
        pack = lambda high, low: half(low).astype(np.uint32) | half(high).astype(np.uint32) << np.uint32(16)  # noqa: E731
        return elementwise(pack, "u32", [np.float32, np.float32], instruction, count)
    if form == "f32.bf16":
        return elementwise(from_bf16, "f32", [np.uint16], instruction, count)
    if form == "rn.f16.bf16":
        return elementwise(lambda a: to_f16(from_bf16(a)), "u16", [np.uint16], instruction, count)
    if form == "rn.bf16.f16":
        return elementwise(lambda a: to_bf16(a.astype(np.float32)), "u16", [np.float16], instruction, count)
    if form == "f32.f16":
        return elementwise(lambda a: a.astype(np.float32), "f32", [np.float16], instruction, count)
    if form == "rna.tf32.f32":
        return elementwise(to_tf32, "u32", [np.float32], instruction, count)
    if form in ("rn.f32.s32", "rn.f32.u32", "rn.f32.s64"):
        return elementwise(lambda a: a.astype(np.float32), "f32", [dtype_of(mods[2])], instruction, count)
    if len(mods) == 2 and all(re.fullmatch(r"[su]\d+", m) for m in mods):
        to, source = (dtype_of(m) for m in mods)
        return elementwise(lambda a: a.astype(to), mods[0], [source], instruction, count)
    return None


# memory --------------------------------------------------------------------------------------------

DECODERS = {
    **{name: binary(name) for name in BINARY},
    **{name: unary(name) for name in ("not", "neg", "abs")},
    "mul": multiply, "mad": multiply, "fma": multiply, "setp": compare, "selp": select, "bfe": field_extract,
    "mov": move, "cvt": convert, "cvta": generic_address,
}  # fmt: skip
