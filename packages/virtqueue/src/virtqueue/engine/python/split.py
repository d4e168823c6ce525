"""The device's side of a split ring (virtio 2.7)."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from ...layout import QueueBlock, Reason
from ...memory import access, barrier
from ...memory.table import Broken, Memory
from .inflight_memory import unguarded_poison
from .ring import RingEngine
from .split_inflight import SplitInflight
from .taken import Taken
from .walk import INDIRECT, NEXT, WRITABLE

NO_INTERRUPT: Final = 1
NO_NOTIFY: Final = 1


def needs_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from ``old`` to ``new`` passed ``event`` (virtio 2.7.10)."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class SplitEngine(RingEngine):
    """A split ring."""

    def __init__(self, block: QueueBlock, memory: Memory) -> None:
        super().__init__(block, memory)
        self._mask = self._size - 1
        self._avail_index = block.next_avail
        """The driver's index when it was last loaded."""
        self._resubmit: deque[int] = deque()
        self._inflight: SplitInflight | None = None
        self._load: Any = None
        self._avail: Any = None
        self._used: Any = None
        self._elements: Any = None

    def _map_ring(self) -> None:
        block, size, big, table = self._block, self._size, self._big_endian, self._walk.table
        if not block.taken and not block.in_flight:
            self._avail_index = block.next_avail  # the queue may have set the position
        self._load = access.descriptors(table, block.descriptors, size, self._walk.descriptor)
        # flags, idx, ring[size], used_event
        self._avail = access.words16(table, block.driver, 3 + size, big)
        # flags, idx, then elements of two words, and avail_event behind them
        self._used = access.words16(table, block.device, 3 + 4 * size, big)
        self._elements = access.words32(table, block.device + 4, 2 * size, big)

    def recover(self) -> int:
        block = self._block
        try:
            used_index = self._used[1]
            inflight = SplitInflight(
                block.inflight, block.inflight_size, self._size, unguarded_poison(block)
            )
            in_use, heads = inflight.recover(used_index)
            self._check_records()
        except Broken as error:
            self._break(error)
            return -1
        self._inflight = inflight
        if in_use:
            block.next_used = used_index
            block.next_avail = self._avail_index = (used_index + len(heads)) & 0xFFFF
            self._resubmit.extend(heads)
            block.resubmit = len(heads)
        return len(heads)

    def _load_available(self) -> int:
        position = self._block.next_avail
        if self._avail_index == position:
            self._avail_index = self._avail[1]
            ahead = (self._avail_index - position) & 0xFFFF
            if ahead > self._size:
                raise Broken(Reason.AVAIL_JUMP, self._avail_index)
            # Partner: the driver's barrier between filling descriptors and ring entries and
            # moving idx (virtio 2.7.13.3).  We load them after idx.
            barrier.order()
        return (self._avail_index - position) & 0xFFFF

    def _peek(self) -> bool:
        return bool(self._avail[1] != self._block.next_avail)

    def _fetch(self) -> tuple[int, int, list[tuple[int, int, bool]], Any]:
        if self._resubmit:
            head = self._resubmit[0]
        else:
            head = self._avail[2 + (self._block.next_avail & self._mask)]
        if head >= self._size:
            raise Broken(Reason.HEAD_OUT_OF_RANGE, head)
        if head in self._taken:
            raise Broken(Reason.HEAD_IN_FLIGHT, head)
        chain: list[tuple[int, int, bool]] = []
        index = head
        while True:
            address, length, flags, following = self._load(index)
            if flags & INDIRECT:
                if flags & NEXT:
                    raise Broken(Reason.INDIRECT_WITH_NEXT, index)
                self._follow_table(address, length, chain)
                break
            chain.append((address, length, bool(flags & WRITABLE)))
            if not flags & NEXT:
                break
            if len(chain) >= self._size:
                raise Broken(Reason.CHAIN_TOO_LONG, head)
            if following >= self._size:
                raise Broken(Reason.NEXT_OUT_OF_RANGE, following)
            index = following
        return head, 1, chain, None

    def _follow_table(self, address: int, length: int, chain: list[tuple[int, int, bool]]) -> None:
        table = self._walk.indirect_table(address, length)
        index = 0
        while True:
            if len(chain) >= self._walk.limit:
                raise Broken(Reason.CHAIN_TOO_LONG, index)
            start, size, flags, following = table[index]
            if flags & INDIRECT:
                raise Broken(Reason.INDIRECT_NESTED, index)
            chain.append((start, size, bool(flags & WRITABLE)))
            if not flags & NEXT:
                return
            if following >= len(table):
                raise Broken(Reason.INDIRECT_NEXT_OUT_OF_RANGE, following)
            index = following

    def _advance(self, taken: Taken, found: Any) -> None:
        block = self._block
        if self._resubmit:
            taken.resubmitted = self._resubmit.popleft()
            block.resubmit -= 1
            return
        if self._inflight is not None:
            self._inflight.take(taken.head)
        block.next_avail = (block.next_avail + 1) & 0xFFFF

    def _retreat(self, taken: Taken) -> None:
        block = self._block
        if taken.resubmitted is not None:
            self._resubmit.appendleft(taken.head)
            block.resubmit += 1
            return
        if self._inflight is not None:
            self._inflight.give_back(taken.head)
        block.next_avail = (block.next_avail - 1) & 0xFFFF

    def _use(self, chains: list[Taken]) -> bool:
        block = self._block
        old = block.next_used
        inflight = self._inflight
        for number, taken in enumerate(chains):
            if inflight is not None:
                inflight.using(taken.head)
            slot = (old + number) & self._mask
            self._elements[2 * slot] = taken.head
            self._elements[2 * slot + 1] = taken.written
            self._mark_ring(4 + 8 * slot, 8)
        new = (old + len(chains)) & 0xFFFF
        # Partner: the driver's barrier between loading used idx and the elements and buffers.
        barrier.order()
        self._used[1] = new
        if inflight is not None:
            barrier.order()
            inflight.used([taken.head for taken in chains], new)
        block.next_used = new
        self._mark_ring(2, 2)
        # Partner: the driver stores used_event (or clears NO_INTERRUPT), passes a full barrier
        # and loads used idx again.  Either it sees our index or we see its event.
        barrier.full_barrier()
        if not self._event_idx:
            return not self._avail[0] & NO_INTERRUPT
        signalled, valid = block.signalled_used, block.signalled_valid
        block.signalled_used = new
        block.signalled_valid = 1
        # Nothing is known of what was signalled before a restart: tell the driver once.
        return not valid or needs_event(self._avail[2 + self._size], new, signalled)

    def _arm(self) -> int:
        block = self._block
        if block.stopped or not block.descriptors:
            return 0
        if self._event_idx:
            self._used[2 + 4 * self._size] = block.next_avail
            self._mark_ring(4 + 8 * self._size, 2)
        else:
            self._used[0] = 0
            self._mark_ring(0, 2)
        # Partner: the driver's barrier between moving avail idx and loading avail_event (or
        # flags).  Either it sees that we want a kick or we see its chain.
        barrier.full_barrier()
        if block.resubmit or block.reason:
            return int(block.resubmit != 0)
        return int(self._peek())

    def _disarm(self) -> int:
        block = self._block
        # With event indices the driver kicks only when it passes avail_event, which stays put.
        if not self._event_idx and block.descriptors and not block.stopped:
            self._used[0] = NO_NOTIFY
            self._mark_ring(0, 2)
        return 0
