"""The dirty log: a bitmap shared with the front-end, one bit for each page that was written.

During a live migration the front-end clears bits while back-ends set them, so every bit is set by
an atomic OR. Without C the kernel does the OR: FUTEX_WAKE_OP changes a word of memory atomically
before it looks for waiters.
"""

import ctypes
import threading
from typing import Protocol

from .abi import ABI_VERSION, LOG_MAGIC, GmLog
from .addresses import GuestAddress, fits
from .errors import OutOfBounds, Poisoned, UsageError
from .linux import atomics
from .regions.region import Region
from .regions.shared import SharedMapping

PAGE_SHIFT = 12


class HasRegions(Protocol):
    """The part of a `GuestMemory` that `DirtyLog.covers` uses."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions."""


class DirtyLog:
    """The bitmap of SET_LOG_BASE. Page ``p`` of 4 KiB is bit ``p % 8`` of byte ``p // 8``.

    The log of a ring's used part (VHOST_VRING_F_LOG) goes to the same bitmap: mark the guest
    address that SET_VRING_ADDR gave for it.

    Args:
        fd: the shared file; borrowed.
        size: bytes of the bitmap.
        offset: where it begins in the file, in bytes.
        enabled: whether writes to buffers must be logged (VHOST_F_LOG_ALL is negotiated).
        guarded: a SIGBUS guard is installed, and watches `mapping` before the log is used. An
            engine that sets bits without the kernel's help needs the guard, or a file sealed
            against shrinking.

    Raises:
        InvalidRegion: empty, or beyond the end of the file.
        MappingFailed: the system refused.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        offset: int = 0,
        *,
        enabled: bool = False,
        guarded: bool = False,
    ) -> None:
        self._mapping = SharedMapping(fd, size, offset, guarded=guarded)
        self._lock = threading.Lock()  # keeps close() from pulling the bitmap from under mark()
        self._size = size
        self._struct = GmLog(
            LOG_MAGIC,
            ABI_VERSION,
            ctypes.sizeof(GmLog),
            PAGE_SHIFT,
            self._mapping.address,
            size,
            int(enabled),
            poison=self._mapping.poison_address,
        )

    @property
    def enabled(self) -> bool:
        """Whether writes to buffers must be logged. `mark` marks in any case."""
        return self._struct.enabled != 0

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._struct.enabled = int(value)

    @property
    def size(self) -> int:
        """Size of the bitmap in bytes."""
        return self._size

    @property
    def struct(self) -> GmLog:
        """The ``gm_log`` that C engines read; valid as long as this object is referenced."""
        return self._struct

    @property
    def struct_address(self) -> int:
        """Host address of `struct`."""
        return ctypes.addressof(self._struct)

    @property
    def mapping(self) -> SharedMapping:
        """The mapping of the bitmap. Callers must do no more than watch it with a guard."""
        return self._mapping

    @property
    def view(self) -> memoryview:
        """The bitmap as a view of format ``"B"``.

        Raises:
            UsageError: the log is closed.
        """
        return self._mapping.view

    def covers(self, memory: HasRegions) -> bool:
        """Tell whether the bitmap has a bit for every page of all regions."""
        return all(
            (region.guest_end - 1) >> PAGE_SHIFT < 8 * self._size for region in memory.regions
        )

    def mark(self, address: GuestAddress, length: int) -> None:
        """Set the bits of all pages that a range touches, each one atomically.

        Args:
            address: guest-physical address of the first byte written.
            length: bytes written; 0 marks nothing.

        Raises:
            OutOfBounds: the bitmap has no bit for a page of the range; nothing was marked.
            Poisoned: the front-end shrank the bitmap's file.
            UsageError: the log is closed.
        """
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return
        last = (address + length - 1) >> PAGE_SHIFT
        if not fits(address, length) or last >= 8 * self._size:
            raise OutOfBounds(address, length)
        with self._lock:
            # The kernel operates on whole 32-bit words. The first and the last may reach beyond the
            # bitmap, but not beyond its pages, and bits there are ORed with 0.
            base = self._mapping.address
            shift = 8 * (base & 3)
            base &= ~3
            bit, end = (address >> PAGE_SHIFT) + shift, last + shift + 1
            while bit < end:
                word, first = divmod(bit, 32)
                count = min(end - bit, 32 - first)
                mask = ((1 << count) - 1) << first
                if not atomics.atomic_or(base + 4 * word, mask):
                    self._mapping.poison()
                    raise Poisoned(address, length)
                bit += count
            if self._mapping.poisoned:  # a guard has put other pages there
                raise Poisoned(address, length)

    def close(self) -> None:
        """Unmap the bitmap. No C engine may use `struct` any more. Calling it again is harmless."""
        with self._lock:
            self._struct.enabled = 0
            self._struct.bitmap = 0
            self._struct.bitmap_size = 0
            self._struct.poison = 0
            self._mapping.close()

    def __enter__(self) -> "DirtyLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
