"""The device's side of a packed ring (virtio 2.8)."""

from __future__ import annotations

from collections import deque
from typing import Any, Final, NamedTuple

from ...layout import QueueBlock, Reason
from ...memory import access, barrier
from ...memory.table import Broken, Memory
from .inflight_memory import unguarded_poison
from .packed_inflight import PackedInflight
from .ring import RingEngine
from .split import needs_event
from .taken import Taken
from .walk import INDIRECT, NEXT, WRITABLE, Descriptor

AVAIL: Final = 1 << 7
USED: Final = 1 << 15
EVENT_ENABLE: Final = 0
EVENT_DISABLE: Final = 1
EVENT_DESCRIPTOR: Final = 2


class Resubmission(NamedTuple):
    """A chain of the in-flight region."""

    entry: int
    descriptors: list[Descriptor]


def available_flags(wrap: int) -> int:
    """AVAIL and USED of an available descriptor under a wrap counter."""
    return AVAIL if wrap else USED


def used_flags(wrap: int) -> int:
    """AVAIL and USED of a used descriptor under a wrap counter."""
    return AVAIL | USED if wrap else 0


class PackedEngine(RingEngine):
    """A packed ring."""

    def __init__(self, block: QueueBlock, memory: Memory) -> None:
        super().__init__(block, memory)
        self._resubmit: deque[Resubmission] = deque()
        self._inflight: PackedInflight | None = None
        self._load: Any = None
        self._words: Any = None
        self._lengths: Any = None
        self._driver_event: Any = None
        self._device_event: Any = None

    def _map_ring(self) -> None:
        block, size, table = self._block, self._size, self._walk.table
        self._load = access.descriptors(table, block.descriptors, size, self._walk.descriptor)
        # addr: words 0 to 3, len: 4 and 5, id: 6, flags: 7
        self._words = access.words16(table, block.descriptors, 8 * size, flags=True)
        self._lengths = access.words32(table, block.descriptors, 4 * size)
        # desc_event_off and wrap, then flags, loaded and stored together
        self._driver_event = access.words32(table, block.driver, 1)
        self._device_event = access.words32(table, block.device, 1)

    def _flags_at(self, slot: int) -> int:
        flags: int = self._words[8 * slot + 7]
        return flags

    def recover(self) -> int:
        block = self._block
        try:
            inflight = PackedInflight(
                block.inflight, block.inflight_size, self._size, unguarded_poison(block)
            )
            position, chains = inflight.recover(block.next_used, block.used_wrap, self._flags_at)
            self._check_records()
        except Broken as error:
            self._break(error)
            return -1
        self._inflight = inflight
        if position is not None:
            block.next_avail, block.avail_wrap, block.next_used, block.used_wrap = position
        for entry, descriptors in chains:
            self._resubmit.append(Resubmission(entry, descriptors))
            # They cover their slots of the ring from before the restart on.
            self._slots_out += len(descriptors)
        block.resubmit = len(chains)
        return len(chains)

    def _peek(self) -> bool:
        block = self._block
        if self._slots_out >= self._size:
            # Every slot is covered by a chain in flight: none can be available.
            return False
        flags = self._words[8 * block.next_avail + 7]
        return bool(flags & (AVAIL | USED) == available_flags(block.avail_wrap))

    def _load_available(self) -> int:
        if not self._peek():
            return 0
        # Partner: the driver's barrier between filling the descriptors of a chain and storing
        # the flags of the first (virtio 2.8.21.1).  We load the rest after these flags.
        barrier.order()
        return 1

    def _fetch(self) -> tuple[int, int, list[tuple[int, int, bool]], Any]:
        raw = self._resubmit[0].descriptors if self._resubmit else self._read_chain()
        head = raw[-1][2]
        if head >= self._size:
            raise Broken(Reason.HEAD_OUT_OF_RANGE, head)
        if head in self._taken:
            raise Broken(Reason.HEAD_IN_FLIGHT, head)
        address, length, _, flags = raw[0]
        if flags & INDIRECT:
            # Only WRITE counts in an indirect table, and its descriptors follow each other.
            chain = [
                (start, size, bool(kind & WRITABLE))
                for start, size, _, kind in self._walk.indirect_table(address, length)
            ]
        else:
            chain = [(start, size, bool(kind & WRITABLE)) for start, size, _, kind in raw]
        return head, len(raw), chain, raw

    def _read_chain(self) -> list[Descriptor]:
        block = self._block
        slot, wrap = block.next_avail, block.avail_wrap
        room = self._size - self._slots_out
        chain: list[Descriptor] = []
        while True:
            descriptor = self._load(slot)
            flags = descriptor[3]
            if flags & (AVAIL | USED) != available_flags(wrap):
                raise Broken(Reason.UNFINISHED_CHAIN, slot)
            if flags & INDIRECT and (flags & NEXT or chain):
                raise Broken(Reason.INDIRECT_WITH_NEXT, slot)
            chain.append(descriptor)
            if not flags & NEXT:
                return chain
            if len(chain) >= room:
                raise Broken(Reason.CHAIN_TOO_LONG, slot)
            slot += 1
            if slot == self._size:
                slot, wrap = 0, wrap ^ 1

    def _move(self, slot: int, wrap: int, steps: int) -> tuple[int, int]:
        slot += steps
        if slot >= self._size:
            return slot - self._size, wrap ^ 1
        if slot < 0:
            return slot + self._size, wrap ^ 1
        return slot, wrap

    def _advance(self, taken: Taken, found: Any) -> None:
        block = self._block
        if self._resubmit:
            taken.resubmitted = self._resubmit.popleft()
            taken.entry = taken.resubmitted.entry
            self._slots_out -= taken.slots
            block.resubmit -= 1
            return
        if self._inflight is not None:
            taken.entry = self._inflight.take(found)
        block.next_avail, block.avail_wrap = self._move(
            block.next_avail, block.avail_wrap, taken.slots
        )

    def _retreat(self, taken: Taken) -> None:
        block = self._block
        if taken.resubmitted is not None:
            self._resubmit.appendleft(taken.resubmitted)
            self._slots_out += taken.slots
            block.resubmit += 1
            return
        if self._inflight is not None:
            self._inflight.give_back(taken.entry)
        block.next_avail, block.avail_wrap = self._move(
            block.next_avail, block.avail_wrap, -taken.slots
        )

    def _use(self, chains: list[Taken]) -> bool:
        block = self._block
        inflight = self._inflight
        moved = 0
        first: tuple[int, int] | None = None
        for taken in chains:
            slot, wrap = block.next_used, block.used_wrap
            following = self._move(slot, wrap, taken.slots)
            self._lengths[4 * slot + 2] = taken.written
            self._words[8 * slot + 6] = taken.head
            flags = used_flags(wrap) | (WRITABLE if taken.written else 0)
            if inflight is not None:
                inflight.using(taken.entry, *following)
                self._store_flags(slot, flags)
                barrier.order()
                inflight.used(taken.entry)
            elif first is None:
                first = (slot, flags)
            else:
                self._store_flags(slot, flags)
            block.next_used, block.used_wrap = following
            moved += taken.slots
        if first is not None:
            # The driver looks at one slot only: all of the batch appears with its first.
            self._store_flags(*first)
        # Partner: the driver stores its event structure, passes a full barrier and loads the
        # flags of its next used descriptor again.
        barrier.full_barrier()
        event = self._driver_event[0]
        mode = event >> 16 & 3
        if mode == EVENT_DISABLE:
            return False
        if mode != EVENT_DESCRIPTOR or not self._event_idx:
            return True
        if not block.signalled_valid:
            # Nothing is known of what was signalled before a restart: tell the driver once.
            block.signalled_valid = 1
            return True
        offset = event & 0x7FFF
        if event >> 15 & 1 != block.used_wrap:
            offset -= self._size
        return needs_event(offset, block.next_used, block.next_used - moved)

    def _store_flags(self, slot: int, flags: int) -> None:
        # Partner: the driver's barrier between loading these flags and id, len and buffers.
        barrier.order()
        self._words[8 * slot + 7] = flags
        self._mark_ring(16 * slot, 16)

    def _arm(self) -> int:
        block = self._block
        if block.stopped or not block.descriptors:
            return 0
        if self._event_idx:
            position = block.next_avail | block.avail_wrap << 15
            self._device_event[0] = EVENT_DESCRIPTOR << 16 | position
        else:
            self._device_event[0] = EVENT_ENABLE << 16
        # Partner: the driver's barrier between storing the flags of a chain and loading this
        # structure.  Either it sees that we want a kick or we see its chain.
        barrier.full_barrier()
        if block.resubmit or block.reason:
            return int(block.resubmit != 0)
        return int(self._peek())

    def _disarm(self) -> int:
        block = self._block
        if block.descriptors and not block.stopped:
            self._device_event[0] = EVENT_DISABLE << 16
        return 0
