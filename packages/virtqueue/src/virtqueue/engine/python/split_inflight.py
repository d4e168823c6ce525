"""The in-flight region of a split ring, as the Python engine keeps it.

The stores are made in an order in which the death of the process between any two of them loses no
chain and completes none twice; each method says why its order does.
"""

from __future__ import annotations

from typing import Any

from ...layout import Reason
from ...memory.access import KernelMemory
from ...memory.barrier import order
from ...memory.table import Broken
from ..inflight import SPLIT_ENTRY, SPLIT_HEADER, SplitRegion, SplitState
from .inflight_memory import VERSION, KernelStructure, KernelStructures, room_for, used_entries


class SplitInflight:
    """The region of a split ring."""

    def __init__(self, address: int, available: int, size: int, unguarded: Any = None) -> None:
        self._room = room = room_for(size, available, SPLIT_HEADER, SPLIT_ENTRY)
        self._size = size
        self._region: Any
        self._states: Any
        if unguarded is None:
            self._region = SplitRegion.from_address(address)
            self._states = (SplitState * room).from_address(address + SPLIT_HEADER)
        else:
            self._region = KernelStructure(SplitRegion, KernelMemory(address, unguarded))
            states = KernelMemory(address + SPLIT_HEADER, unguarded)
            self._states = KernelStructures(SplitState, states, room)
        self._counter = 0

    def recover(self, used_idx: int) -> tuple[bool, list[int]]:
        """Whether the region was in use, and the heads to take again, oldest first."""
        region = self._region
        if region.version == 0:
            region.desc_num = self._size
            region.used_idx = used_idx
            order()
            region.version = VERSION  # last: a death before leaves an uninitialised region
            return False, []
        entries = used_entries(region, self._size, self._room)
        last_batch = (used_idx - region.used_idx) & 0xFFFF
        if last_batch > self._size:
            raise Broken(Reason.INFLIGHT, region.used_idx)
        # The batch had reached the driver when the process died: these are not in flight.
        head = region.last_batch_head
        for _ in range(last_batch):
            if head >= self._size:
                raise Broken(Reason.INFLIGHT, head)
            self._states[head].inflight = 0
            head = self._states[head].next
        order()
        region.used_idx = used_idx
        marked = [head for head in range(entries) if self._states[head].inflight]
        if marked and marked[-1] >= self._size:
            raise Broken(Reason.INFLIGHT, marked[-1])
        found = sorted((self._states[head].counter, head) for head in marked)
        self._counter = found[-1][0] + 1 if found else 0
        return True, [head for _, head in found]

    def take(self, head: int) -> None:
        """A chain was fetched.  The counter first: a marked entry always has its own."""
        state = self._states[head]
        state.counter = self._counter
        self._counter += 1
        order()
        state.inflight = 1

    def give_back(self, head: int) -> None:
        """The chain was rewound: the ring still offers it."""
        self._states[head].inflight = 0

    def using(self, head: int) -> None:
        """The chain belongs to the batch that the used index is about to cover.

        The list is followed only for as many entries as the used index moved, which it does
        after all of them are linked; its older links may be stale.
        """
        region = self._region
        self._states[head].next = region.last_batch_head
        order()
        region.last_batch_head = head

    def used(self, heads: list[int], used_idx: int) -> None:
        """The used index covers the batch.

        ``used_idx`` last: as long as it differs from the ring's, recovery clears the batch.
        """
        for head in heads:
            self._states[head].inflight = 0
        order()
        self._region.used_idx = used_idx
