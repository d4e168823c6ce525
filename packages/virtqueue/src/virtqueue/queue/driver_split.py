"""The driver's side of a split ring (virtio 2.7): what `DriverQueue` asks of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from ..config import RingConfig
from ..engine.python.split import NO_INTERRUPT, NO_NOTIFY, needs_event
from ..engine.python.walk import NEXT
from ..errors import QueueBroken
from ..layout import Reason
from ..memory import access, barrier
from ..memory.table import Broken, Table
from .offered import Offered, take_used


class DriverSplitRing:
    """The descriptor table and the available ring are written, the used ring is read."""

    def __init__(self, config: RingConfig, hosts: Sequence[int], table: Table) -> None:
        size, big = config.size, config.big_endian
        self._size = size
        self._mask = size - 1
        self._order: Final[Any] = "big" if big else "little"
        self._event_idx = config.event_idx
        self._in_order = config.in_order
        self._bytes: Any = access.octets(table, hosts[0], 16 * size)
        self._avail: Any = access.words16(table, hosts[1], 3 + size, big)
        if hosts[1] % 4 and isinstance(self._avail, access.KernelWords):
            raise Broken(Reason.RING_MEMORY, hosts[1])
        self._used: Any = access.words16(table, hosts[2], 3 + 4 * size, big)
        self._elements: Any = access.words32(table, hosts[2] + 4, 2 * size, big)
        self._free = deque(range(size))
        self._index = 0
        self._published = 0
        self._last_used = 0
        self.offered: dict[int, Offered] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def next_identity(self) -> int:
        return self._free[0]

    def _pack(self, address: int, length: int, flags: int, following: int) -> bytes:
        return b"".join(
            value.to_bytes(width, self._order)
            for value, width in ((address, 8), (length, 4), (flags, 2), (following, 2))
        )

    def table(self, descriptors: list[tuple[int, int, int]]) -> bytes:
        last = len(descriptors) - 1
        return b"".join(
            self._pack(address, length, flags | (NEXT if i < last else 0), i + 1 if i < last else 0)
            for i, (address, length, flags) in enumerate(descriptors)
        )

    def add(self, descriptors: list[tuple[int, int, int]], writable: int) -> int:
        # First in, first out: with IN_ORDER this is the table's own order (virtio 2.7.5).
        slots = tuple(self._free.popleft() for _ in descriptors)
        for number, (address, length, flags) in enumerate(descriptors):
            following = 0
            if number + 1 < len(slots):
                flags |= NEXT
                following = slots[number + 1]
            start = 16 * slots[number]
            self._bytes[start : start + 16] = self._pack(address, length, flags, following)
        head = slots[0]
        self._avail[2 + (self._index & self._mask)] = head
        self._index = (self._index + 1) & 0xFFFF
        self.offered[head] = Offered(head, slots, writable)
        return head

    def publish(self) -> bool:
        old, new = self._published, self._index
        if old == new:
            return False
        # Partner: the device's barrier between loading avail idx and what it covers.
        barrier.order()
        self._avail[1] = new
        self._published = new
        # Partner: the device stores avail_event (or clears NO_NOTIFY), passes a full barrier and
        # loads avail idx again.
        barrier.full_barrier()
        if self._event_idx:
            return needs_event(self._used[2 + 4 * self._size], new, old)
        return not self._used[0] & NO_NOTIFY

    def collect(self, limit: int) -> list[tuple[int, int]]:
        index = self._used[1]
        ahead = (index - self._last_used) & 0xFFFF
        if not ahead:
            return []
        if ahead > len(self.offered):
            raise QueueBroken(Reason.USED_RING, index)
        # Partner: the device's barrier between filling elements and buffers and moving idx.
        barrier.order()
        found: list[tuple[int, int]] = []
        while ahead > 0 and len(found) < limit:
            slot = self._last_used & self._mask
            head, written = self._elements[2 * slot], self._elements[2 * slot + 1]
            batch = take_used(self.offered, head, written, self._in_order)
            for used, length in batch:
                self._free.extend(used.slots)
                found.append((used.identity, length))
            self._last_used = (self._last_used + len(batch)) & 0xFFFF
            ahead -= len(batch)
        if ahead < 0:
            raise QueueBroken(Reason.USED_RING, index)
        return found

    def enable(self) -> bool:
        if self._event_idx:
            self._avail[2 + self._size] = self._last_used
        else:
            self._avail[0] = 0
        # Partner: the device's barrier between moving used idx and loading used_event.
        barrier.full_barrier()
        return bool(self._used[1] != self._last_used)

    def disable(self) -> None:
        if self._event_idx:
            # An event that has just passed comes round after 65535 more.
            self._avail[2 + self._size] = (self._last_used - 1) & 0xFFFF
        else:
            self._avail[0] = NO_INTERRUPT
