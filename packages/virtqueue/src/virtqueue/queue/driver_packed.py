"""The driver's side of a packed ring (virtio 2.8): what `DriverQueue` asks of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..config import RingConfig
from ..engine.python.packed import (
    AVAIL,
    EVENT_DESCRIPTOR,
    EVENT_DISABLE,
    EVENT_ENABLE,
    USED,
    available_flags,
    used_flags,
)
from ..engine.python.split import needs_event
from ..engine.python.walk import NEXT, WRITABLE
from ..memory import access, barrier
from ..memory.table import Table
from .offered import Offered, take_used


class DriverPackedRing:
    """Descriptors are written in ring order; the device writes used ones over them."""

    def __init__(self, config: RingConfig, hosts: Sequence[int], table: Table) -> None:
        size = config.size
        self._size = size
        self._event_idx = config.event_idx
        self._in_order = config.in_order
        self._bytes: Any = access.octets(table, hosts[0], 16 * size)
        self._words: Any = access.words16(table, hosts[0], 8 * size, flags=True)
        self._lengths: Any = access.words32(table, hosts[0], 4 * size)
        self._driver_event: Any = access.words32(table, hosts[1], 1)
        self._device_event: Any = access.words32(table, hosts[2], 1)
        self._identities = deque(range(size))
        self._slot = 0
        self._wrap = 1
        self._used_slot = 0
        self._used_wrap = 1
        self._free_slots = size
        self._withheld: tuple[int, int] | None = None
        """The first chain's slot and flags: storing them exposes all that follows."""
        self._added = 0
        self.offered: dict[int, Offered] = {}

    @property
    def free(self) -> int:
        return self._free_slots

    def next_identity(self) -> int:
        return self._identities[0]

    def table(self, descriptors: list[tuple[int, int, int]]) -> bytes:
        return b"".join(
            address.to_bytes(8, "little")
            + length.to_bytes(4, "little")
            + bytes(2)
            + flags.to_bytes(2, "little")
            for address, length, flags in descriptors
        )

    def add(self, descriptors: list[tuple[int, int, int]], writable: int) -> int:
        identity = self._identities.popleft()
        slots: list[int] = []
        first_flags = 0
        for number, (address, length, flags) in enumerate(descriptors):
            if number + 1 < len(descriptors):
                flags |= NEXT
            flags |= available_flags(self._wrap)
            start = 16 * self._slot
            self._bytes[start : start + 14] = (
                address.to_bytes(8, "little")
                + length.to_bytes(4, "little")
                + identity.to_bytes(2, "little")
            )
            if number:
                self._words[8 * self._slot + 7] = flags
            else:
                first_flags = flags
            slots.append(self._slot)
            self._slot += 1
            if self._slot == self._size:
                self._slot, self._wrap = 0, self._wrap ^ 1
        if self._withheld is None:
            self._withheld = (slots[0], first_flags)
        else:
            self._words[8 * slots[0] + 7] = first_flags
        self._free_slots -= len(slots)
        self._added += len(slots)
        self.offered[identity] = Offered(identity, tuple(slots), writable)
        return identity

    def publish(self) -> bool:
        if self._withheld is None:
            return False
        slot, flags = self._withheld
        # Partner: the device's barrier between loading these flags and the rest of the chain.
        barrier.order()
        self._words[8 * slot + 7] = flags
        added, self._added, self._withheld = self._added, 0, None
        # Partner: the device stores its event structure, passes a full barrier and loads the
        # flags of its next descriptor again.
        barrier.full_barrier()
        event = self._device_event[0]
        mode = event >> 16 & 3
        if mode == EVENT_DISABLE:
            return False
        if mode != EVENT_DESCRIPTOR or not self._event_idx:
            return True
        offset = event & 0x7FFF
        if event >> 15 & 1 != self._wrap:
            offset -= self._size
        return needs_event(offset, self._slot, self._slot - added)

    def _next_is_used(self) -> bool:
        flags: int = self._words[8 * self._used_slot + 7]
        if not self.offered or self._used_slot == (self._withheld or (-1, 0))[0]:
            return False
        return flags & (AVAIL | USED) == used_flags(self._used_wrap)

    def collect(self, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while len(found) < limit and self._next_is_used():
            slot = self._used_slot
            # Partner: the device's barrier between storing id, len and buffers and these flags.
            barrier.order()
            head, flags = self._words[8 * slot + 6], self._words[8 * slot + 7]
            written = self._lengths[4 * slot + 2] if flags & WRITABLE else 0
            for used, length in take_used(self.offered, head, written, self._in_order):
                self._identities.append(used.identity)
                found.append((used.identity, length))
                self._free_slots += len(used.slots)
                self._used_slot += len(used.slots)
                if self._used_slot >= self._size:
                    self._used_slot -= self._size
                    self._used_wrap ^= 1
        return found

    def enable(self) -> bool:
        if self._event_idx:
            position = self._used_slot | self._used_wrap << 15
            self._driver_event[0] = EVENT_DESCRIPTOR << 16 | position
        else:
            self._driver_event[0] = EVENT_ENABLE << 16
        # Partner: the device's barrier between storing used flags and loading this structure.
        barrier.full_barrier()
        return self._next_is_used()

    def disable(self) -> None:
        self._driver_event[0] = EVENT_DISABLE << 16
