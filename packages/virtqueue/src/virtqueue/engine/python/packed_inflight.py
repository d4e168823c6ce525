"""The in-flight region of a packed ring, as the Python engine keeps it.

The stores are made in an order in which the death of the process between any two of them loses no
chain and completes none twice; each method says why its order does.  Two things differ from a
literal reading of the specification, in what is stored in one go:

* A packed ring is used one chain at a time.  In a batch the flags of later descriptors are
  written before those of the first; a death in between would leave used flags in slots that the
  rolled back index comes to again, and the driver would see them as used.
* ``old_used_idx`` and ``old_used_wrap_counter`` are committed by one 8-byte store, as are they
  compared: with a chain as long as the ring only the wrap counter tells old from new.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ...layout import Reason
from ...memory.access import KernelMemory
from ...memory.barrier import order
from ...memory.table import Broken
from ..inflight import PACKED_ENTRY, PACKED_HEADER, PackedRegion, PackedState
from .inflight_memory import (
    VERSION,
    KernelPosition,
    KernelStructure,
    KernelStructures,
    room_for,
    used_entries,
)

PackedDescriptor = tuple[int, int, int, int]
"""(address, length, id, flags)."""


class PackedInflight:
    """The region of a packed ring."""

    def __init__(self, address: int, available: int, size: int, unguarded: Any = None) -> None:
        self._room = room = room_for(size, available, PACKED_HEADER, PACKED_ENTRY)
        self._size = size
        self._entries = size
        """Entries that the free list goes through."""
        self._region: Any
        self._states: Any
        # used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter and padding in one.
        self._position: Any
        offset: int = PackedRegion.used_idx.offset  # type: ignore[attr-defined]
        if unguarded is None:
            self._region = PackedRegion.from_address(address)
            self._states = (PackedState * room).from_address(address + PACKED_HEADER)
            self._position = (ctypes.c_uint64 * 1).from_address(address + offset)
        else:
            self._region = KernelStructure(PackedRegion, KernelMemory(address, unguarded))
            states = KernelMemory(address + PACKED_HEADER, unguarded)
            self._states = KernelStructures(PackedState, states, room)
            self._position = KernelPosition(KernelMemory(address + offset, unguarded))
        self._counter = 0

    def _store_position(self, used: int, wrap: int, old_used: int, old_wrap: int) -> None:
        raw = b"".join(
            (
                used.to_bytes(2, "little"),
                old_used.to_bytes(2, "little"),
                bytes((wrap, old_wrap)),
            )
        )
        self._position[0] = int.from_bytes(raw, "little")

    def recover(
        self, used: int, wrap: int, flags_at: Any
    ) -> tuple[tuple[int, int, int, int] | None, list[tuple[int, list[PackedDescriptor]]]]:
        """((available, wrap, used, wrap) or None for a new region, entries to take again).

        ``flags_at`` loads the flags of a slot of the ring.
        """
        region, states, size = self._region, self._states, self._size
        if region.version == 0:
            for index in range(size):
                states[index].inflight = 0
                states[index].next = index + 1
            region.desc_num = size
            region.free_head = 0
            region.old_free_head = 0
            self._store_position(used, wrap, used, wrap)
            order()
            region.version = VERSION
            return None, []
        entries_count = self._entries = used_entries(region, size, self._room)
        if max(region.used_idx, region.old_used_idx) >= size:
            raise Broken(Reason.INFLIGHT, region.used_idx)
        new = (region.used_idx, region.used_wrap_counter & 1)
        old = (region.old_used_idx, region.old_used_wrap_counter & 1)
        if new != old:
            flags = flags_at(old[0])
            available = (old[1] << 7) | ((old[1] ^ 1) << 15)
            if flags & 0x8080 != available:
                # The driver has been given the chain: finish what was under way.
                old = new
                region.old_free_head = region.free_head
        # Roll back, or do nothing after the step above; the free list first, as it is only read
        # again by a recovery that comes to the same result.
        region.free_head = region.old_free_head
        self._store_position(*old, *old)
        free: set[int] = set()
        index = region.free_head
        while index < entries_count and index not in free:
            free.add(index)
            states[index].inflight = 0
            index = states[index].next
        heads = sorted(
            (states[index].counter, index)
            for index in range(entries_count)
            if states[index].inflight
        )
        self._counter = heads[-1][0] + 1 if heads else 0
        chains: list[tuple[int, list[PackedDescriptor]]] = []
        seen = set(free)
        for _, head in heads:
            entries: list[PackedDescriptor] = []
            index = head
            count = states[head].num
            for _ in range(count):
                if index >= entries_count or index in seen:
                    raise Broken(Reason.INFLIGHT, index)
                seen.add(index)
                state = states[index]
                entries.append((state.addr, state.len, state.id, state.flags))
                last = index
                index = states[index].next
            if not count or last != states[head].last:
                raise Broken(Reason.INFLIGHT, head)
            chains.append((head, entries))
        slots = sum(len(entries) for _, entries in chains)
        if slots > size:
            raise Broken(Reason.INFLIGHT, slots)
        position = old[0] + slots
        avail_wrap = old[1]
        if position >= size:
            position -= size
            avail_wrap ^= 1
        return (position, avail_wrap, old[0], old[1]), chains

    def take(self, descriptors: list[PackedDescriptor]) -> int:
        """A chain was fetched: its (address, length, id, flags) in ring order; its entry.

        Nothing of this counts before ``old_free_head`` moves: until then the entries are still
        in the free list, whose members recovery clears.
        """
        region, states = self._region, self._states
        head: int = region.old_free_head
        if head >= self._entries:
            raise Broken(Reason.INFLIGHT, head)
        state = states[head]
        state.num = 0
        state.counter = self._counter
        self._counter += 1
        order()
        state.inflight = 1
        index = head
        for number, (address, length, identity, flags) in enumerate(descriptors, 1):
            if index >= self._entries:
                raise Broken(Reason.INFLIGHT, index)
            entry = states[index]
            if number == len(descriptors):
                state.last = index
            state.num = number
            entry.addr = address
            entry.len = length
            entry.flags = flags
            entry.id = identity
            index = entry.next
            region.free_head = index
        order()
        region.old_free_head = index
        return head

    def give_back(self, head: int) -> None:
        """The latest chain was rewound: its entries become the front of the free list again."""
        region, states = self._region, self._states
        states[states[head].last].next = region.old_free_head
        region.free_head = head
        order()
        region.old_free_head = head
        states[head].inflight = 0

    def using(self, head: int, used: int, wrap: int) -> None:
        """The chain is about to be used; the ring's position will be (used, wrap)."""
        region, states = self._region, self._states
        states[states[head].last].next = region.free_head
        order()
        region.free_head = head
        order()
        self._store_position(used, wrap, region.old_used_idx, region.old_used_wrap_counter)

    def used(self, head: int) -> None:
        """The flags have been written.

        Until the last store recovery finds used flags at the old position and finishes this.
        """
        region = self._region
        self._states[head].inflight = 0
        order()
        region.old_free_head = region.free_head
        order()
        used, wrap = region.used_idx, region.used_wrap_counter
        self._store_position(used, wrap, used, wrap)
