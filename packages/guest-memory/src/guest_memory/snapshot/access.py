"""Access: reading, writing, atomic words, files and views.

Memory is touched directly where it cannot vanish, and through the kernel elsewhere.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..addresses import READ, WRITE, Access, BusAddress, GuestAddress
from ..errors import Misaligned, Poisoned, Unguarded, UsageError
from ..linux import atomics, buffers, copies, files
from ..regions.entry import Entry, Span
from .translation import Translation

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIN_AT_ONCE = 1 << 20  # bytes of on-demand memory that a copy holds at a time
_string_at = ctypes.string_at
_memmove = ctypes.memmove

_WORDS: dict[int, Any] = {
    1: ctypes.c_uint8,
    2: ctypes.c_uint16,
    4: ctypes.c_uint32,
    8: ctypes.c_uint64,
}
_TRIES = 64

_IOV_MAX = 1024


class Reachable(Translation):
    """Adds access to a snapshot's memory."""

    __slots__ = ()

    # Copies.

    def read(self, address: BusAddress, length: int) -> bytes:
        """Copy a range out of guest memory.

        Args:
            address: in the driver's address space.
            length: bytes; 0 gives ``b""`` at any address.

        Raises:
            OutOfBounds, IotlbMiss, AccessDenied: nothing was read.
            Poisoned: the memory is gone.
        """
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return b""
        entry = self._find(address, length)
        if entry is not None and entry.fast and not self._postcopy:
            data = _string_at(entry.host + address - entry.guest, length)
            if entry.poison.value:
                raise Poisoned(address, length)
            return data
        spans = self._spans(address, length, READ)
        result, local = buffers.new_bytes(length)
        self._copy(spans, local, READ)
        return result

    def read_into(self, address: BusAddress, buffer: "Buffer") -> int:
        """Copy guest memory into a writable buffer, as many bytes as the buffer has.

        Returns:
            The number of bytes.

        Raises:
            As `read`; the buffer may be filled in part when the memory is gone.
        """
        with buffers.BufferAddress(buffer, True) as (local, length):
            if length:
                self._copy(self._spans(address, length, READ), local, READ)
            return length

    def write(self, address: BusAddress, data: "Buffer") -> int:
        """Copy a buffer into guest memory, and mark the dirty log.

        Args:
            address: in the driver's address space.
            data: any contiguous buffer.

        Returns:
            The number of bytes.

        Raises:
            OutOfBounds, IotlbMiss, AccessDenied: nothing was written.
            Poisoned: the memory is gone; a part may have been written.
        """
        if type(data) is bytes or type(data) is bytearray:
            length = len(data)
            entry = self._find(address, length)
            if (
                entry is not None
                and entry.fast
                and not entry.read_only
                and not self._postcopy
                and length
            ):
                entry.borrow(entry.host + address - entry.guest, length)[:] = data
                self._mark([(entry, address, length)])
                if entry.poison.value:
                    raise Poisoned(address, length)
                return length
        with buffers.BufferAddress(data, False) as (local, length):
            if length:
                spans = self._spans(address, length, WRITE)
                try:
                    self._copy(spans, local, WRITE)
                finally:
                    self._mark(spans)
            return length

    def _copy(self, spans: Sequence[Span], local: int, access: int) -> None:
        for entry, guest, length in spans:
            if entry.host:
                host = entry.host + guest - entry.guest
                self._move(entry, host, guest, local, length, access)
                local += length
                continue
            end = guest + length
            while guest < end:  # on demand: a bounded number of pages at a time
                step = min(end, (guest + _PIN_AT_ONCE) & -_PIN_AT_ONCE) - guest
                host, token = entry.mapping.pin(guest, step, access)
                try:
                    self._move(entry, host, guest, local, step, access)
                finally:
                    entry.mapping.unpin(token)
                guest += step
                local += step

    def _move(
        self, entry: Entry, host: int, guest: int, local: int, length: int, access: int
    ) -> None:
        if entry.direct and not self._postcopy:
            if access == WRITE:
                _memmove(host, local, length)
            else:
                _memmove(local, host, length)
            if entry.poison.value:
                raise Poisoned(guest, length)
        elif entry.poison.value:
            raise Poisoned(guest, length)
        elif not copies.try_copy(host, local, length, access == WRITE):
            entry.poison.value = 1
            raise Poisoned(guest, length)

    def _mark(self, spans: Sequence[Span]) -> None:
        log = self._state.log
        if log is not None and log.enabled:
            try:
                for _, guest, length in spans:
                    log.mark(GuestAddress(guest), length)
            except UsageError:
                if log.enabled:  # otherwise the log was closed meanwhile, and logging is over
                    raise

    # Atomic words: aligned integers that the driver may read or write at the same time.

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
        # The kernel may copy a word in pieces. Two equal copies are a value that the word had,
        # unless the driver has gone through all values in between.
        span = [(entry, guest, size)]
        self._copy(span, ctypes.addressof(first), READ)
        for _ in range(_TRIES):  # if the guest keeps changing it, the value may be torn
            self._copy(span, ctypes.addressof(second), READ)
            if first.value == second.value:
                break
            first, second = second, first
        result: int = first.value
        return result

    def store(self, address: BusAddress, size: int, value: int) -> None:
        """Write an aligned little-endian word of 1, 2, 4 or 8 bytes, and mark the dirty log.

        The store is atomic where memory may be touched directly (sealed or guarded files).
        Elsewhere the kernel stores, which is atomic for single bytes only. The index of a split
        ring is safe all the same: see ``store_halfword``.

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
            if not atomics.store_halfword(host, value):
                entry.poison.value = 1
                raise Poisoned(guest, size)
        else:
            word = _WORDS[size](value)
            self._move(entry, host, guest, ctypes.addressof(word), size, WRITE)

    # Files, without a buffer in between.

    def copy_from_fd(
        self, address: BusAddress, fd: int, length: int, offset: int | None = None
    ) -> int:
        """Read from a file straight into guest memory (readv or preadv), and mark the dirty log.

        Args:
            address: in the driver's address space.
            fd: the file to read.
            length: bytes.
            offset: position in the file in bytes; None reads at the file's own position.

        Returns:
            The number of bytes read: may be fewer than `length`, and is 0 at the end of the file.

        Raises:
            OutOfBounds, IotlbMiss, AccessDenied: nothing was read.
            Poisoned: the memory is gone.
            OSError: the file's own errors.
        """
        return self._transfer(address, fd, length, offset, WRITE)

    def copy_to_fd(
        self, address: BusAddress, fd: int, length: int, offset: int | None = None
    ) -> int:
        """Write guest memory straight to a file (writev or pwritev).

        Arguments, result and errors are those of `copy_from_fd`.
        """
        return self._transfer(address, fd, length, offset, READ)

    def _transfer(self, address: int, fd: int, length: int, offset: int | None, access: int) -> int:
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return 0
        spans = self._spans(address, length, access)[:_IOV_MAX]
        held: list[Entry] = []
        views: list[memoryview] = []
        done = 0
        try:
            for entry, guest, size in spans:
                if entry.poison.value:
                    raise Poisoned(guest, size)
                if not entry.host:
                    entry = entry.pinned(guest, size, access)
                    held.append(entry)
                views.append(entry.borrow(entry.host + guest - entry.guest, size))
            try:
                if offset is None:
                    done = (os.readv if access == WRITE else os.writev)(fd, views)
                elif access == WRITE:
                    done = files.read_at(fd, views, offset)
                else:
                    done = files.write_at(fd, views, offset)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                self._find_hole(spans)
                raise Poisoned(address, length) from None
        finally:
            for entry in held:
                entry.release()
            if access == WRITE:
                self._mark(_first(spans, done))
        for entry, guest, size in spans:
            if entry.poison.value:
                raise Poisoned(guest, size)
        return done

    def _find_hole(self, spans: Sequence[Span]) -> None:
        """Poison the mappings whose memory is gone, or all of them when none can be found."""
        byte = ctypes.c_uint8()
        local = ctypes.addressof(byte)
        found = False
        for entry, guest, size in spans:
            if entry.host:
                host = entry.host + guest - entry.guest
                if not copies.try_copy(host + size - 1, local, 1, False):
                    entry.poison.value = 1
                    found = True
        if not found:
            for entry, _, _ in spans:
                entry.poison.value = 1

    # Views, without copies.

    def view(self, address: BusAddress, length: int, access: int = Access.READ_WRITE) -> memoryview:
        """Return a zero-copy view of a range; the view keeps the memory mapped.

        A view of memory that needs a guard keeps the whole snapshot, so that the guard goes on
        watching.

        Args:
            address: in the driver's address space.
            length: bytes.
            access: 1 (read) gives a read-only view.

        Raises:
            Unguarded: the memory may vanish and no guard is installed; use `read` and `write`.
            NotContiguous: the range has more than one piece; see `views`.
            OutOfBounds, IotlbMiss, AccessDenied, Poisoned.
        """
        return self._export(self._span(address, length, access), length, access)

    def views(
        self, address: BusAddress, length: int, access: int = Access.READ_WRITE
    ) -> list[memoryview]:
        """As `view`, for a range of any number of pieces; an empty range has none."""
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return []
        spans = self._spans(address, length, access)
        return [self._export(span, span[2], access) for span in spans]

    def _export(self, span: Span, length: int, access: int) -> memoryview:
        entry, guest, _ = span
        if not entry.direct:
            raise Unguarded(guest, length)
        if entry.poison.value:
            raise Poisoned(guest, length)
        if not entry.host:
            entry = entry.pinned(guest, length or 1, access)
        view = entry.export(entry.host + guest - entry.guest, length, self)
        return view if access & WRITE else view.toreadonly()


def _first(spans: Sequence[Span], count: int) -> list[Span]:
    """The spans of the first ``count`` bytes."""
    result: list[Span] = []
    for entry, guest, length in spans:
        if count <= 0:
            break
        result.append((entry, guest, min(length, count)))
        count -= length
    return result
