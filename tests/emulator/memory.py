"""Global and shared memory: who may touch which byte, and whether accesses of one are ordered."""

from __future__ import annotations

import ctypes

import numpy as np

from tests.emulator.operands import SHARED_BASE
from tests.emulator.program import FaultError, Instruction, describe


class Buffer:
    """The storage of one or more tensors of a launch, and which of its bytes may be read and written."""

    def __init__(self, name: str, start: int, size: int):
        self.name, self.start, self.size = name, start, size
        memory = (ctypes.c_uint8 * max(1, size)).from_address(start) if size else (ctypes.c_uint8 * 1)()
        self.bytes = np.frombuffer(memory, np.uint8)
        self.readable, self.writable = (np.zeros(max(1, size), bool) for _ in range(2))
        self.forget()

    def forget(self):
        """Before a launch: no one has accessed it. -1: no one, -2: several."""
        self.write_cta, self.write_thread, self.read_cta, self.read_thread = (
            np.full(max(1, self.size), -1, np.int32) for _ in range(4)
        )
        self.write_epoch, self.read_epoch = (np.zeros(max(1, self.size), np.int32) for _ in range(2))


class Memory:
    """What one launch may touch."""

    def __init__(self):
        self.buffers: list[Buffer] = []
        self.released: dict[int, dict[int, int]] = {}  # address -> CTA -> its epoch at the release
        self.acquired: dict[int, dict[int, tuple]] = {}  # CTA -> other -> (its epoch, own epoch, own thread)

    def find(self, addresses, size: int, instruction: Instruction):
        """[(buffer, which of the addresses lie in it, byte indices)]."""
        if (addresses % np.uint64(size)).any():
            bad = addresses[addresses % np.uint64(size) != 0][0]
            raise FaultError(f"address {bad:#x} is not a multiple of {size}: {describe(instruction)}")
        found, rest = [], np.ones(len(addresses), bool)
        for buffer in self.buffers:
            inside = (
                rest
                & (addresses >= buffer.start)
                & (addresses + np.uint64(size) <= buffer.start + buffer.size)
            )
            if inside.any():
                offsets = (addresses[inside] - np.uint64(buffer.start)).astype(np.int64)
                found.append((buffer, inside, offsets[:, None] + np.arange(size)))
                rest &= ~inside
            if not rest.any():
                return found
        near = min(self.buffers, key=lambda b: abs(int(addresses[rest][0]) - b.start))
        distance = int(addresses[rest][0]) - near.start
        raise FaultError(
            f"{rest.sum()} threads outside all tensors, the first {distance} bytes from the start of "
            f"{near.name} ({near.size} bytes): {describe(instruction)}"
        )

    def _ordered(self, cta, others, epochs, threads):
        """Whether accesses of other CTAs (at those epochs of theirs) come before one of these threads."""
        known, good = self.acquired.get(cta.index, {}), np.ones(others.shape, bool)
        for other in np.unique(others):
            at = others == other
            if other not in known:
                good &= ~at
                continue
            its, own, own_thread = known[other]
            mine = (own < cta.epoch) | (np.broadcast_to(threads, others.shape) == own_thread)
            good &= ~at | ((epochs < its) & mine)
        return good

    def check(self, cta, buffer, at, threads, write: bool, instruction, atomic=False):
        allowed = buffer.writable if write else buffer.readable
        if not allowed[at].all():
            byte = at[~allowed[at]][0]
            kind = "written" if write else "read"
            raise FaultError(
                f"{buffer.name}: byte {byte} of {buffer.size} is {kind}, {describe(instruction, cta)}"
            )
        if atomic:
            return
        threads = threads[:, None]
        earlier = [(buffer.write_cta, buffer.write_thread, buffer.write_epoch, "written")]
        if write:
            earlier.append((buffer.read_cta, buffer.read_thread, buffer.read_epoch, "read"))
        for ctas, their_threads, epochs, kind in earlier:
            who = ctas[at]
            if (who == -1).all():
                continue
            own = who == cta.index
            race = own & (their_threads[at] != threads) & (epochs[at] >= cta.epoch)
            foreign = (who != -1) & ~own
            if foreign.any():
                race |= foreign & ~self._ordered(cta, who, epochs[at], threads)
            if race.any():
                raise FaultError(
                    f"race in {buffer.name}: byte {at[race][0]} was {kind} by CTA {who[race][0]} "
                    f"thread {their_threads[at][race][0]}, now {'written' if write else 'read'} by "
                    f"{describe(instruction, cta)}"
                )
        if write:
            buffer.write_cta[at], buffer.write_thread[at], buffer.write_epoch[at] = (
                cta.index,
                threads,
                cta.epoch,
            )
        else:
            before, again = buffer.read_cta[at], buffer.read_epoch[at] >= cta.epoch
            buffer.read_cta[at] = np.where((before == -1) | (before == cta.index), cta.index, -2)
            several = (before == cta.index) & again & (buffer.read_thread[at] != threads)
            buffer.read_thread[at] = np.where(several, -2, np.broadcast_to(threads, at.shape))
            buffer.read_epoch[at] = cta.epoch

    def load(self, cta, addresses, size: int, threads, instruction):
        data = np.empty((len(addresses), size), np.uint8)
        for buffer, which, at in self.find(addresses, size, instruction):
            self.check(cta, buffer, at, threads[which], False, instruction)
            data[which] = buffer.bytes[at]
        return data

    def store(self, cta, addresses, data, threads, instruction):
        for buffer, which, at in self.find(addresses, data.shape[1], instruction):
            self.check(cta, buffer, at, threads[which], True, instruction)
            buffer.bytes[at] = data[which]
            if not np.array_equal(buffer.bytes[at], data[which]):
                raise FaultError(
                    f"two threads store different values to one place: {describe(instruction, cta)}"
                )

    def add(self, cta, address: int, amount: int, thread: int, instruction, synchronises: bool) -> int:
        """The old value of a sum of 32 bits."""
        ((buffer, _, at),) = self.find(np.array([address], np.uint64), 4, instruction)
        self.check(cta, buffer, at, np.array([thread]), True, instruction, atomic=True)
        before = int(buffer.bytes[at[0]].view(np.uint32)[0])
        buffer.bytes[at[0]] = np.array([(before + amount) % 2**32], np.uint32).view(np.uint8)
        if synchronises:
            released = self.released.setdefault(address, {})
            mine = self.acquired.setdefault(cta.index, {})
            for other, epoch in released.items():
                if other != cta.index:
                    mine.setdefault(other, (epoch, cta.epoch, thread))
            released[cta.index] = cta.epoch  # what lies before the last barrier
            for other, (epoch, *_) in mine.items():
                released[other] = max(epoch, released.get(other, 0))
        return before


class Shared:
    """The shared memory of a CTA; who touched each byte last, and since which barrier."""

    def __init__(self, cta, size: int):
        self.cta, self.size = cta, size
        self.bytes = np.full(max(1, size), 0xFF, np.uint8)
        self.pending, self.unfenced = (np.zeros(max(1, size), bool) for _ in range(2))
        self.reading = np.zeros(max(1, size), np.int16)  # how many asynchronous products read a byte
        self.write_thread, self.read_thread = (np.full(max(1, size), -1, np.int32) for _ in range(2))
        self.write_epoch, self.write_warp_epoch, self.read_epoch, self.read_warp_epoch = (
            np.zeros(max(1, size), np.int32) for _ in range(4)
        )

    def places(self, addresses, size: int, instruction):
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if ((offsets < 0) | (offsets + size > self.size)).any():
            bad = offsets[(offsets < 0) | (offsets + size > self.size)][0]
            raise FaultError(
                f"byte {bad} of {self.size} bytes of shared memory: {describe(instruction, self.cta)}"
            )
        if (offsets % size).any():
            raise FaultError(f"shared address not a multiple of {size}: {describe(instruction, self.cta)}")
        return offsets[:, None] + np.arange(size)

    def _race(self, at, threads, who, epochs, warp_epochs):
        """Accesses by another thread since the last barrier, or by another of the warp since its last."""
        who = who[at]
        race = (who != -1) & (who != threads) & (epochs[at] == self.cta.epoch)
        if race.any():
            same_warp = (who >= 0) & (who // 32 == threads // 32)
            race &= ~(same_warp & (warp_epochs[at] < self.cta.warp_epoch[threads // 32]))
        return race

    def touch(self, at, threads, write: bool, instruction, issue=False):
        """``issue``: only the start of a copy, whose write comes later."""
        threads = np.broadcast_to(threads[:, None], at.shape)
        race, kind = self.pending[at], "being copied to"
        if write and not race.any():
            race, kind = self.reading[at] > 0, "being read by a product"
        if not race.any():
            race, kind = (
                self._race(at, threads, self.write_thread, self.write_epoch, self.write_warp_epoch),
                "written",
            )
        if write and not race.any():
            race, kind = (
                self._race(at, threads, self.read_thread, self.read_epoch, self.read_warp_epoch),
                "read",
            )
        if race.any():
            byte = at[race][0]
            raise FaultError(
                f"race in shared memory: byte {byte} was {kind} (by thread {self.write_thread[byte]} / "
                f"{self.read_thread[byte]}), now {'written' if write else 'read'} by "
                f"thread {threads[race][0]}: {describe(instruction, self.cta)}"
            )
        if issue:
            self.pending[at] = True
        elif write:
            self.unfenced[at] = True  # for the tensor cores' own view of shared memory, from Hopper on
            self.write_thread[at], self.write_epoch[at] = threads, self.cta.epoch
            self.write_warp_epoch[at] = self.cta.warp_epoch[threads // 32]
        else:
            again = (self.read_epoch[at] == self.cta.epoch) & (self.read_thread[at] != -1)
            several = again & (self.read_thread[at] != threads)
            self.read_thread[at] = np.where(several, -2, threads)
            self.read_epoch[at] = self.cta.epoch
            self.read_warp_epoch[at] = self.cta.warp_epoch[threads // 32]

    def load(self, addresses, size, threads, instruction):
        at = self.places(addresses, size, instruction)
        self.touch(at, threads, False, instruction)
        return self.bytes[at]

    def store(self, addresses, data, threads, instruction):
        at = self.places(addresses, data.shape[1], instruction)
        self.touch(at, threads, True, instruction)
        self.bytes[at] = data
        if not np.array_equal(self.bytes[at], data):
            raise FaultError(
                f"two threads store different values to one place: {describe(instruction, self.cta)}"
            )
