"""The driver's side of one ring: offers chains, collects the used ones.

It serves an embedded front-end, tests and load generators.  It distrusts the device as much as the
device's side distrusts a driver.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from ..config import RingConfig, ring_parts
from ..engine.python.packed import (
    AVAIL,
    EVENT_DESCRIPTOR,
    EVENT_DISABLE,
    EVENT_ENABLE,
    USED,
    available_flags,
    used_flags,
)
from ..engine.python.split import NO_INTERRUPT, NO_NOTIFY, needs_event
from ..engine.python.walk import INDIRECT, NEXT, WRITABLE
from ..errors import QueueBroken, UsageError
from ..layout import CHAIN_LIMIT, MAX_CHAIN_LENGTH, Reason
from ..memory import access, barrier
from ..memory.placement import Placement
from ..memory.table import READ, WRITE, Broken, Memory, Missing, Table

Buffer = tuple[int, int]
"""(guest address or IOVA, bytes)."""


class Offered(NamedTuple):
    """A chain that the device has."""

    identity: int
    slots: tuple[int, ...]
    """Split: its descriptors of the table; packed: one element a slot of the ring."""
    writable: int


class DriverQueue:
    """Offers chains to a device (virtio 2.7.13, 2.8.21) and collects the used ones.

    ``config`` and ``memory`` are those of the device's side: ring addresses are front-end user
    addresses, or IOVAs with ``iommu``.  ``tables`` is the guest address (or IOVA) of room for
    indirect tables, ``table_length`` descriptors for each of the ring's: see `tables_size`.
    A table may be longer than the ring, as Linux's drivers make them and devices take them,
    although the specification has it otherwise.  Starts on a ring of zeroes.

    Not thread-safe.  Raises `UsageError` for a ring that is not in memory.
    """

    def __init__(
        self,
        config: RingConfig,
        memory: Memory,
        *,
        tables: int | None = None,
        table_length: int = 16,
    ) -> None:
        config.check()
        self._config = config
        self._memory = memory
        self._table = Table.of(memory)
        self._tables = tables
        self._table_length = min(table_length, max(CHAIN_LIMIT, config.size))
        #: Kept, as parts of the ring may be mapped for this object alone.
        self._placed: list[Placement] = []
        parts = ring_parts(config.size, config.packed)
        addresses = (config.descriptor_address, config.driver_address, config.device_address)
        try:
            for (_, _, length), address in zip(parts, addresses, strict=True):
                self._placed.append(
                    Placement(
                        self._table.ring_pieces(address, length, READ | WRITE, config.iommu, ())
                    )
                )
        except (Broken, Missing) as error:
            raise UsageError(f"the ring is not in guest memory: {error}") from error
        hosts = [part.host for part in self._placed]
        self._side: _Split | _Packed
        try:
            self._side = (_Packed if config.packed else _Split)(config, hosts, self._table)
        except Broken as error:
            # See `access`.
            message = "a big-endian or odd available ring needs memory that cannot vanish"
            raise UsageError(message) from error

    def add(
        self,
        readable: Iterable[Buffer] = (),
        writable: Iterable[Buffer] = (),
        indirect: bool = False,
    ) -> int:
        """Write a chain into the ring without exposing it; the id that `collect` will return.

        Buffers are (guest address or IOVA, bytes).  ``indirect`` puts their descriptors into a
        table of its own.  Raises `UsageError` when there is no room (see `free`).
        """
        read, write = list(readable), list(writable)
        count = len(read) + len(write)
        if not count:
            raise UsageError("a chain has at least one buffer")
        if not indirect and count > self._config.size:
            raise UsageError(
                f"a chain of {count} descriptors does not fit a ring of {self._config.size}"
            )
        if sum(length for _, length in read + write) > MAX_CHAIN_LENGTH:
            raise UsageError("a chain has less than 4 GiB")
        if any(length <= 0 for _, length in read + write):
            raise UsageError("a buffer has at least one byte")
        descriptors = [(address, length, 0) for address, length in read]
        descriptors += [(address, length, WRITABLE) for address, length in write]
        room = sum(length for _, length in write)
        if self.free < (1 if indirect else count):
            raise UsageError(f"{self.free} descriptors are free, not {count}")
        try:
            if not indirect:
                return self._side.add(descriptors, room)
            if self._tables is None or not self._config.indirect or count > self._table_length:
                raise UsageError("no room for an indirect table of this length")
            address = self._tables + 16 * self._table_length * self._side.next_identity()
            self._write(address, self._side.table(descriptors))
            return self._side.add([(address, 16 * count, INDIRECT)], room)
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def _write(self, address: int, data: bytes) -> None:
        position = 0
        try:
            pieces = self._table.pieces(address, len(data), WRITE, self._config.iommu, ())
        except (Broken, Missing) as error:
            raise UsageError(f"the room for tables is not in guest memory: {error}") from error
        for piece in pieces:
            access.write(piece, 0, data[position : position + piece.length])
            position += piece.length

    def publish(self) -> bool:
        """Expose the chains that were added; true when the device wants a kick."""
        try:
            return self._side.publish()
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def collect(self, limit: int | None = None) -> list[tuple[int, int]]:
        """(id, bytes written) of chains that the device used, in the order it returned them.

        Raises `QueueBroken` (USED_RING) when the device returns a chain that it was not given.
        Every method raises it (TRUNCATED) when the ring's memory is gone and nothing guards it.
        """
        try:
            return self._side.collect(self._config.size if limit is None else limit)
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def enable_notification(self) -> bool:
        """Ask for calls; true when used chains are there already: collect them first."""
        try:
            return self._side.enable()
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    def disable_notification(self) -> None:
        """Tell the device that calls are not needed (a hint)."""
        try:
            self._side.disable()
        except Broken as error:
            raise QueueBroken(error.reason, error.detail) from None

    @property
    def free(self) -> int:
        """Descriptors of the ring that are free."""
        return self._side.free

    @property
    def tables_size(self) -> int:
        """Bytes of the room that ``tables`` names."""
        return 16 * self._table_length * self._config.size

    @property
    def config(self) -> RingConfig:
        """How the ring is set up."""
        return self._config


class _Split:
    """Split rings."""

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
            chain = self.offered.get(head)
            if chain is None or written > chain.writable:
                raise QueueBroken(Reason.USED_RING, head)
            batch = [chain]
            if self._in_order:
                batch = _up_to(self.offered, head)
            for used in batch:
                del self.offered[used.identity]
                self._free.extend(used.slots)
                length = written if used.identity == head else used.writable
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


class _Packed:
    """Packed rings."""

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
            chain = self.offered.get(head)
            if chain is None or written > chain.writable:
                raise QueueBroken(Reason.USED_RING, head)
            batch = [chain]
            if self._in_order:
                batch = _up_to(self.offered, head)
            for used in batch:
                del self.offered[used.identity]
                self._identities.append(used.identity)
                length = written if used.identity == head else used.writable
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


def _up_to(offered: dict[int, Offered], identity: int) -> list[Offered]:
    """With IN_ORDER a used id stands for itself and all that were offered before it."""
    batch: list[Offered] = []
    for chain in offered.values():
        batch.append(chain)
        if chain.identity == identity:
            break
    return batch
