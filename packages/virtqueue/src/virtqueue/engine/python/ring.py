"""The ring engine in Python: the readable statement of the specification, and the oracle.

`RingEngine` is what both formats share: the calls of an engine, from the take of a chain to its
completion.  `walk` resolves chains, `arrays` describes them to the queue, `taken` remembers them;
`split` and `packed` add where chains are found and how used ones are returned.

Every value read from a ring is copied once into a Python integer and checked after that.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any, Final

from ...counters import Counters
from ...errors import UsageError
from ...layout import (
    ABI,
    DONE,
    DONE_SIZE,
    MAGIC,
    DoneFlags,
    Features,
    More,
    Provision,
    QueueBlock,
    Reason,
    Result,
)
from ...memory import access
from ...memory.table import Broken, Memory, Missing, Table
from .arrays import Arrays
from .dirty_log import Log, mark_ring
from .inflight_memory import region_poison
from .taken import Room, Taken, add_pins
from .walk import Walk

# Plain integers: enum members cost a microsecond in an expression.
_STATUS: Final = int(DoneFlags.STATUS)
_KEEP: Final = int(DoneFlags.KEEP)
_WROTE_ALL: Final = int(DoneFlags.WROTE_ALL)

_FATAL: Final = frozenset((Reason.RING_MEMORY, Reason.TRUNCATED, Reason.USED_RING, Reason.INFLIGHT))
"""After these nothing is written to the ring any more; after a wrong chain the good ones are."""


class RingEngine:
    """One queue's engine; the subclasses know the format."""

    name: str = "python"

    def __init__(self, block: QueueBlock, memory: Memory) -> None:
        if (block.magic, block.abi, block.size) != (MAGIC, ABI, ctypes.sizeof(QueueBlock)):
            raise UsageError("the queue block has another ABI")
        self._block = block
        self._size: int = block.queue_size
        features = Features(block.features)
        self._event_idx = Features.EVENT_IDX in features
        self._in_order = Features.IN_ORDER in features
        self._big_endian = Features.BIG_ENDIAN in features
        self._log_used = False
        self._arrays = Arrays(block)
        self._provisions: Any = (Provision * block.provision_capacity).from_address(
            block.provisions
        )
        self._counters: Counters | None = (
            Counters.from_address(block.counters) if block.counters else None
        )
        self._memory = memory
        self._walk = Walk(block, Table.of(memory), self._provisions)
        self._log: Log | None = None
        self._ring_poison: list[Any] = []
        self._inflight_poison: Any = region_poison(block)
        self._taken: dict[int, Taken] = {}
        # In the order they were taken; only kept where it decides the order of completion.
        self._ordered: deque[Taken] = deque()
        self._batch: list[int] = []
        self._room = 0
        """Private pieces of all chains in flight."""
        self._room_limit = 16 * self._size + 65536
        self._slots_out = 0
        """Descriptors of the ring covered by chains in flight."""

    # What a format adds.

    def _map_ring(self) -> None:
        raise NotImplementedError

    def _load_available(self) -> int:
        """How many chains (split) or whether one (packed) can be taken, after the barrier that
        makes them readable."""
        raise NotImplementedError

    def _peek(self) -> bool:
        """Whether there is something to take, if only a wrong index."""
        raise NotImplementedError

    def _fetch(self) -> tuple[int, int, list[tuple[int, int, bool]], Any]:
        """The next chain: (head, slots, descriptors as (address, length, writable), what
        `_advance` needs)."""
        raise NotImplementedError

    def _advance(self, taken: Taken, found: Any) -> None:
        raise NotImplementedError

    def _retreat(self, taken: Taken) -> None:
        raise NotImplementedError

    def _use(self, chains: list[Taken]) -> bool:
        """Return chains to the driver; whether it wants to be told."""
        raise NotImplementedError

    def recover(self) -> int:
        raise NotImplementedError

    def _arm(self) -> int:
        raise NotImplementedError

    def _disarm(self) -> int:
        raise NotImplementedError

    # The engine's calls.

    def set_memory(self, memory: Memory) -> None:
        """The snapshot that the next `attach` adopts."""
        self._memory = memory

    def attach(self) -> int:
        block = self._block
        table = self._walk.table = Table.of(self._memory)
        self._log = Log(block.log) if block.log else None
        self._log_used = Features.LOG_USED in Features(block.features)
        if block.descriptors:
            self._ring_poison = [
                word
                for host in (block.descriptors, block.driver, block.device)
                for word in table.poison_words(host)
            ]
            try:
                self._map_ring()
            except Broken as error:
                self._break(error)
        return 0

    def ready(self) -> int:
        block = self._block
        if block.reason or block.stopped or not block.descriptors:
            return 0
        try:
            return int(block.resubmit != 0 or self._peek())
        except Broken as error:
            self._break(error)
            return 1

    def arm(self) -> int:
        # When the ring is gone there is something to see: the next take says so.
        try:
            return self._arm()
        except Broken as error:
            self._break(error)
            return 1

    def disarm(self) -> int:
        try:
            return self._disarm()
        except Broken as error:
            self._break(error)
            return 0

    def take(self) -> int:
        block = self._block
        block.count = 0
        block.segment_count = 0
        block.more = 0
        self._batch = []
        if block.reason:
            return Result.BROKEN
        if block.stopped:
            return 0
        limit = min(block.limit, block.record_capacity)
        count = 0
        try:
            self._check_ring()
            available = 1
            while count < limit:
                if not block.resubmit:
                    available = self._load_available()
                    if not available:
                        break
                self._take_one(count)
                count += 1
            else:
                if block.resubmit or self._load_available():
                    block.more = More.AVAILABLE
        except Broken as error:
            self._break(error)
            if not count:
                return Result.BROKEN
            block.more = More.AVAILABLE
        except Missing as missing:
            if not count:
                block.need_address = missing.address
                block.need_length = missing.length
                block.need_access = missing.access
                return Result.NEED
            block.more = More.AVAILABLE
        except Room as room:
            block.more = More.STALLED if room.stalled else More.AVAILABLE
        finally:
            block.count = count
            if count:
                add_pins(self._walk.table.address, count)
                if self._counters is not None:
                    self._counters.batches += 1
        return count

    def publish(self) -> int:
        block = self._block
        result = self._complete(self._arrays.staged, block.staged_count)
        if result >= 0:
            block.staged_count = 0
        return result

    def cycle(self) -> int:
        result = self._complete(self._arrays.done, self._block.count)
        if result < 0:
            return result
        return self.take()

    def rewind(self) -> int:
        block = self._block
        count: int = block.limit
        if count > len(self._batch):
            return Result.USAGE
        for head in self._batch[len(self._batch) - count :]:
            # The ring cannot have offered the head again: that takes another take.
            found = self._taken.get(head)
            if found is None or found.done:
                block.detail = head
                return Result.USAGE
        for _ in range(count):
            self._take_back(self._taken[self._batch.pop()])
            block.segment_count -= self._arrays.segment_count(block.count - 1)
            block.count -= 1
        if count:
            block.more |= More.AVAILABLE
        return count

    def untake(self, heads: ctypes.Array[ctypes.c_uint16]) -> int:
        block = self._block
        named: dict[int, Taken] = {}
        for head in heads:
            found = self._taken.get(head)
            if found is None or found.done or head in named:
                block.detail = head
                return Result.USAGE
            named[head] = found
        if block.stopped or block.reason in _FATAL:
            return 0
        given: list[int] = []
        try:
            self._check_ring()
            for taken in sorted(named.values(), key=lambda taken: taken.number, reverse=True):
                # A chain that was taken later and is not named, or has completed, leaves a gap.
                if taken.number != block.taken - 1:
                    break
                self._take_back(taken)
                given.append(taken.head)
        except Broken as error:
            self._break(error)
        if given:
            block.more |= More.AVAILABLE
            for index, head in enumerate(reversed(given)):
                heads[index] = head
        return len(given)

    def _take_back(self, taken: Taken) -> None:
        """Undo the latest take."""
        try:
            self._retreat(taken)
        except Broken as error:
            self._break(error)
        if self._in_order:
            self._ordered.pop()
        self._release([taken])
        self._block.taken -= 1
        if self._counters is not None:
            self._counters.requests -= 1

    def close(self) -> None:
        self._release(list(self._taken.values()))
        self._ordered.clear()
        self._batch = []

    # One chain.

    def _check_ring(self) -> None:
        if not self._block.descriptors:
            raise Broken(Reason.RING_MEMORY)
        for word in self._ring_poison:
            if word.value:
                raise Broken(Reason.TRUNCATED)
        self._check_records()

    def _check_records(self) -> None:
        """Whether the in-flight region and the dirty log are still there.

        Zeroes in place of the records would look like a region that was never used.
        """
        if self._inflight_poison.value or (self._log is not None and self._log.poison.value):
            raise Broken(Reason.TRUNCATED)

    def _break(self, error: Broken) -> None:
        """The queue is broken for good.

        Truncated memory reads as zeroes, so when ring or records were truncated that explains
        whatever looks wrong in them.
        """
        block = self._block
        words = [*self._ring_poison, self._inflight_poison]
        if self._log is not None:
            words.append(self._log.poison)
        truncated = any(word.value for word in words)
        block.reason = Reason.TRUNCATED if truncated else error.reason
        block.detail = error.detail & 0xFFFF_FFFF_FFFF_FFFF

    def _take_one(self, position: int) -> None:
        head, slots, descriptors, found = self._fetch()
        taken = Taken(head, slots, self._walk.table, self._block.taken)
        pieces = self._walk.resolve(taken, descriptors)
        first = self._block.segment_count
        if first + len(pieces) > self._block.segment_capacity:
            raise Room(stalled=False)
        if self._taken and self._room + taken.room > self._room_limit:
            raise Room(stalled=True)
        self._arrays.describe(position, first, taken, pieces, self._block.resubmit > 0)
        for index in taken.kept:
            self._provisions[index].uses += 1
        self._advance(taken, found)
        self._taken[head] = taken
        self._room += taken.room
        self._slots_out += slots
        if self._in_order:
            self._ordered.append(taken)
        self._batch.append(head)
        block = self._block
        block.segment_count = first + len(pieces)
        block.taken += 1
        block.in_flight = len(self._taken)
        if self._counters is not None:
            self._counters.requests += 1
            self._counters.bytes += sum([p.length for p, writable in pieces if not writable])

    # Completion.

    def _complete(self, source: memoryview, count: int) -> int:
        block = self._block
        block.notify = 0
        chains: list[Taken] = []
        for head, status, flags, written in DONE.iter_unpack(source[: count * DONE_SIZE]):
            if flags & _KEEP:
                continue
            taken = self._taken.get(head)
            if taken is None or taken.done:
                self._undo(chains)
                block.detail = head
                return Result.USAGE
            wants_status = flags & _STATUS
            if written > taken.writable_length or (wants_status and not taken.writable):
                self._undo(chains)
                block.detail = head
                return Result.USAGE
            taken.done = True
            taken.written, taken.status, taken.flags = written, status, flags
            chains.append(taken)
        if not chains:
            return 0
        if block.stopped or block.reason in _FATAL:
            return self._drop(chains)
        try:
            self._check_ring()
            for taken in chains:
                for word in taken.poison:
                    if word.value:
                        raise Broken(Reason.TRUNCATED, taken.head)
            for taken in chains:
                self._finish(taken)
            self._check_records()
            ready = chains
            if self._in_order:
                ready = []
                while self._ordered and self._ordered[0].done:
                    ready.append(self._ordered.popleft())
            if ready and self._use(ready):
                block.notify = 1
        except Broken as error:
            self._break(error)
            return self._drop(chains)
        self._release(ready)
        block.completed += len(ready)
        if self._counters is not None:
            self._counters.bytes += sum([taken.written for taken in chains])
        return len(chains)

    @staticmethod
    def _undo(chains: list[Taken]) -> None:
        for taken in chains:
            taken.done = False

    def _drop(self, chains: list[Taken]) -> int:
        """Release records without touching the ring."""
        self._release(chains)
        if self._in_order:
            dropped = set(map(id, chains))
            self._ordered = deque(t for t in self._ordered if id(t) not in dropped)
        return len(chains)

    def _finish(self, taken: Taken) -> None:
        """The status byte, and the log of what was written to the chain's buffers."""
        status = taken.flags & _STATUS
        if status:
            last = taken.writable[-1]
            access.write(last, last.length - 1, bytes((taken.status,)))
        log = self._log
        if log is None or not log.enabled or not taken.writable:
            return
        left = taken.written
        # A failed request may have written anywhere before it failed.
        if taken.flags & _WROTE_ALL or (status and taken.status):
            left = taken.writable_length
        for piece in taken.writable:
            if not left:
                break
            log.mark(piece.guest, min(left, piece.length))
            left -= min(left, piece.length)
        if status:
            last = taken.writable[-1]
            log.mark(last.guest + last.length - 1, 1)

    def _release(self, chains: list[Taken]) -> None:
        pins: dict[int, int] = {}
        for taken in chains:
            if self._taken.pop(taken.head, None) is None:
                continue
            self._room -= taken.room
            self._slots_out -= taken.slots
            for index in taken.kept:
                self._provisions[index].uses -= 1
            pins[taken.table.address] = pins.get(taken.table.address, 0) + 1
        for address, count in pins.items():
            add_pins(address, -count)
        self._block.in_flight = len(self._taken)

    def _mark_ring(self, offset: int, length: int) -> None:
        """Log a write to the device's part of the ring."""
        if self._log_used and self._log is not None:
            mark_ring(self._log, self._block, offset, length)
