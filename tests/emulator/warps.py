"""Instructions of whole warps: products of sm_80, matrices to and from shared memory, shuffles, barriers."""

from __future__ import annotations

import numpy as np

from tests.emulator.arithmetic import factors
from tests.emulator.operands import address_of, dtype_of, reader, vector
from tests.emulator.program import FaultError, describe


def _of_matrices(mods) -> tuple[int, bool] | None:
    """How many of 8 x 8 numbers of 16 bits each, and whether transposed, of ldmatrix and stmatrix."""
    if mods[:3] != ["sync", "aligned", "m8n8"] or mods[-2:] != ["shared", "b16"]:
        return None
    return (int(mods[3][1:]), bool(mods[4:-2])) if mods[4:-2] in ([], ["trans"]) else None


def _that_point(cta, mask, instruction, number):
    """The warps that execute it, and the threads of theirs that have the address of a row."""
    warps = cta.warps(mask, instruction)
    return warps, (warps[:, None] * 32 + np.arange(8 * number)).reshape(-1)


def matrices(mods, instruction, count):
    """ldmatrix: a row per address."""
    form = _of_matrices(mods)
    if form is None:
        return None
    number, transposed = form
    targets = vector(instruction.operands[0])
    read = address_of(instruction.operands[1], np.uint32, count)

    def act(cta, mask):
        warps, lanes = _that_point(cta, mask, instruction, number)
        rows = cta.shared.load(read(cta)[lanes], 16, lanes, instruction)
        tiles = np.ascontiguousarray(rows).view(np.uint16).reshape(len(warps), number, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        pairs = np.ascontiguousarray(tiles).view(np.uint32).reshape(len(warps), number, 32)
        for index, target in enumerate(targets):
            values = np.zeros((count // 32, 32), np.uint32)
            values[warps] = pairs[:, index]
            cta.put(target, values.reshape(-1), mask)

    return act


def product(mods, instruction, count):
    """mma.sync m16n8k16 of bf16 or fp16, m16n8k8 of TF32; fp32 accumulators."""
    if mods[:2] != ["sync", "aligned"] or mods[3:5] != ["row", "col"] or mods[5] != "f32" or mods[8] != "f32":
        return None
    shape, kind = mods[2], mods[6]
    if mods[7] != kind or (shape, kind) not in (
        ("m16n8k16", "bf16"),
        ("m16n8k16", "f16"),
        ("m16n8k8", "tf32"),
    ):
        return None
    d, a, b, c = (vector(operand) for operand in instruction.operands)
    if (len(d), len(a), len(b), len(c)) != (4, 4, 2, 4):
        return None
    reads = [[reader(text, np.uint32, count) for text in texts] for texts in (a, b, c)]
    warps = count // 32

    def numbers(registers):
        """(register, warp, group, thread in group, number) in fp64."""
        return factors(np.stack(registers).reshape(len(registers), warps, 8, 4, 1), kind)

    def act(cta, mask):
        cta.warps(mask, instruction)
        left, right, acc = ([read(cta) for read in group] for group in reads)
        left, right = numbers(left), numbers(right)
        k = 8 * left.shape[-1]
        # registers of a: (half of k, half of rows); of b: (half of k)
        A = left.reshape(2, 2, warps, 8, 4, -1).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, k)
        B = right.reshape(2, warps, 8, 4, -1).transpose(1, 0, 3, 4, 2).reshape(warps, k, 8)
        C = np.stack(acc).view(np.float32).reshape(2, 2, warps, 8, 4)
        C = C.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        D = (C.astype(np.float64) + A @ B).astype(np.float32)
        D = D.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, count)
        for index, target in enumerate(d):
            cta.put(target, np.ascontiguousarray(D[index]), mask)

    return act


def shuffle(mods, instruction, count):
    """shfl.sync of a whole warp: from the lane of a number (idx), or from the other of a pair (bfly)."""
    target, source, place, clamp, members = instruction.operands
    if mods not in (["sync", "idx", "b32"], ["sync", "bfly", "b32"]) or clamp != "31" or members != "-1":
        return None
    is_pair = mods[1] == "bfly"
    value, lane = reader(source, np.uint32, count), reader(place, np.uint32, count)

    def act(cta, mask):
        cta.warps(mask, instruction)
        lanes = (cta.threads % 32 ^ lane(cta)) if is_pair else lane(cta) % 32
        cta.put(target, value(cta)[cta.threads // 32 * 32 + lanes], mask)

    return act


def reduce_warp(mods, instruction, count):
    reductions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    if len(mods) != 3 or mods[0] != "sync" or mods[1] not in reductions or mods[2] not in ("s32", "u32"):
        return None
    value = reader(instruction.operands[1], dtype_of(mods[2]), count)
    members = reader(instruction.operands[2], np.uint32, count)

    def act(cta, mask):
        cta.warps(mask, instruction)
        if (members(cta) != np.uint32(0xFFFFFFFF)).any():
            raise FaultError(f"by some threads of a warp: {describe(instruction, cta)}")
        results = reductions[mods[1]].reduce(value(cta).reshape(-1, 32), axis=1, dtype=dtype_of(mods[2]))
        cta.put(instruction.operands[0], np.repeat(results, 32), mask)

    return act


def barrier(mods, instruction, count):
    if mods == ["sync"] and instruction.operands in (["0"], ["0x0"]):

        def wait(cta, mask):
            cta.all_threads(mask, instruction)
            cta.epoch += 1

        return wait
    if mods == ["warp", "sync"] and instruction.operands in (["-1"], ["0xffffffff"]):

        def wait_warp(cta, mask):
            cta.warp_epoch[cta.warps(mask, instruction)] += 1

        return wait_warp
    return None


def store_matrices(mods, instruction, count):
    form = _of_matrices(mods)
    if form is None:
        return None
    number, transposed = form
    read = address_of(instruction.operands[0], np.uint32, count)
    sources = [reader(text, np.uint32, count) for text in vector(instruction.operands[1])]

    def act(cta, mask):
        warps, lanes = _that_point(cta, mask, instruction, number)
        pairs = np.stack([source(cta).reshape(-1, 32)[warps] for source in sources], 1)
        tiles = np.ascontiguousarray(pairs).view(np.uint16).reshape(len(warps), number, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        rows = np.ascontiguousarray(tiles).view(np.uint8).reshape(len(lanes), 16)
        cta.shared.store(read(cta)[lanes], rows, lanes, instruction)

    return act


DECODERS = {
    "ldmatrix": matrices, "stmatrix": store_matrices, "mma": product, "shfl": shuffle, "redux": reduce_warp,
    "bar": barrier,
}  # fmt: skip
