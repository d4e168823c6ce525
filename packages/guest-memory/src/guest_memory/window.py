"""The flat window: one range of this process in which all regions of a guest are mapped.

A device that gets offsets into one `memoryview` needs no look-up for each buffer. So a large range
is reserved (no access, no memory, no swap space), and regions are mapped into it. What is released
is covered with anonymous pages, never given back: nothing else of this process can ever land there,
and a stale view reads zeroes.
"""

import ctypes
import errno
import threading
from bisect import bisect_left, insort

from . import syscalls
from .addresses import align_up
from .errors import GuestMemoryError, MappingFailed

# Address space costs nothing, but there are only 47 bits of it (some aarch64 kernels: 39). 64 GiB
# leave room for 2,000 connections and for most guests' hotplug.
_USUAL_SIZE = 1 << 36
_HUGE = 1 << 21


class WindowFull(GuestMemoryError):
    """No gap in the window is large enough."""


class _Reservation:
    """The range itself; it is given back when the last mapping and the last view are gone."""

    def __init__(self, size: int) -> None:
        self.size = 0
        self._generation = syscalls.generation
        self._unmap = syscalls.unmap_memory  # still there when the module is being torn down
        self.base = syscalls.map_memory(
            0,
            size,
            syscalls.PROT_NONE,
            syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE,
            -1,
            0,
        )
        self.size = size
        syscalls.keep_private(self.base, size)

    def __del__(self) -> None:
        if self.size and self._generation == syscalls.generation:
            self._unmap(self.base, self.size)


class Window:
    """A reserved range and which parts of it are taken. Safe to use from several threads.

    Attributes:
        base: host address of the first byte.
        size: size in bytes.
        view: a writable memoryview of format ``"B"`` over all of it. Only bytes of mapped regions
        may
            be touched: the rest is not accessible, and an access ends the process.
    """

    def __init__(self, size: int) -> None:
        self._reservation = _Reservation(align_up(size, _HUGE))
        self.base: int = self._reservation.base
        self.size: int = self._reservation.size
        self._gaps = [(self.base, self.base + self.size)]
        self._lock = threading.Lock()
        self._generation = syscalls.generation
        exporter = (ctypes.c_ubyte * self.size).from_address(self.base)
        exporter.reservation = self._reservation  # type: ignore[attr-defined]
        self.view: memoryview = memoryview(exporter).cast("B")

    @classmethod
    def reserve(cls, needed: int) -> "Window | None":
        """Reserve a window with room for ``needed`` bytes, and ample room to grow if it can be had.

        Returns None when the address space has no such gap.
        """
        needed = align_up(max(needed, _HUGE), _HUGE)
        if needed >> 62:
            return None
        size = max(_USUAL_SIZE, 2 * needed)
        while True:
            try:
                return cls(max(size, needed))
            except MappingFailed as error:
                if error.errno != errno.ENOMEM or size <= needed:
                    return None
                size //= 2

    @property
    def taken(self) -> int:
        """How many bytes are in use or lie in gaps before the last one."""
        with self._lock:
            if self._gaps and self._gaps[-1][1] == self.base + self.size:
                return self._gaps[-1][0] - self.base
            return self.size

    def contains(self, address: int, length: int) -> bool:
        """Tell whether a range of host addresses lies in the window."""
        return self.base <= address and address + length <= self.base + self.size

    def take(self, length: int, alignment: int, remainder: int = 0) -> int:
        """Take ``length`` bytes at an address that leaves ``remainder`` modulo ``alignment``.

        Raises:
            WindowFull: no gap is large enough.
        """
        with self._lock:
            for index, (start, end) in enumerate(self._gaps):
                address = start + (remainder - start) % alignment
                if address + length <= end:
                    rest = [(start, address), (address + length, end)]
                    self._gaps[index : index + 1] = [gap for gap in rest if gap[0] < gap[1]]
                    return address
        raise WindowFull

    def give_back(self, address: int, length: int) -> None:
        """Return a range to which nothing is mapped."""
        with self._lock:
            index = bisect_left(self._gaps, (address, address))
            end = address + length
            if index < len(self._gaps) and self._gaps[index][0] == end:
                end = self._gaps.pop(index)[1]
            if index and self._gaps[index - 1][1] == address:
                address = self._gaps.pop(index - 1)[0]
            insort(self._gaps, (address, end))

    def cover(self, address: int, length: int) -> None:
        """Replace what is mapped at a range by anonymous zero pages, and return the range."""
        if self._generation != syscalls.generation:
            return  # a forked child has no window here, but may have something else
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
        flags |= syscalls.MAP_FIXED
        # Writable, so that a stale view cannot end the process. A system that does not overcommit
        # may refuse so much writable memory; what is left then still keeps strangers out of the
        # range.
        for prot in (syscalls.PROT_READ | syscalls.PROT_WRITE, syscalls.PROT_READ, 0):
            try:
                syscalls.map_memory(address, length, prot, flags, -1, 0)
            except MappingFailed as error:
                failure = error
            else:
                syscalls.keep_private(address, length)
                self.give_back(address, length)
                return
        raise failure
