"""Reaching ring memory and buffers: directly, or through the kernel where nothing guards them.

A region of an unsealed file may be truncated at any moment.  With a `SigbusGuard` that is
survived; without one guest_memory marks the region (``REGION_UNGUARDED``), and every access here
goes through guest_memory's system calls, which report a missing page where a load or store would
end the process.  Such a page marks the region as poisoned, as the guard would, and is `Broken` with
`Reason.TRUNCATED`.

The kernel's copy of a few bytes may be several stores, so words that a partner reads meanwhile need
more:

* Loads are repeated until two in a row agree.  Two equal copies of an index are a value that was
  there: both can only be torn alike when the driver has really gone past it meanwhile.
* The used and available index of a split ring lie in the upper half of an aligned 32-bit word.
  `store_halfword` moves them: a reader sees the old index, the new one or one between, all true, as
  what they cover is written.
* The flags of a packed descriptor lie there too.  Their bits are flipped one by one and atomically,
  AVAIL and USED last: exactly one of those two changes, and with it the descriptor's owner.
* Event fields and split flags may be seen torn: a driver that reads them before the last byte is
  there has stored its own index before we look at that (rows "arm" and "notify" of the barriers).

Big-endian rings have no such order of bytes and are refused (`Reason.RING_MEMORY`).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, Final

from guest_memory import atomic_flip, store_halfword, try_copy

from ..layout import Reason
from . import barrier
from .table import Broken, Piece, Table

_TRIES: Final = 64
_AVAIL_AND_USED: Final = 0x8080


class KernelMemory:
    """Unguarded memory at a host address; ``poison`` is its region's word."""

    __slots__ = ("_address", "_buffer", "_local", "_poison")

    def __init__(self, address: int, poison: Any) -> None:
        self._address = address
        self._poison = poison
        self._buffer = (ctypes.c_char * 16)()
        self._local = ctypes.addressof(self._buffer)

    def _lost(self, offset: int) -> Broken:
        self._poison.value = 1
        return Broken(Reason.TRUNCATED, self._address + offset)

    def load(self, offset: int, length: int) -> bytes:
        """Up to 16 bytes."""
        if not try_copy(self._address + offset, self._local, length, False):
            raise self._lost(offset)
        return self._buffer.raw[:length]

    def store(self, offset: int, data: bytes) -> None:
        """Up to 16 bytes, not necessarily at once."""
        self._buffer.raw = data.ljust(16)
        if not try_copy(self._address + offset, self._local, len(data), True):
            raise self._lost(offset)

    def __setitem__(self, place: slice, data: bytes) -> None:
        self.store(place.start, data)


class KernelWords(KernelMemory):
    """Little-endian words in unguarded memory, with the promises above; indexed like an array."""

    __slots__ = ("_flags", "_width")

    def __init__(self, address: int, width: int, poison: Any, flags: bool = False) -> None:
        super().__init__(address, poison)
        self._width = width
        self._flags = flags

    def __getitem__(self, index: int) -> int:
        offset, width = index * self._width, self._width
        value = self.load(offset, width)
        for _ in range(_TRIES):  # a driver that changes it all the time gets what it asks for
            again = self.load(offset, width)
            if again == value:
                break
            value = again
        return int.from_bytes(value, "little")

    def __setitem__(self, index: Any, value: Any) -> None:
        offset, width = index * self._width, self._width
        if width != 2 or not (self._address + offset) & 2:
            self.store(offset, value.to_bytes(width, "little"))
            return
        # One store at a time changes the upper half of a word; no other thread stores there.
        if not self._flags:
            whole = store_halfword(self._address + offset, value)
        else:
            word = self._address + offset - 2
            change = value ^ int.from_bytes(self.load(offset, 2), "little")
            owner = change & _AVAIL_AND_USED
            whole = atomic_flip(word, (change ^ owner) << 16) and atomic_flip(word, owner << 16)
        if not whole:
            raise self._lost(offset)


def words16(
    table: Table, host: int, count: int, big_endian: bool = False, flags: bool = False
) -> Any:
    """``count`` 16-bit words at a host address; ``flags`` when the upper halves are flags.

    Raises `Broken` for a big-endian ring in unguarded memory.
    """
    poison = table.unguarded_host(host, 2 * count)
    if poison is None:
        return barrier.words16(host, count, big_endian)
    if big_endian:
        raise Broken(Reason.RING_MEMORY, host)
    return KernelWords(host, 2, poison, flags)


def words32(table: Table, host: int, count: int, big_endian: bool = False) -> Any:
    """``count`` 32-bit words at a host address."""
    poison = table.unguarded_host(host, 4 * count)
    if poison is None:
        return barrier.words32(host, count, big_endian)
    return KernelWords(host, 4, poison)


def octets(table: Table, host: int, count: int) -> Any:
    """``count`` bytes at a host address, to store slices of up to 16 bytes into."""
    poison = table.unguarded_host(host, count)
    if poison is None:
        return memoryview(barrier.octets(host, count)).cast("B")
    return KernelMemory(host, poison)


def descriptors(
    table: Table, host: int, count: int, layout: struct.Struct
) -> Callable[[int], tuple[int, int, int, int]]:
    """What copies one of ``count`` descriptors, once."""
    poison = table.unguarded_host(host, 16 * count)
    unpack: Any
    if poison is None:
        memory, unpack = barrier.octets(host, 16 * count), layout.unpack_from

        def directly(index: int) -> tuple[int, int, int, int]:
            found: tuple[int, int, int, int] = unpack(memory, 16 * index)
            return found

        return directly
    kernel, unpack = KernelMemory(host, poison), layout.unpack

    def through_the_kernel(index: int) -> tuple[int, int, int, int]:
        found: tuple[int, int, int, int] = unpack(kernel.load(16 * index, 16))
        return found

    return through_the_kernel


def read(piece: Piece, length: int) -> bytes:
    """The first bytes of a piece; raises `Broken` when they are gone."""
    if not piece.unguarded:
        return ctypes.string_at(piece.host, length)
    data = (ctypes.c_char * length)()
    if not try_copy(piece.host, ctypes.addressof(data), length, False):
        raise _lost(piece)
    return data.raw


def write(piece: Piece, offset: int, data: bytes) -> None:
    """Store bytes into a piece; raises `Broken` when it is gone."""
    if not piece.unguarded:
        ctypes.memmove(piece.host + offset, data, len(data))
        return
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
    if not try_copy(piece.host + offset, ctypes.addressof(buffer), len(data), True):
        raise _lost(piece)


def _lost(piece: Piece) -> Broken:
    if piece.poison is not None:
        piece.poison.value = 1
    return Broken(Reason.TRUNCATED, piece.guest)


class Shadow:
    """Our copy of a piece that a handler wants to see, as it must not be touched directly.

    What is gone reads as zeroes, as it does under the guard, and the completion breaks the queue.
    """

    __slots__ = ("_host", "_poison", "data", "start")

    def __init__(self, host: int, length: int, poison: Any, start: int) -> None:
        self._host = host
        self._poison = poison
        self.data: bytearray = bytearray(length)
        self.start: int = start
        """Where the piece begins among the chain's bytes of its direction."""
        if not self._move(length, False):
            self.data[:] = bytes(length)

    def _move(self, length: int, to_guest: bool) -> bool:
        exported = (ctypes.c_char * len(self.data)).from_buffer(self.data)
        done = try_copy(self._host, ctypes.addressof(exported), length, to_guest)
        if not done:
            self._poison.value = 1
        return done

    def flush(self, end: int) -> None:
        """Give the guest what lies before ``end`` among the chain's writable bytes."""
        length = min(end - self.start, len(self.data))
        if length > 0:
            self._move(length, True)
