"""What sm_90 adds for tensor descriptors: tensormaps, the copy engine, and the barriers that count its bytes.

A copy to shared memory is made when its barrier is waited for, one from there when its group is: in between
no one may write the bytes (or, of those being copied to, read them). Only the forms that Triton generates for
a kernel that makes its own descriptors: two dimensions, one CTA, waits by all threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.emulator.operands import SHARED_BASE, UNSIGNED, address_of, reader, vector
from tests.emulator.program import FaultError, describe, split_operands

SIZES = {6: 2, 7: 4, 10: 2}  # the element types fp16, fp32, bf16 of a tensormap -> bytes
MAP_BYTES = 128


@dataclass
class Tensormap:
    """A matrix in global memory and the box that a copy moves; (inner, outer) dimension each."""

    address: int
    shape: tuple[int, int]
    stride: int  # bytes
    box: tuple[int, int]
    size: int  # bytes of a number
    swizzle: int

    def __post_init__(self):
        if self.address % 16 or self.stride % 16:
            raise FaultError(f"a descriptor of rows that are not aligned to 16 bytes: {self}")
        if max(self.box) > 256 or self.box[0] * self.size != 16 << self.swizzle:
            raise FaultError(f"a box whose rows are not as long as those of its layout: {self}")

    @classmethod
    def of(cls, fields: dict) -> Tensormap:
        def pair(name):
            return fields[name, 0], fields[name, 1]

        if fields["rank", 0] != 1 or pair("element_stride") != (1, 1):
            raise FaultError(f"an unknown kind of descriptor: {fields}")
        size, swizzle = SIZES[fields["elemtype", 0]], fields["swizzle_mode", 0]
        stride = fields["global_stride", 0]
        return cls(fields["global_address", 0], pair("global_dim"), stride, pair("box_dim"), size, swizzle)

    def numbers(self, corner: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(addresses of the box's numbers, which of them the matrix has), each (rows, columns)."""
        columns, rows = (np.arange(size) + start for size, start in zip(self.box, corner, strict=True))
        addresses = self.address + rows[:, None] * self.stride + columns * self.size
        inside = ((rows >= 0) & (rows < self.shape[1]))[:, None] & (columns >= 0) & (columns < self.shape[0])
        return addresses.astype(np.uint64), inside

    def places(self, start: int) -> np.ndarray:
        """Bytes in shared memory, (rows, columns, size)."""
        width = 16 << self.swizzle
        columns, rows = (np.arange(size) for size in self.box)
        address = start + rows[:, None] * width + columns * self.size
        address ^= (address >> 7 & (width // 16 - 1)) << 4
        return (address - SHARED_BASE)[..., None] + np.arange(self.size)


@dataclass
class Barrier:
    count: int
    arrivals: int  # that are left in this phase
    bytes: int = 0  # that are expected and not yet copied
    phase: int = 0
    copies: list = field(default_factory=list)


class Engine:
    """The copies of one CTA, and what they depend on."""

    def __init__(self, cta):
        self.cta = cta
        self.fields: dict[int, dict] = {}  # shared address -> what a tensormap there has
        self.maps: dict[int, Tensormap] = {}  # global address -> one that may be used
        self.barriers: dict[int, Barrier] = {}
        self.stores: list[list] = []  # [is committed, thread, …]

    def touch(self, address: int, size: int, threads, write: bool, instruction):
        threads = np.atleast_1d(threads)
        at = self.cta.shared.places(np.full(len(threads), address), size, instruction)
        self.cta.shared.touch(at, threads, write, instruction)

    def barrier(self, address: int, threads, instruction) -> Barrier:
        if address not in self.barriers:
            raise FaultError(f"no barrier at {address - SHARED_BASE}: {describe(instruction, self.cta)}")
        self.touch(address, 8, threads, False, instruction)
        return self.barriers[address]

    def tile(self, descriptor: int, start: int, instruction) -> tuple[Tensormap, np.ndarray]:
        """A tensormap and the bytes of its box in shared memory, (numbers, size)."""
        if descriptor not in self.maps:
            raise FaultError(f"a descriptor without an acquiring fence: {describe(instruction, self.cta)}")
        found, shared = self.maps[descriptor], self.cta.shared
        at = found.places(start).reshape(-1, found.size)
        if start % 128 or at.min() < 0 or at.max() >= shared.size:
            raise FaultError(
                f"a box at byte {start - SHARED_BASE} of {shared.size}: {describe(instruction, self.cta)}"
            )
        if shared.unfenced[at].any():
            raise FaultError(f"no fence.proxy.async since it was written: {describe(instruction, self.cta)}")
        return found, at

    def load(self, thread, start, descriptor, corner, barrier, instruction):
        found, at = self.tile(descriptor, start, instruction)
        waited = self.barrier(barrier, thread, instruction)
        self.cta.shared.touch(at, np.full(len(at), thread), True, instruction, issue=True)
        waited.copies.append((thread, found, corner, at, instruction))

    def store(self, thread, start, descriptor, corner, instruction):
        found, at = self.tile(descriptor, start, instruction)
        shared = self.cta.shared
        shared.touch(at, np.full(len(at), thread), False, instruction)
        shared.reading[at] += 1
        self.stores.append([False, thread, found, corner, at, instruction])

    def arrived(self, barrier: Barrier):
        for thread, found, corner, at, instruction in barrier.copies:
            addresses, inside = found.numbers(corner)
            data, wanted = np.zeros((*inside.shape, found.size), np.uint8), addresses[inside]
            threads = np.full(len(wanted), thread)
            data[inside] = self.cta.memory.load(self.cta, wanted, found.size, threads, instruction)
            shared = self.cta.shared
            shared.bytes[at], shared.pending[at] = data.reshape(at.shape), False
            shared.write_thread[at] = -1  # all threads wait for it
            barrier.bytes -= at.size
        barrier.copies.clear()
        if not barrier.arrivals and not barrier.bytes:
            barrier.phase, barrier.arrivals = barrier.phase + 1, barrier.count

    def stored(self, lanes):
        for _, thread, found, corner, at, instruction in (s for s in self.stores if s[0] and s[1] in lanes):
            addresses, inside = found.numbers(corner)
            data = self.cta.shared.bytes[at].reshape(*inside.shape, found.size)[inside]
            threads = np.full(len(data), thread)
            self.cta.memory.store(self.cta, addresses[inside], data, threads, instruction)
            self.cta.shared.reading[at] -= 1
            self.cta.shared.touch(at, np.full(len(at), thread), False, instruction)
        self.stores = [s for s in self.stores if not (s[0] and s[1] in lanes)]

    def end(self):
        rest = [*(s[-1] for s in self.stores), *(c[-1] for b in self.barriers.values() for c in b.copies)]
        if rest:
            raise FaultError(f"the program ends before a copy does: {describe(rest[0], self.cta)}")


# instructions --------------------------------------------------------------------------------------


def bulk(mods, instruction, count):
    """cp.async.bulk: copies by tensormaps, and their groups."""
    form, operands = ".".join(mods[2:]), instruction.operands
    if form == "commit_group":

        def commit(cta, mask):
            for store in cta.engine.stores:
                store[0] |= store[1] in cta.lanes(mask)

        return commit
    if form in ("wait_group", "wait_group.read") and operands == ["0"]:
        return lambda cta, mask: cta.engine.stored(cta.lanes(mask))
    if form == "tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes":
        shared, tile, extra = operands
    elif form == "tensor.2d.global.shared::cta.bulk_group":
        (tile, shared), extra = operands, None
    else:
        return None
    descriptor, corner = split_operands(tile.strip("[]"))
    reads = [address_of(shared, np.uint32, count), address_of(descriptor, np.uint64, count)]
    corners = [reader(text, np.int32, count) for text in vector(corner)]
    barrier = extra and address_of(extra, np.uint32, count)

    def copy(cta, mask):
        for thread in cta.lanes(mask):
            start, where = (int(read(cta)[thread]) for read in reads)
            at = tuple(int(read(cta)[thread]) for read in corners)
            if barrier:
                cta.engine.load(thread, start, where, at, int(barrier(cta)[thread]), instruction)
            else:
                cta.engine.store(thread, start, where, at, instruction)

    return copy


def tensormap(mods, instruction, count):
    operands = instruction.operands
    first = address_of(operands[0], np.uint64, count)
    if mods[:2] == ["replace", "tile"]:
        name, kind, index = mods[2], UNSIGNED[int(mods[-1][1:])], int(operands[1], 0) if operands[2:] else 0
        value = reader(operands[-1], kind, count)

        def replace(cta, mask):
            for thread in cta.lanes(mask):
                address = int(first(cta)[thread])
                cta.engine.touch(address, MAP_BYTES, thread, True, instruction)
                cta.engine.fields.setdefault(address, {})[name, index] = int(value(cta)[thread])

        return replace
    if mods[:1] != ["cp_fenceproxy"] or operands[2] != "0x80":
        return None
    second = address_of(operands[1], np.uint64, count)

    def publish(cta, mask):
        for warp in cta.warps(mask, instruction):
            thread = 32 * warp + 31
            target, source = (int(read(cta)[thread]) for read in (first, second))
            cta.engine.touch(source, MAP_BYTES, thread, False, instruction)
            made = Tensormap.of(cta.engine.fields.pop(source))
            zeros, threads = np.zeros((1, MAP_BYTES), np.uint8), np.array([thread])
            cta.memory.store(cta, np.array([target], np.uint64), zeros, threads, instruction)
            cta.memory.tensormaps[target] = made

    return publish


def fence(mods, instruction, count):
    if mods == ["proxy", "async", "shared::cta"]:

        def between_views(cta, mask):
            cta.all_threads(mask, instruction)
            cta.shared.unfenced[:] = False

        return between_views
    if mods != ["proxy", "tensormap::generic", "acquire", "gpu"]:
        return None
    read = address_of(instruction.operands[0], np.uint64, count)

    def acquire(cta, mask):
        for address in np.unique(read(cta)[cta.lanes(mask)]).tolist():
            cta.engine.maps[address] = cta.memory.tensormaps[address]

    return acquire


def mbarrier(mods, instruction, count):
    operands, form = instruction.operands, ".".join(mods)
    expects = form == "arrive.expect_tx.shared::cta.b64" and operands[0] == "_"
    read = address_of(operands[int(expects)], np.uint32, count)
    value = reader(operands[-1], np.uint32, count) if operands[int(expects) + 1 :] else None

    def each(act):
        def acts(cta, mask):
            for thread in cta.lanes(mask):
                act(cta, int(read(cta)[thread]), thread, value and int(value(cta)[thread]))

        return acts

    def init(cta, address, thread, arrivals):
        cta.engine.touch(address, 8, thread, True, instruction)
        cta.engine.barriers[address] = Barrier(arrivals, arrivals)

    def invalidate(cta, address, thread, _):
        cta.engine.touch(address, 8, thread, True, instruction)
        del cta.engine.barriers[address]

    def expect(cta, address, thread, size):
        barrier = cta.engine.barrier(address, thread, instruction)
        barrier.arrivals, barrier.bytes = barrier.arrivals - 1, barrier.bytes + size

    def wait(cta, mask):
        cta.all_threads(mask, instruction)
        for address in np.unique(read(cta)).tolist():
            barrier = cta.engine.barrier(address, cta.threads, instruction)
            cta.engine.arrived(barrier)
            if (value(cta) == barrier.phase % 2).any():
                raise FaultError(f"waits forever: {describe(instruction, cta)}")

    forms = {"init.shared::cta.b64": each(init), "inval.shared::cta.b64": each(invalidate)}
    forms["try_wait.parity.shared::cta.b64"] = wait
    return each(expect) if expects else forms.get(form)


def elect(mods, instruction, count):
    register, predicate = instruction.operands[0].split("|")
    if mods != ["sync"] or instruction.operands[1:] != ["-1"]:
        return None

    def first(cta, mask):
        cta.warps(mask, instruction)
        cta.put(register, np.zeros(count, np.uint32), mask)
        cta.put(predicate, cta.threads % 32 == 0, mask)

    return first


DECODERS = {"tensormap": tensormap, "fence": fence, "mbarrier": mbarrier, "elect": elect}
