"""Atomic words: aligned integers that the driver changes or reads at the same time."""

import ctypes
from typing import Any

from ..addresses import READ, WRITE, BusAddress
from ..errors import Misaligned, Poisoned, UsageError
from ..linux import syscalls
from ..regions.entry import Entry
from .read_write import ReadWrite

_WORDS: dict[int, Any] = {
    1: ctypes.c_uint8,
    2: ctypes.c_uint16,
    4: ctypes.c_uint32,
    8: ctypes.c_uint64,
}
_TRIES = 64


class AtomicWords(ReadWrite):
    """Loads and stores words as a whole."""

    __slots__ = ()

    def _word(self, address: int, size: int, access: int) -> tuple[Entry, int]:
        if size not in _WORDS:
            raise UsageError("atomic accesses have 1, 2, 4 or 8 bytes")
        if address & (size - 1):
            raise Misaligned(address, size)
        found = self._find(address, size)
        if found is not None and not (found.read_only and access & WRITE):
            entry, guest = found, address
        else:
            entry, guest, _ = self._span(address, size, access)
        if entry.host and (entry.host + guest - entry.guest) & (size - 1):
            raise Misaligned(address, size)  # the file's offset is odd
        return entry, guest

    def load(self, address: BusAddress, size: int) -> int:
        """Read an aligned little-endian word of 1, 2, 4 or 8 bytes atomically.

        Raises:
            Misaligned: the address is no multiple of the size.
            OutOfBounds, NotContiguous, IotlbMiss, AccessDenied, Poisoned.
        """
        entry, guest = self._word(address, size, READ)
        if entry.fast and not self._postcopy:
            value: int = _WORDS[size].from_address(entry.host + guest - entry.guest).value
            if entry.poison.value:
                raise Poisoned(address, size)
            return value
        first, second = _WORDS[size](), _WORDS[size]()
        # The kernel may copy a word in pieces. Two equal copies are one value that was there,
        # unless a driver goes once around all values in between.
        span = [(entry, guest, size)]
        self._copy(span, ctypes.addressof(first), READ)
        for _ in range(_TRIES):  # a guest that changes it all the time gets what it asks for
            self._copy(span, ctypes.addressof(second), READ)
            if first.value == second.value:
                break
            first, second = second, first
        result: int = first.value
        return result

    def store(self, address: BusAddress, size: int, value: int) -> None:
        """Write an aligned little-endian word of 1, 2, 4 or 8 bytes, and mark the dirty log.

        The store is atomic where memory may be touched directly (sealed or guarded files).
        Elsewhere the kernel stores, and promises that for single bytes only; the index of a split
        ring is safe all the same, see ``store_halfword``.

        Args:
            address: in the driver's address space.
            size: 1, 2, 4 or 8.
            value: 0 to ``2 ** (8 * size) - 1``.

        Raises:
            As `load`.
        """
        if not 0 <= value < 1 << 8 * size:
            raise UsageError("the value does not fit")
        entry, guest = self._word(address, size, WRITE)
        host, token = entry.mapping.pin(guest, size, WRITE) if not entry.host else (0, None)
        try:
            self._store(entry, host or entry.host + guest - entry.guest, guest, size, value)
        finally:
            if not entry.host:
                entry.mapping.unpin(token)
            self._mark([(entry, guest, size)])

    def _store(self, entry: Entry, host: int, guest: int, size: int, value: int) -> None:
        if entry.direct and not self._postcopy:
            _WORDS[size].from_address(host).value = value
            if entry.poison.value:
                raise Poisoned(guest, size)
        elif entry.poison.value:
            raise Poisoned(guest, size)
        elif size == 2:
            if not syscalls.store_halfword(host, value):
                entry.poison.value = 1
                raise Poisoned(guest, size)
        else:
            word = _WORDS[size](value)
            self._move(entry, host, guest, ctypes.addressof(word), size, WRITE)
