"""Reading and writing: copies between guest memory and this process's own."""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..addresses import READ, WRITE, BusAddress, GuestAddress
from ..errors import Poisoned, UsageError
from ..linux import syscalls
from ..regions.entry import Entry, Span
from .translation import Translation

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIN_AT_ONCE = 1 << 20  # bytes of on-demand memory that a copy holds at a time
_string_at = ctypes.string_at
_memmove = ctypes.memmove


class ReadWrite(Translation):
    """Copies directly where memory cannot vanish, through the kernel elsewhere."""

    __slots__ = ()

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
        result, local = syscalls.new_bytes(length)
        self._copy(spans, local, READ)
        return result

    def read_into(self, address: BusAddress, buffer: "Buffer") -> int:
        """Copy a range of guest memory into a writable buffer, which says how long it is.

        Returns:
            The number of bytes.

        Raises:
            As `read`; the buffer may be filled in part when the memory is gone.
        """
        with syscalls.BufferAddress(buffer, True) as (local, length):
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
        with syscalls.BufferAddress(data, False) as (local, length):
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
        elif not syscalls.try_copy(host, local, length, access == WRITE):
            entry.poison.value = 1
            raise Poisoned(guest, length)

    def _mark(self, spans: Sequence[Span]) -> None:
        log = self._state.log
        if log is not None and log.enabled:
            try:
                for _, guest, length in spans:
                    log.mark(GuestAddress(guest), length)
            except UsageError:
                if log.enabled:  # otherwise it has been closed meanwhile, and logging is over
                    raise
