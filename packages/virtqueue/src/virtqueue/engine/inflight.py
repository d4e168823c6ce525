"""The in-flight region of a queue (vhost-user specification, "Inflight I/O tracking").

The region is memory shared with the front-end, which keeps it while the back-end is away.  It
says which chains were taken and not yet used, so that a new process can take them again.  The
stores are made in an order in which the death of the process between any two of them loses no
chain and completes none twice; each method below says why its order does.

Two things differ from a literal reading of the specification, in what is stored in one go:

* Packed rings are used one chain at a time.  In a batch the flags of later descriptors are
  written before those of the first; a death in between would leave used flags in slots that the
  rolled back index comes to again, and the driver would see them as used.
* ``old_used_idx`` and ``old_used_wrap_counter`` are committed by one 8-byte store, as are they
  compared: with a chain as long as the ring only the wrap counter tells old from new.
"""

from __future__ import annotations

import ctypes
from sys import byteorder
from typing import Any, Final

from ..errors import UsageError
from ..layout import QueueBlock, QueueFlags, Reason
from ..memory.access import KernelMemory
from ..memory.barrier import order
from ..memory.table import Broken

VERSION: Final = 1
Descriptor = tuple[int, int, int, int]
"""(address, length, id, flags) of a packed ring."""

SPLIT_HEADER: Final = 16
SPLIT_ENTRY: Final = 16
PACKED_HEADER: Final = 32
PACKED_ENTRY: Final = 32


def inflight_size(size: int, packed: bool) -> int:
    """Bytes of one queue's region, aligned to 64 as front-ends expect from the back-end."""
    header, entry = (PACKED_HEADER, PACKED_ENTRY) if packed else (SPLIT_HEADER, SPLIT_ENTRY)
    return -(-(header + entry * size) // 64) * 64


class InflightRegion:
    """Where one queue's region is: ``address`` in this process, ``size`` in bytes.

    ``owner`` is whatever keeps the mapping alive.  ``poison`` is the host address of a 32-bit word
    that is set once the front-end has truncated the region's file and somebody has touched what is
    missing; 0 when that cannot happen.  ``direct`` says that the memory may be touched directly:
    its file cannot shrink, or a `SigbusGuard` watches it.  Otherwise only the Python engine takes
    it, and every access is a system call.
    """

    __slots__ = ("address", "direct", "owner", "poison", "size")

    def __init__(
        self,
        address: int,
        size: int,
        owner: object = None,
        *,
        poison: int = 0,
        direct: bool = True,
    ) -> None:
        if address % 8:
            raise UsageError(f"in-flight region at {address:#x} is not aligned to 8")
        self.address: int = address
        self.size: int = size
        self.owner: object = owner
        self.poison: int = poison
        self.direct: bool = direct


class SplitRegion(ctypes.Structure):
    """``QueueRegionSplit`` without its array."""

    features: int
    version: int
    desc_num: int
    last_batch_head: int
    used_idx: int

    _fields_ = [
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("last_batch_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
    ]


class SplitState(ctypes.Structure):
    """``DescStateSplit``."""

    inflight: int
    padding: ctypes.Array[ctypes.c_uint8]
    next: int
    counter: int

    _fields_ = [
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 5),
        ("next", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
    ]


class PackedRegion(ctypes.Structure):
    """``QueueRegionPacked`` without its array."""

    features: int
    version: int
    desc_num: int
    free_head: int
    old_free_head: int
    used_idx: int
    old_used_idx: int
    used_wrap_counter: int
    old_used_wrap_counter: int
    padding: ctypes.Array[ctypes.c_uint8]

    _fields_ = [
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("free_head", ctypes.c_uint16),
        ("old_free_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
        ("old_used_idx", ctypes.c_uint16),
        ("used_wrap_counter", ctypes.c_uint8),
        ("old_used_wrap_counter", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 7),
    ]


class PackedState(ctypes.Structure):
    """``DescStatePacked``."""

    inflight: int
    padding: int
    next: int
    last: int
    num: int
    counter: int
    id: int
    flags: int
    len: int
    addr: int

    _fields_ = [
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
        ("next", ctypes.c_uint16),
        ("last", ctypes.c_uint16),
        ("num", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
        ("id", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("len", ctypes.c_uint32),
        ("addr", ctypes.c_uint64),
    ]


class KernelStructure:
    """The fields of a structure in memory that must not be touched directly.

    Each load and store is one copy by the kernel, which nothing interrupts half-way but a missing
    page: as whole as a store of our own for whoever comes after the death of this process.
    """

    __slots__ = ("_kind", "_memory", "_offset")

    _kind: Any
    _memory: KernelMemory
    _offset: int

    def __init__(self, kind: Any, memory: KernelMemory, offset: int = 0) -> None:
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_memory", memory)
        object.__setattr__(self, "_offset", offset)

    def __getattr__(self, name: str) -> int:
        field = getattr(self._kind, name)
        return int.from_bytes(self._memory.load(self._offset + field.offset, field.size), byteorder)

    def __setattr__(self, name: str, value: int) -> None:
        field = getattr(self._kind, name)
        self._memory.store(self._offset + field.offset, value.to_bytes(field.size, byteorder))


class KernelStructures:
    """An array of them."""

    __slots__ = ("_count", "_kind", "_memory", "_size")

    def __init__(self, kind: Any, memory: KernelMemory, count: int) -> None:
        self._kind = kind
        self._memory = memory
        self._count = count
        self._size = ctypes.sizeof(kind)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> KernelStructure:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return KernelStructure(self._kind, self._memory, index * self._size)


class KernelPosition:
    """The position of a packed region: 8 bytes in one."""

    __slots__ = ("_memory",)

    def __init__(self, memory: KernelMemory) -> None:
        self._memory = memory

    def __setitem__(self, index: int, value: int) -> None:
        self._memory.store(8 * index, value.to_bytes(8, byteorder))


def region_poison(block: QueueBlock) -> Any:
    """The word that says that the queue's region was truncated."""
    address = block.inflight_poison
    return ctypes.c_uint32.from_address(address) if address else ctypes.c_uint32()


def unguarded_poison(block: QueueBlock) -> Any:
    """The same when the region must not be touched directly, else None."""
    unguarded = block.flags & QueueFlags.INFLIGHT_UNGUARDED
    return region_poison(block) if unguarded else None


def _room(size: int, available: int, packed: bool) -> int:
    """Entries that the region has room for: the ring's at least."""
    header, entry = (PACKED_HEADER, PACKED_ENTRY) if packed else (SPLIT_HEADER, SPLIT_ENTRY)
    if available < header + entry * size:
        raise Broken(Reason.INFLIGHT, available)
    return (available - header) // entry


def _used_entries(region: Any, size: int, room: int) -> int:
    """Entries of a region in use; it may have been made for a larger ring."""
    entries: int = region.desc_num
    if region.version != VERSION or not size <= entries <= room:
        raise Broken(Reason.INFLIGHT, region.version)
    return entries


class SplitInflight:
    """The region of a split ring."""

    def __init__(self, address: int, available: int, size: int, unguarded: Any = None) -> None:
        self._room = room = _room(size, available, packed=False)
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
        entries = _used_entries(region, self._size, self._room)
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


class PackedInflight:
    """The region of a packed ring."""

    def __init__(self, address: int, available: int, size: int, unguarded: Any = None) -> None:
        self._room = room = _room(size, available, packed=True)
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
    ) -> tuple[tuple[int, int, int, int] | None, list[tuple[int, list[Descriptor]]]]:
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
        entries_count = self._entries = _used_entries(region, size, self._room)
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
        chains: list[tuple[int, list[Descriptor]]] = []
        seen = set(free)
        for _, head in heads:
            entries: list[Descriptor] = []
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

    def take(self, descriptors: list[tuple[int, int, int, int]]) -> int:
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
