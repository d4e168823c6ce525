"""What both kinds of in-flight region have in common for the Python engine: reaching their memory,
and whether it was truncated.
"""

from __future__ import annotations

import ctypes
from sys import byteorder
from typing import Any, Final

from ...layout import QueueBlock, QueueFlags, Reason
from ...memory.access import KernelMemory
from ...memory.table import Broken

VERSION: Final = 1


class KernelStructure:
    """The fields of a structure in memory that must not be touched directly.

    Each load and store is one copy by the kernel, which nothing interrupts half-way but a missing
    page: as whole as a store of our own for a process that comes after this one's death.
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


def room_for(size: int, available: int, header: int, entry: int) -> int:
    """Entries that a region of ``available`` bytes has room for: the ring's at least."""
    if available < header + entry * size:
        raise Broken(Reason.INFLIGHT, available)
    return (available - header) // entry


def used_entries(region: Any, size: int, room: int) -> int:
    """Entries of a region in use; it may have been made for a larger ring."""
    entries: int = region.desc_num
    if region.version != VERSION or not size <= entries <= room:
        raise Broken(Reason.INFLIGHT, region.version)
    return entries
