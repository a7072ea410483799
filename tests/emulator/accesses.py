"""Loads, stores, atomics, and the copies of cp.async."""

from __future__ import annotations

import re

import numpy as np

from tests.emulator.operands import UNSIGNED, address_of, bits_of, dtype_of, reader, vector
from tests.emulator.program import FaultError, describe

ADDRESSES = {"global": np.uint64, "shared": np.uint32}


def access(mods) -> tuple[str, int, str] | None:
    """(space, count of numbers, kind) of a load's or store's modifiers."""
    mods = [m for m in mods if m != "cg"]  # which cache: a hint
    space, kind = mods[0].split("::")[0], mods[-1]
    numbers = int(mods[1][1:]) if len(mods) == 3 and re.fullmatch(r"v[248]", mods[1]) else 1
    if len(mods) != 2 + (numbers > 1) or space not in ("global", "shared", "param"):
        return None
    return space, numbers, kind


def load(mods, instruction, count):
    form = access(mods)
    if form is None:
        return None
    space, numbers, kind = form
    targets, bits = vector(instruction.operands[0]), bits_of(kind)
    if space == "param":
        name, dtype = instruction.operands[1].strip("[]"), dtype_of(kind)

        def from_param(cta, mask):
            value, have = cta.params[name]
            if have != bits:
                raise FaultError(f"a parameter of {have} bits: {describe(instruction)}")
            values = np.full(count, value, UNSIGNED[bits]).view(dtype)
            if kind[0] == "s" and targets[0].startswith("%rd"):
                values = values.astype(np.int64)
            cta.put(targets[0], values, mask)

        return from_param
    if len(targets) != numbers or kind[0] == "s":
        return None
    size, dtype = bits // 8 * numbers, UNSIGNED[bits]
    read = address_of(instruction.operands[1], ADDRESSES[space], count)

    def act(cta, mask):
        lanes = cta.lanes(mask)
        if not len(lanes):
            return
        addresses = read(cta)[lanes]
        if space == "global":
            data = cta.memory.load(cta, addresses, size, lanes, instruction)
        else:
            data = cta.shared.load(addresses, size, lanes, instruction)
        values = np.zeros((count, numbers), dtype)
        values[lanes] = np.ascontiguousarray(data).view(dtype)
        for index, target in enumerate(targets):
            cta.put(target, values[:, index].copy(), mask)

    return act


def store(mods, instruction, count):
    form = access(mods)
    if form is None or form[0] == "param":
        return None
    space, numbers, kind = form
    sources, bits = vector(instruction.operands[1]), bits_of(kind)
    if len(sources) != numbers:
        return None
    dtype = UNSIGNED[bits]
    reads = [reader(source, dtype, count) for source in sources]
    read = address_of(instruction.operands[0], ADDRESSES[space], count)

    def act(cta, mask):
        lanes = cta.lanes(mask)
        if not len(lanes):
            return
        data = np.stack([value(cta)[lanes] for value in reads], 1).view(np.uint8)
        if space == "global":
            cta.memory.store(cta, read(cta)[lanes], data, lanes, instruction)
        else:
            cta.shared.store(read(cta)[lanes], data, lanes, instruction)

    return act


def atomic(mods, instruction, count):
    """atom.global.gpu.acq_rel.add.u32, or relaxed."""
    if mods[:2] != ["global", "gpu"] or mods[2] not in ("acq_rel", "relaxed") or mods[3:] != ["add", "u32"]:
        return None
    target, place, amount = instruction.operands
    read, value = address_of(place, np.uint64, count), reader(amount, np.uint32, count)

    def act(cta, mask):
        addresses, amounts, old = read(cta), value(cta), np.zeros(count, np.uint32)
        for thread in cta.lanes(mask):
            address, amount = int(addresses[thread]), int(amounts[thread])
            old[thread] = cta.memory.add(
                cta, address, amount, int(thread), instruction, synchronises=mods[2] == "acq_rel"
            )
        cta.put(target, old, mask)

    return act


def asynchronous(mods, instruction, count):
    """cp.async: the copy is made when it is waited for."""
    if mods == ["async", "commit_group"]:

        def commit(cta, mask):
            cta.all_threads(mask, instruction)
            cta.groups.append(cta.uncommitted)
            cta.uncommitted = []

        return commit
    if mods == ["async", "wait_group"]:
        left = int(instruction.operands[0], 0)

        def wait(cta, mask):
            cta.all_threads(mask, instruction)
            while len(cta.groups) > left:
                for target, size, source, used, lanes, own in cta.groups.pop(0):
                    at = cta.shared.places(target, size, own)
                    data = np.zeros((len(lanes), size), np.uint8)
                    for amount in np.unique(used[used > 0]):
                        some = used == amount
                        data[some, :amount] = cta.memory.load(
                            cta, source[some], int(amount), lanes[some], own
                        )
                    cta.shared.pending[at] = False
                    cta.shared.touch(at, lanes, True, own)
                    cta.shared.bytes[at] = data

        return wait
    sizes = {"cg": (16,), "ca": (4, 8, 16)}.get(mods[1], ())
    if mods[2:] != ["shared", "global"] or int(instruction.operands[2], 0) not in sizes:
        return None
    to, start, whole, part = instruction.operands
    size = int(whole, 0)
    target, source = address_of(to, np.uint32, count), address_of(start, np.uint64, count)
    used = reader(part, np.uint32, count)

    def copy(cta, mask):
        lanes = cta.lanes(mask)
        if not len(lanes):
            return
        to, start, amount = target(cta)[lanes], source(cta)[lanes], used(cta)[lanes].astype(np.int64)
        if ((amount != 0) & (amount != size)).any():
            raise FaultError(f"part of a copy: {describe(instruction, cta)}")
        if (amount > 0).any():  # bounds and alignment now, numbers later
            for buffer, _, at in cta.memory.find(start[amount > 0], size, instruction):
                if not buffer.readable[at].all():
                    raise FaultError(f"{buffer.name}: a byte outside is copied, {describe(instruction, cta)}")
        cta.shared.touch(cta.shared.places(to, size, instruction), lanes, True, instruction, issue=True)
        cta.uncommitted.append((to, size, start, amount, lanes, instruction))

    return copy


DECODERS = {"cp": asynchronous, "ld": load, "st": store, "atom": atomic}
