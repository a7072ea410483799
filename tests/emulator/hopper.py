"""What sm_90a adds for products: wgmma, and the fence between the two views of shared memory.

Operands in shared memory are read by descriptors, whose layouts are those of PTX's matrix descriptor: rows of
32, 64 or 128 bytes, swizzled by bits of the address, either K or M/N along a row. A product's registers are
unwritten from its start until it is waited for, and no one may write the bytes that it reads meanwhile; what
was written by ordinary stores or by cp.async needs a barrier and a `fence.proxy.async` before it, and
registers that threads have written need a `wgmma.fence`.
"""

from __future__ import annotations

import re

import numpy as np

from tests.emulator.arithmetic import factors
from tests.emulator.operands import SHARED_BASE, reader, vector
from tests.emulator.program import FaultError, describe

WIDTHS = {1: 128, 2: 64, 3: 32}  # swizzle mode -> bytes of a row


def places_of(descriptor: int, rows: int, columns: int, size: int, transposed: bool, base: int):
    """Byte indices (rows, columns, size) of an operand with ``columns`` along K."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = WIDTHS.get(descriptor >> 62)
    if width is None or descriptor >> 49 & 7:
        raise FaultError(f"a descriptor without a swizzle, or with a base offset: {descriptor:#x}")
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    across, along = (column, row * size) if transposed else (row, column * size)
    offset = across % 8 * width + across // 8 * stride + along % width + along // width * leading
    address = start + offset
    address = address ^ ((address >> 7 & (width // 16 - 1)) << 4)
    return (address - base)[..., None] + np.arange(size)


def _flying(cta) -> list:
    """The products that are not waited for, in order."""
    return [product for group in (*cta.product_groups, cta.products) for product in group]


def _fenced(cta, names, instruction):
    late = [name for name in names if cta.written.get(name, -1) > cta.fenced]
    if late:
        raise FaultError(f"no wgmma.fence since {late[0]} was written: {describe(instruction, cta)}")


def multiply(mods, instruction, count):
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", mods[3])
    kind = mods[5]
    if mods[:3] != ["mma_async", "sync", "aligned"] or mods[4] != "f32" or mods[6] != kind or count % 128:
        return None
    n, k, size = int(shape[1]), int(shape[2]), 4 if kind == "tf32" else 2
    if k * size != 32 or kind not in ("tf32", "bf16", "f16"):
        return None
    operands, groups = instruction.operands, count // 128
    targets, from_registers = vector(operands[0]), operands[1].startswith("{")
    flags = operands[4:]  # scales of a and b, then transpositions
    if flags[:2] != ["1", "1"] or len(targets) != n // 2:
        return None
    transpositions = [flag == "1" for flag in flags[2:]] or [False, False]
    b_transposed, a_transposed = transpositions[-1], transpositions[0] and not from_registers
    lefts = [reader(text, np.uint32 if from_registers else np.uint64, count) for text in vector(operands[1])]
    right, keep = reader(operands[2], np.uint64, count), operands[3]

    def shared_operand(cta, descriptors, rows, transposed, touched):
        found = []
        for group in range(groups):
            own = descriptors[group * 128 : group * 128 + 128]
            if (own != own[0]).any():
                raise FaultError(f"different descriptors in one warpgroup: {describe(instruction, cta)}")
            at = places_of(int(own[0]), rows, k, size, transposed, SHARED_BASE)
            if (at < 0).any() or (at >= cta.shared.size).any():
                raise FaultError(
                    f"byte {at.max()} of {cta.shared.size} of shared memory: {describe(instruction, cta)}"
                )
            if cta.shared.unfenced[at].any():
                raise FaultError(f"no fence.proxy.async since it was written: {describe(instruction, cta)}")
            flat = at.reshape(-1, size)
            reads = np.full(len(flat), count)  # a thread of its own: only barriers order it
            cta.shared.touch(flat, reads, False, instruction)
            cta.shared.reading[flat] += 1
            touched.append((flat, cta.shared.bytes[flat].copy()))
            found.append(factors(cta.shared.bytes[at], kind)[..., 0])
        return np.stack(found)

    def act(cta, mask):
        cta.all_threads(mask, instruction)
        touched = []
        if from_registers:
            _fenced(cta, vector(operands[1]), instruction)
            bits = np.stack([read(cta) for read in lefts]).reshape(2, 2, groups * 4, 8, 4, 1)
            A = factors(bits, kind).transpose(2, 1, 3, 0, 4, 5).reshape(groups, 64, k)
        else:
            A = shared_operand(cta, lefts[0](cta), 64, a_transposed, touched)
        B = shared_operand(cta, right(cta), n, b_transposed, touched)
        flying = {name: value for product in _flying(cta) for name, value in product[0].items()}
        use = keep == "1" or (keep.startswith("%") and cta.registers[keep].all())
        if keep.startswith("%") and cta.registers[keep].any() != cta.registers[keep].all():
            raise FaultError(f"scale-d differs: {describe(instruction, cta)}")
        C = 0.0
        if use:
            _fenced(cta, [name for name in targets if name not in flying], instruction)
            C = np.stack([flying[name] if name in flying else cta.registers[name] for name in targets])
            # register: (columns / 8, half of rows, number); thread: (group, warp, row, pair of columns)
            C = C.view(np.float32).reshape(n // 8, 2, 2, groups, 4, 8, 4).transpose(3, 4, 1, 5, 0, 6, 2)
            C = C.reshape(groups, 64, n).astype(np.float64)
        D = (C + A @ B.transpose(0, 2, 1)).astype(np.float32)
        D = D.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, count)
        results = {name: np.ascontiguousarray(D[index]) for index, name in enumerate(targets)}
        for name in targets:
            cta.registers.pop(name, None)
        cta.products.append((results, touched))

    return act


def warpgroup(mods, instruction, count):
    if mods[0] == "mma_async":
        return multiply(mods, instruction, count)
    if mods[1:] != ["sync", "aligned"]:
        return None

    def fence(cta, mask):
        cta.all_threads(mask, instruction)
        cta.fenced = cta.executed

    def commit(cta, mask):
        cta.all_threads(mask, instruction)
        cta.product_groups.append(cta.products)
        cta.products = []

    def wait(cta, mask):
        cta.all_threads(mask, instruction)
        while len(cta.product_groups) > int(instruction.operands[0]):
            for results, touched in cta.product_groups.pop(0):
                later = {name for product in _flying(cta) for name in product[0]}
                for name, value in results.items():
                    if name not in later:
                        cta.registers[name] = value  # not `put`: no thread has written it
                for at, before in touched:
                    if not np.array_equal(cta.shared.bytes[at], before):
                        raise FaultError(f"an operand changed before {describe(instruction, cta)}")
                    cta.shared.reading[at] -= 1
                    cta.shared.touch(at, np.full(len(at), count), False, instruction)

    return {"fence": fence, "commit_group": commit, "wait_group": wait}.get(mods[0])


def fence(mods, instruction, count):
    if mods != ["proxy", "async", "shared::cta"]:
        return None

    def between_views(cta, mask):
        cta.all_threads(mask, instruction)
        cta.shared.unfenced[:] = False

    return between_views


DECODERS = {"wgmma": warpgroup, "fence": fence}
