"""The flat window: one range of this process in which all regions of a guest are mapped.

A device that gets offsets into one `memoryview` needs no look-up for each buffer. So a large range
is reserved (without access, memory or swap space), and regions are mapped into it. The place of a
released region is covered with anonymous pages and never given back to the system. So no other
mapping of this process can come there, and a stale view reads zeroes.
"""

import ctypes
import errno
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable

from ..addresses import align_up
from ..errors import GuestMemoryError, MappingFailed
from ..linux import syscalls

# Address space is free, but has only 47 bits (on some aarch64 kernels 39). 64 GiB leave room for
# 2,000 connections, and for the hotplug of most guests.
_USUAL_SIZE = 1 << 36
_HUGE = 1 << 21

# States of a place that comes back: free to be taken again; still mapped (it goes with the window);
# or lost, as another mapping may be there by now.
_FREE, _KEPT, _LOST = range(3)


class WindowFull(GuestMemoryError):
    """No gap in the window is large enough."""


class _Reservation:
    """The range itself, and the owner of its addresses.

    Places are taken and come back one by one, in any order and from any thread. They also come back
    from finalizers, which the garbage collector may run at any point. The range is unmapped only
    when nothing refers to it and every place is back: a place that is still out will be covered
    later, and no other mapping must be there by then.
    """

    def __init__(self, size: int) -> None:
        self.base = syscalls.map_memory(
            0,
            size,
            syscalls.PROT_NONE,
            syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE,
            -1,
            0,
        )
        self.size = size
        self.generation = syscalls.generation
        # Kept here: the modules may be empty already when the interpreter ends.
        self._may_unmap = syscalls.unmap_at_end
        self._unmap = syscalls.unmap_memory
        self._lock = threading.Lock()  # guards the three fields below
        self._gaps = [(self.base, self.base + size)]
        self._out = 0
        self._lost: list[tuple[int, int]] = []  # may belong to other mappings: see `restore`
        #: Places (start, end, state) that came back and still have to be entered.
        self._returned: deque[tuple[int, int, int]] = deque()
        self._referred = True
        self._mapped = [True]
        syscalls.keep_private(self.base, size)

    def __del__(self) -> None:
        if getattr(self, "_mapped", None):
            self._referred = False
            self._settle()

    @property
    def held(self) -> bool:
        """Whether the range is still ours, so that places in it may be mapped over."""
        return bool(self._mapped) and self._may_unmap(self.generation)

    @property
    def taken(self) -> int:
        with self._lock:
            if self._gaps and self._gaps[-1][1] == self.base + self.size:
                return self._gaps[-1][0] - self.base
            return self.size

    def take(self, length: int, alignment: int, remainder: int) -> int:
        if self.generation != syscalls.generation or not self._referred:
            raise WindowFull  # a forked child does not have the range, nor has a dropped window
        self._settle()
        try:
            with self._lock:
                for index, (start, end) in enumerate(self._gaps):
                    address = start + (remainder - start) % alignment
                    if address + length <= end:
                        rest = [(start, address), (address + length, end)]
                        self._gaps[index : index + 1] = [gap for gap in rest if gap[0] < gap[1]]
                        self._out += 1
                        return address
        finally:
            self._settle()
        raise WindowFull

    def put_back(self, address: int, length: int, state: int) -> None:
        self._returned.append((address, address + length, state))
        self._settle()

    def _settle(self) -> None:
        """Enter places that came back. The lock's holder does it for all, as finalizers cannot
        wait."""
        while self._returned and self._lock.acquire(False):
            try:
                while self._returned:
                    self._enter(*self._returned.popleft())
            finally:
                self._lock.release()
        if not self._referred and not self._out and not self._returned:
            self._release()

    def _enter(self, start: int, end: int, state: int) -> None:
        self._out -= 1
        if state == _LOST:
            insort(self._lost, (start, end))
        if state != _FREE:
            return
        index = bisect_left(self._gaps, (start, start))
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end = self._gaps.pop(index)[1]
        if index and self._gaps[index - 1][1] == start:
            start = self._gaps.pop(index - 1)[0]
        insort(self._gaps, (start, end))

    def _release(self) -> None:
        try:
            self._mapped.pop()  # atomic, with and without the GIL
        except IndexError:
            return
        if self._may_unmap(self.generation):
            position = self.base
            for start, end in [*self._lost, (self.base + self.size, 0)]:
                if position < start:
                    self._unmap(position, start - position)
                position = end


class Window:
    """A reserved range, and the parts of it that are taken. Safe to use from several threads.

    Attributes:
        base: host address of the first byte.
        size: size in bytes.
        view: a writable memoryview of format ``"B"`` over all of it. Only bytes of mapped regions
            may be touched: an access to any other byte ends the process.
    """

    def __init__(self, size: int) -> None:
        self._reservation = _Reservation(align_up(size, _HUGE))
        self.base: int = self._reservation.base
        self.size: int = self._reservation.size
        exporter = (ctypes.c_ubyte * self.size).from_address(self.base)
        exporter.reservation = self._reservation  # type: ignore[attr-defined]
        self.view: memoryview = memoryview(exporter).cast("B")

    @classmethod
    def reserve(cls, needed: int) -> "Window | None":
        """Reserve a window with room for ``needed`` bytes, and more to grow where possible.

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
        """The bytes that are in use, or lie in gaps before the last place."""
        return self._reservation.taken

    def contains(self, address: int, length: int) -> bool:
        """Tell whether a range of host addresses lies in the window."""
        return self.base <= address and address + length <= self.base + self.size

    def take(self, length: int, alignment: int, remainder: int = 0) -> int:
        """Take ``length`` bytes at an address that leaves ``remainder`` modulo ``alignment``.

        The caller must return each place once, by `give_back`, `restore` or `cover`. Until then the
        window stays reserved.

        Raises:
            WindowFull: no gap is large enough.
        """
        return self._reservation.take(length, alignment, remainder)

    def map(self, length: int, alignment: int, prot: int, flags: int, fd: int, offset: int) -> int:
        """Take a place that agrees with ``offset`` modulo ``alignment``, and mmap a file there.

        Raises:
            WindowFull, MappingFailed: nothing is mapped.
        """

        def attempt(address: int) -> int:
            fixed = syscalls.MAP_FIXED if address else 0
            return syscalls.map_memory(address, length, prot, flags | fixed, fd, offset)

        return self._fill(length, alignment, offset % alignment, attempt)

    def duplicate(self, address: int, length: int, alignment: int) -> int:
        """Take a place, and map there again the shared memory at ``address`` (not in this window).

        Raises:
            WindowFull, MappingFailed: nothing is mapped.
        """

        def attempt(target: int) -> int:
            return syscalls.duplicate_mapping(address, length, target)

        return self._fill(length, alignment, address % alignment, attempt)

    def _fill(
        self, length: int, alignment: int, remainder: int, attempt: Callable[[int], int]
    ) -> int:
        # A refused MAP_FIXED may still have unmapped the place, and another thread's mapping could
        # then come into the hole. So first try to map the same anywhere.
        syscalls.unmap_memory(attempt(0), length)
        address = self.take(length, alignment, remainder)
        try:
            attempt(address)
        except BaseException:
            self.restore(address, length)
            raise
        return address

    def give_back(self, address: int, length: int) -> None:
        """Return a place with no mapping, or with one that is not used any more.

        Such a mapping stays until the place is taken again or the window goes; `cover` replaces it
        at once.
        """
        self._reservation.put_back(address, length, _FREE)

    def restore(self, address: int, length: int) -> None:
        """Return a place where the kernel has refused a mapping.

        A refused MAP_FIXED may have left a hole, and another mapping of this process may have come
        into it. Where that is possible, the place is never used again and never unmapped.
        """
        reservation = self._reservation
        if reservation.held:
            held = syscalls.reserve_hole(address, length)
            reservation.put_back(address, length, _FREE if held else _LOST)

    def cover(self, address: int, length: int) -> None:
        """Replace the mapping at a place by anonymous zero pages, and return the place.

        Raises:
            MappingFailed: the system refused; the old mapping stays until the window goes.
        """
        reservation = self._reservation
        if not reservation.held:
            return
        # Writable pages, so that a write by a stale view cannot end the process. A system without
        # overcommit may refuse so many; read-only pages still keep other mappings out. Try it
        # elsewhere first, as a refused MAP_FIXED may leave a hole.
        prot = syscalls.PROT_READ | syscalls.PROT_WRITE
        try:
            syscalls.unmap_memory(_zero_pages(0, length, prot), length)
        except MappingFailed:
            prot = syscalls.PROT_READ
        try:
            _zero_pages(address, length, prot)
        except MappingFailed:
            if not syscalls.reserve_hole(address, length):
                reservation.put_back(address, length, _KEPT)
                raise
        syscalls.keep_private(address, length)
        reservation.put_back(address, length, _FREE)


def _zero_pages(address: int, length: int, prot: int) -> int:
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
    flags |= syscalls.MAP_FIXED if address else 0
    return syscalls.map_memory(address, length, prot, flags, -1, 0)
