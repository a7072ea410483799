"""Instructions on each thread's own numbers: integers, fp32, predicates, conversions.

A decoder takes an instruction's modifiers, the instruction and the number of threads. It returns a function
of a CTA and a mask, or None for a form that is not known.
"""

from __future__ import annotations

import operator
import re

import numpy as np

from tests.emulator.operands import FLOATS, UNSIGNED, bits_of, dtype_of, reader, vector


def elementwise(compute, result: str, sources: list, instruction, count):
    """``compute`` of operands, which have the dtypes ``sources``, into the first operand."""
    if len(instruction.operands) != len(sources) + 1:
        return None
    target, *texts = instruction.operands
    reads = [reader(text, dtype, count) for text, dtype in zip(texts, sources, strict=True)]
    dtype = bool if result == "pred" else dtype_of(result)

    def act(cta, mask):
        value = compute(*[read(cta) for read in reads])
        cta.put(target, value.astype(dtype, copy=False), mask)

    return act


def shifted(function):
    def shift(a, amount):
        width = 8 * a.dtype.itemsize
        inside = np.minimum(amount, width - 1).astype(a.dtype)
        over = np.where(a < 0, -1, 0).astype(a.dtype) if function is np.right_shift else np.zeros_like(a)
        return np.where(amount < width, function(a, inside), over)

    return shift


def divided(a, b):
    """Towards zero; by zero it is anything."""
    wide, by = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    return np.sign(wide) * np.sign(by) * (np.abs(wide) // np.abs(by))


ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.fmin, "max": np.fmax, "shl": shifted(np.left_shift), "shr": shifted(np.right_shift),
    "div": divided, "neg": np.negative,
}  # fmt: skip


def arithmetic(name):
    def decoder(mods, instruction, count):
        kind = mods[-1]
        if mods[:-1] not in ([], ["rn"]) or kind in ("f16", "f64") or (name == "div" and kind != "s32"):
            return None
        sources = [bool if kind == "pred" else dtype_of(kind)] * (len(instruction.operands) - 1)
        if name in ("shl", "shr"):
            sources[1] = np.uint32
        return elementwise(ARITHMETIC[name], kind, sources, instruction, count)

    return decoder


def fused(a, b, c):
    """a b + c in fp32, rounded once but for ties at 2^-53: the product is exact in fp64."""
    return a.astype(np.float64) * b + c


def multiply(mods, instruction, count):
    """mul.lo, mul.wide and mul.f32; mad.lo, mad.wide and fma.rn.f32, which add a third operand."""
    *form, kind = mods
    dtype, adds = dtype_of(kind), len(instruction.operands) == 4
    if kind == "f32" and form in ([], ["rn"]):
        return elementwise(fused if adds else np.multiply, kind, [dtype] * (2 + adds), instruction, count)
    if form not in (["lo"], ["wide"]) or kind in FLOATS:
        return None
    result = kind if form == ["lo"] else f"{kind[0]}{2 * bits_of(kind)}"
    wide = dtype_of(result)

    def compute(a, b, c=0):
        return a.astype(wide) * b.astype(wide) + c

    return elementwise(compute, result, [dtype, dtype, wide][: 2 + adds], instruction, count)


COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge,
}  # fmt: skip


def compare(mods, instruction, count):
    """Of integers; of numbers only whether neither is a NaN."""
    word, kind = mods
    compute = None if kind in FLOATS else COMPARE.get(word)
    if mods == ["num", "f32"]:
        compute = lambda a, b: ~(np.isnan(a) | np.isnan(b))  # noqa: E731
    return compute and elementwise(compute, "pred", [dtype_of(kind)] * 2, instruction, count)


def select(mods, instruction, count):
    dtype = dtype_of(mods[0])
    return elementwise(lambda a, b, c: np.where(c, a, b), mods[0], [dtype, dtype, bool], instruction, count)


def field_extract(mods, instruction, count):
    """Bits at a fixed place of a number of 32."""
    target, source, position, length = instruction.operands
    left, right = 32 - int(length) - int(position), 32 - int(length)
    if mods not in (["s32"], ["u32"]) or left < 0 or right > 31:
        return None
    dtype, read = dtype_of(mods[0]), reader(source, np.uint32, count)
    return lambda cta, mask: cta.put(target, (read(cta) << np.uint32(left)).view(dtype) >> dtype(right), mask)


def move(mods, instruction, count):
    target, source = instruction.operands
    kind = mods[0]
    if kind == "pred":
        value = np.full(count, int(source) != 0) if not source.startswith("%") else None
        return lambda cta, mask: cta.put(target, cta.registers[source] if value is None else value, mask)
    dtype, parts = UNSIGNED[bits_of(kind)], vector(source)
    reads = [reader(part, UNSIGNED[bits_of(kind) // len(parts)], count) for part in parts]
    targets = vector(target)
    piece = UNSIGNED[bits_of(kind) // len(targets)]

    def act(cta, mask):
        whole = np.stack([read(cta) for read in reads], 1).view(dtype)
        values = whole.view(piece).reshape(count, len(targets))
        for index, name in enumerate(targets):
            cta.put(name, values[:, index].copy(), mask)

    return act


def to_bf16(a):
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_f16(a):
    return np.where(np.isnan(a), np.uint16(0x7FFF), a.astype(np.float16).view(np.uint16)).astype(np.uint16)


def from_bf16(a):
    return (a.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def factors(data, kind: str):
    """What tensor cores multiply, in fp64: the last dimension's bits as numbers of a kind."""
    data = np.ascontiguousarray(data)
    if kind == "tf32":
        return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    halves = data.view(np.uint16)
    return (halves.view(np.float16) if kind == "f16" else from_bf16(halves)).astype(np.float64)


def to_tf32(a):
    """To nearest, ties away from zero: 10 bits behind the point."""
    bits = a.view(np.uint32)
    return np.where(np.isfinite(a), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def two(half):
    return lambda high, low: half(low).astype(np.uint32) | half(high).astype(np.uint32) << np.uint32(16)


CONVERSIONS = {  # form -> (function, kind of the result, dtypes of the operands)
    "rn.bf16.f32": (to_bf16, "u16", [np.float32]),
    "rn.f16.f32": (to_f16, "u16", [np.float32]),
    "rn.bf16x2.f32": (two(to_bf16), "u32", [np.float32] * 2),
    "rn.f16x2.f32": (two(to_f16), "u32", [np.float32] * 2),
    "rna.tf32.f32": (to_tf32, "u32", [np.float32]),
    "f32.bf16": (from_bf16, "f32", [np.uint16]),
    "f32.f16": (np.positive, "f32", [np.float16]),
    "rn.f32.s32": (np.positive, "f32", [np.int32]),
}


def convert(mods, instruction, count):
    form = ".".join(mods)
    if form in CONVERSIONS:
        return elementwise(*CONVERSIONS[form], instruction, count)
    if len(mods) == 2 and all(re.fullmatch(r"[su]\d+", m) for m in mods):
        return elementwise(np.positive, mods[0], [dtype_of(mods[1])], instruction, count)
    return None


DECODERS = {
    **{name: arithmetic(name) for name in ARITHMETIC},
    "mul": multiply, "mad": multiply, "fma": multiply, "setp": compare, "selp": select, "bfe": field_extract,
    "mov": move, "cvt": convert,
}  # fmt: skip
