"""Guest memory: an immutable table of regions, address look-ups in it, and access to the memory.

A `GuestMemory` never changes. Adding or removing a region, or taking over an IOTLB, makes another
snapshot that shares the mappings. A mapping is unmapped when the last snapshot or view that uses it
is gone. So the holder of a snapshot needs no lock, and no memory disappears under a request in
flight.

The address space of `read`, `write`, `load`, `store`, `pieces`, `translate` and `view` is the one
that the driver uses in descriptors: guest-physical addresses, or I/O virtual ones in a snapshot
made by `with_iotlb`.

This file makes snapshots out of others. The base classes, one file each, do the rest: the table and
its properties (``snapshot``), address look-ups (``translation``), and access (``access``).
"""

import os
from bisect import bisect_left
from collections.abc import Iterable

from ..addresses import READ, GuestAddress, UserAddress, fits
from ..dirty_log import DirtyLog
from ..errors import NoSuchRegion, TooManyRegions, UsageError
from ..iotlb import Iotlb
from ..regions.assembly import check_neighbours, check_overlaps, map_all, map_another
from ..regions.entry import Entry
from ..regions.mapping import Mapper
from ..regions.mmap_mapper import MmapMapper
from ..regions.pins import pinned_rows
from ..regions.region import MAX_MEM_SLOTS, Region
from ..regions.shared import allocate_memfd
from .access import Reachable
from .snapshot import State

_USER_DISTANCE = 1 << 46


class GuestMemory(Reachable):
    """An immutable snapshot of a guest's memory. ``GuestMemory()`` is empty.

    Methods may be called from any thread at any time.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self._assemble([], State(MmapMapper(), None, None, None, False))

    def __repr__(self) -> str:
        size = sum(region.size for region in self.regions)
        return f"<GuestMemory of {len(self)} regions, {size:#x} bytes>"

    @classmethod
    def map(
        cls, regions: Iterable[tuple[Region, int | None]], mapper: Mapper | None = None
    ) -> "GuestMemory":
        """Map a whole table (SET_MEM_TABLE).

        Args:
            regions: each region with the file descriptor that came with it; borrowed, the caller
                closes its descriptors afterwards.
            mapper: maps the regions; the default is ``MmapMapper()``. Later `add` calls use it too.

        Raises:
            TooManyRegions: more than `MAX_MEM_SLOTS`.
            InvalidRegion: a region that is empty, wraps around or is larger than its file.
            Overlap: two regions share guest or user addresses.
            MappingFailed: the system refused.

        After an error nothing stays mapped.
        """
        pairs = list(regions)
        if len(pairs) > MAX_MEM_SLOTS:
            raise TooManyRegions(len(pairs), MAX_MEM_SLOTS)
        for region, _ in pairs:
            region.check()
        check_overlaps([region for region, _ in pairs])
        mapper = MmapMapper() if mapper is None else mapper
        entries, window = map_all(pairs, mapper)
        return cls._make(entries, State(mapper, window, None, None, False))

    @classmethod
    def allocate(
        cls,
        size: int,
        guest_address: int = 0,
        user_address: int | None = None,
        mapper: Mapper | None = None,
    ) -> "tuple[GuestMemory, int]":
        """Create memory for a driver without a VMM: one region over a new, sealed memfd.

        Args:
            size: bytes.
            guest_address: guest-physical address of the first byte.
            user_address: user address of the first byte; the default is 2**46 away from the guest
                address, so that one is never taken for the other.
            mapper: maps the region; the default is ``MmapMapper()``.

        Returns:
            The snapshot, and the file descriptor, which the caller owns.

        Raises:
            UsageError, InvalidRegion, MappingFailed.
        """
        fd = allocate_memfd(size)
        try:
            if user_address is None:
                user_address = guest_address + _USER_DISTANCE
                if not fits(user_address, size):
                    user_address = guest_address - _USER_DISTANCE
            region = Region(GuestAddress(guest_address), size, UserAddress(user_address))
            memory = cls.map([(region, fd)], mapper)
        except BaseException:
            os.close(fd)
            raise
        return memory, fd

    def add(self, region: Region, fd: int | None, mapper: Mapper | None = None) -> "GuestMemory":
        """Return a snapshot with one more region (ADD_MEM_REG).

        The other mappings are shared with this snapshot, and keep their place in the window unless
        the window has to grow.

        Args:
            region: the region to add.
            fd: its file; borrowed.
            mapper: maps it; the default is the one that the table was made with.

        Raises:
            As `map`; this snapshot is unchanged, and nothing more is mapped.
        """
        base = self._base or self
        region.check()
        entries, state = base._entries, base._state
        if len(entries) >= MAX_MEM_SLOTS:
            raise TooManyRegions(len(entries) + 1, MAX_MEM_SLOTS)
        place = bisect_left(base._starts, region.guest_address)
        check_neighbours(region, entries[max(place - 1, 0) : place + 1], "guest")
        user_place = bisect_left(base._user_starts, region.user_address)
        check_neighbours(region, base._by_user[max(user_place - 1, 0) : user_place + 1], "user")
        entries, entry, window = map_another(
            entries,
            region,
            fd,
            state.mapper if mapper is None else mapper,
            state.window,
            # A postcopy front-end has been told the addresses, so no mapping may move.
            fixed=state.postcopy,
        )
        return self._make(
            [*entries[:place], entry, *entries[place:]], state._replace(window=window)
        )

    def remove(self, region: Region) -> "GuestMemory":
        """Return a snapshot without one region (REM_MEM_REG).

        Args:
            region: guest address, size and user address must be those of a region in the table;
                the other fields are ignored, as the specification says.

        Raises:
            NoSuchRegion: the table has no such region.
        """
        base = self._base or self
        place = bisect_left(base._starts, region.guest_address)
        if place == len(base._entries) or base._entries[place].region[:3] != region[:3]:
            raise NoSuchRegion(region.guest_address, region.size)
        entries = base._entries[:place] + base._entries[place + 1 :]
        return self._make(entries, base._state)

    def with_iotlb(self, iotlb: Iotlb | None) -> "GuestMemory":
        """Return a snapshot that translates I/O virtual addresses by the IOTLB's present entries.

        With None the snapshot takes guest-physical addresses again; a snapshot that already does
        is returned itself.
        """
        if iotlb is None and self._state.iotlb is None:
            return self
        frozen = None if iotlb is None else iotlb.freeze()
        return self._derive(self._state._replace(iotlb=frozen))

    def with_log(self, log: DirtyLog | None) -> "GuestMemory":
        """Return a snapshot whose `write`, `store` and `copy_from_fd` mark the pages they write.

        They do so while ``log.enabled`` is true. Code that writes through views, and engines, must
        mark their own writes. A snapshot that has this log already is returned itself.
        """
        if log is self._state.log:
            return self
        return self._derive(self._state._replace(log=log))

    def with_postcopy(self, active: bool) -> "GuestMemory":
        """Return a snapshot that knows whether pages may still be missing (postcopy).

        While they may, copies release the GIL and `bounded` is False, so that waiting for a page
        stops one thread and not the process.
        """
        return self._derive(self._state._replace(postcopy=active))

    def with_pins(self, ranges: Iterable[tuple[GuestAddress, int, int]]) -> "GuestMemory":
        """Return a snapshot in which parts of on-demand regions are mapped, as long as it lives.

        An engine uses memory that is mapped on demand in this way: it names the range that it needs
        (`NotMapped`), and goes on with a snapshot that has the range. Pins of this snapshot are
        kept in the new one. `add` and `remove` make snapshots without pins.

        Args:
            ranges: (guest-physical address, length, access), rounded to pages here. Parts that are
                mapped anyway are skipped, and parts pinned for another access are pinned anew.

        Raises:
            OutOfBounds: a range is not in guest memory.
            GuestMemoryError: the mapper could not map a part; no more is pinned than before.
        """
        base = self._base or self
        asked: list[tuple[Entry, int, int, int]] = []
        for address, length, access in ranges:
            if length <= 0:
                if length:
                    raise UsageError("a length cannot be negative")
                continue
            for entry, guest, size in base._physical(address, length, READ, address, length):
                asked.append((entry, guest, size, access))
        return self._make(pinned_rows(base._entries, self._entries, asked), self._state, base)
