"""File transfer: copies between guest memory and files, without a buffer in between."""

import ctypes
import errno
import os
from collections.abc import Sequence

from ..addresses import READ, WRITE, BusAddress
from ..errors import Poisoned, UsageError
from ..linux import syscalls
from ..regions.entry import Entry, Span
from .read_write import ReadWrite

_IOV_MAX = 1024


class FileTransfer(ReadWrite):
    """Has the kernel read files into guest memory, and write it to files."""

    __slots__ = ()

    def copy_from_fd(
        self, address: BusAddress, fd: int, length: int, offset: int | None = None
    ) -> int:
        """Read from a file straight into guest memory (readv or preadv), and mark the dirty log.

        Args:
            address: in the driver's address space.
            fd: where to read.
            length: bytes.
            offset: position in the file in bytes; None reads at the file's own position.

        Returns:
            How many bytes were read, which may be fewer than asked for, 0 at the end of the file.

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
                if access == WRITE:
                    done = os.readv(fd, views) if offset is None else os.preadv(fd, views, offset)
                elif offset is None:
                    done = os.writev(fd, views)
                else:
                    done = os.pwritev(fd, views, offset)
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
        """Poison the mappings whose memory is gone; all of them when it cannot be told."""
        byte = ctypes.c_uint8()
        local = ctypes.addressof(byte)
        found = False
        for entry, guest, size in spans:
            if entry.host:
                host = entry.host + guest - entry.guest
                if not syscalls.try_copy(host + size - 1, local, 1, False):
                    entry.poison.value = 1
                    found = True
        if not found:
            for entry, _, _ in spans:
                entry.poison.value = 1


def _first(spans: Sequence[Span], count: int) -> list[Span]:
    """The spans that the first ``count`` bytes lie in."""
    result: list[Span] = []
    for entry, guest, length in spans:
        if count <= 0:
            break
        result.append((entry, guest, min(length, count)))
        count -= length
    return result
