"""Guest memory: an immutable table of regions, how to find things in it, and how to reach them.

A `GuestMemory` never changes. Adding or removing a region, or taking over an IOTLB, makes another
snapshot that shares the mappings; a mapping goes when the last snapshot or view that uses it is
gone. So whoever holds a snapshot needs no lock, and nobody's memory disappears under a request in
flight.

The address space of `read`, `write`, `load`, `store`, `pieces`, `translate` and `view` is the one
that the driver uses in descriptors: guest-physical addresses, or I/O virtual ones in a snapshot
made by `with_iotlb`.
"""

import ctypes
import errno
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from . import syscalls
from .abi import (
    ABI_VERSION,
    REGION_ON_DEMAND,
    REGION_READ_ONLY,
    REGION_RECORD,
    REGION_UNGUARDED,
    TABLE_IOMMU,
    TABLE_MAGIC,
    GmTable,
)
from .addresses import Access, BusAddress, GuestAddress, UserAddress, fits
from .errors import (
    AccessDenied,
    AccessError,
    GuestMemoryError,
    Misaligned,
    NoSuchRegion,
    NotContiguous,
    NotMapped,
    OutOfBounds,
    Overlap,
    Poisoned,
    TooManyRegions,
    Unguarded,
    UsageError,
)
from .iotlb import FrozenIotlb, Iotlb
from .mapping import Mapper, Mapping, WindowMapper, WindowMapping
from .mmap_mapper import MmapMapper
from .region import MAX_MEM_SLOTS, Region
from .shared import allocate_memfd
from .window import Window, WindowFull

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .dirty_log import DirtyLog

_READ = 1
_WRITE = 2
_WORDS: dict[int, Any] = {
    1: ctypes.c_uint8,
    2: ctypes.c_uint16,
    4: ctypes.c_uint32,
    8: ctypes.c_uint64,
}
_PIN_AT_ONCE = 1 << 20  # bytes of on-demand memory that a copy holds at a time
_IOV_MAX = 1024
_TRIES = 64
_USER_DISTANCE = 1 << 46
_string_at = ctypes.string_at
_memmove = ctypes.memmove


class Segment(NamedTuple):
    """A piece of guest memory that is contiguous in both address spaces.

    Attributes:
        host: host address of the first byte; 0 when it is mapped on demand.
        guest: guest-physical address of the first byte.
        length: bytes.
    """

    host: int
    guest: GuestAddress
    length: int


class _Entry:
    """A row of the table: a region, or a part of one, and the memory behind it.

    Snapshots and views share entries; the memory is released with the entry.
    """

    __slots__ = (
        "__weakref__",
        "_array",
        "_finish",
        "_view",
        "access",
        "bounded",
        "direct",
        "end",
        "fast",
        "guest",
        "host",
        "mapping",
        "page_size",
        "parent",
        "poison",
        "read_only",
        "record",
        "region",
        "sealed",
        "user",
        "user_end",
    )

    poison: ctypes.c_uint32

    def __init__(
        self,
        region: Region,
        mapping: Mapping,
        finish: Callable[[], object],
        *,
        parent: "_Entry | None" = None,
        start: int = 0,
        size: int = 0,
        host: int | None = None,
        access: int = _READ | _WRITE,
    ) -> None:
        self._finish = [finish]  # first of all: from here on the entry owns the memory
        self.region = region
        self.mapping = mapping
        self.parent = parent
        size = size or region.size
        self.guest = region.guest_address + start
        self.end = self.guest + size
        self.user = region.user_address + start
        self.user_end = self.user + size
        self.host = host or 0
        self.page_size = mapping.page_size
        self.access = access
        self.read_only = not access & _WRITE or bool(getattr(mapping, "read_only", False))
        self.bounded = bool(getattr(mapping, "bounded", False))
        self.sealed = bool(getattr(mapping, "sealed", True))
        self.direct = self.sealed or bool(getattr(mapping, "guarded", False))
        self.fast = self.direct and self.bounded and self.host != 0
        if parent is not None:
            self.poison = parent.poison
        else:
            word = getattr(mapping, "poison_address", 0)
            # The mapping keeps its own word alive, and the entry keeps the mapping.
            self.poison = ctypes.c_uint32.from_address(word) if word else ctypes.c_uint32()
        flags = (
            REGION_ON_DEMAND * (not self.host)
            | REGION_READ_ONLY * self.read_only
            | REGION_UNGUARDED * (not self.direct)
        )
        self.record = REGION_RECORD.pack(
            self.guest,
            size,
            self.user,
            self.host,
            ctypes.addressof(self.poison),
            self.page_size,
            flags,
        )
        self._view: memoryview | None = None
        self._array: Any = None

    @classmethod
    def of(cls, region: Region, mapping: Mapping) -> "_Entry":
        """Take over a mapping, which is closed when that fails."""
        try:
            host = mapping.host_address
            if host is not None and not (host > 0 and fits(host, region.size)):
                raise UsageError("the mapper returned an address that is none")
            return cls(region, mapping, mapping.close, host=host)
        except BaseException:
            mapping.close()
            raise

    def pinned(self, guest: int, length: int, access: int) -> "_Entry":
        """Make a part of an on-demand region accessible for as long as the new entry lives."""
        host, token = self.mapping.pin(guest, length, access)
        start = guest - self.region.guest_address

        def unpin(mapping: Mapping = self.mapping) -> None:
            mapping.unpin(token)

        try:
            return _Entry(
                self.region,
                self.mapping,
                unpin,
                parent=self,
                start=start,
                size=length,
                host=host,
                access=access,
            )
        except BaseException:
            unpin()
            raise

    def release(self) -> None:
        try:
            finish = self._finish.pop()  # atomic, with and without the GIL
        except IndexError:
            return
        finish()

    def __del__(self) -> None:
        self.release()

    def export(self, host: int, length: int, snapshot: "GuestMemory") -> memoryview:
        """A view that keeps the memory mapped as long as it exists, or a slice of it."""
        if self._array is None:
            self._array = ctypes.c_ubyte * (self.end - self.guest)
        exporter = self._array.from_address(self.host)
        # Where a guard watches snapshots, the view has to keep the snapshot too.
        exporter.owner = self if self.sealed else (self, snapshot)
        offset = host - self.host
        return memoryview(exporter).cast("B")[offset : offset + length]

    def borrow(self, host: int, length: int) -> memoryview:
        """A view for use while somebody holds the entry anyway; cheaper than `export`."""
        view = self._view
        if view is None:
            exporter = (ctypes.c_ubyte * (self.end - self.guest)).from_address(self.host)
            view = self._view = memoryview(exporter).cast("B")
        offset = host - self.host
        return view[offset : offset + length]


_Span = tuple[_Entry, int, int]  # entry, guest-physical address, length


class _State(NamedTuple):
    """What snapshots inherit from each other besides regions."""

    mapper: Mapper
    window: Window | None
    iotlb: FrozenIotlb | None
    log: "DirtyLog | None"
    postcopy: bool


class GuestMemory:
    """An immutable snapshot of a guest's memory. ``GuestMemory()`` is empty.

    Methods may be called from any thread at any time.
    """

    __slots__ = (
        "__weakref__",
        "_base",
        "_by_user",
        "_entries",
        "_hint",
        "_order",
        "_physical_addresses",
        "_postcopy",
        "_records",
        "_starts",
        "_state",
        "_table",
        "_user_starts",
        "_view",
    )

    _entries: list[_Entry]
    _starts: list[int]
    _by_user: list[_Entry]
    _user_starts: list[int]
    _order: "array[int]"
    _records: bytes
    _state: _State
    _base: "GuestMemory | None"
    _hint: int
    _postcopy: bool
    _physical_addresses: bool
    _table: GmTable
    _view: memoryview | None

    def __init__(self) -> None:
        self._assemble([], _State(MmapMapper(), None, None, None, False))

    # --- making snapshots ------------------------------------------------------------------------

    @classmethod
    def map(
        cls, regions: Iterable[tuple[Region, int | None]], mapper: Mapper | None = None
    ) -> "GuestMemory":
        """Map a whole table (SET_MEM_TABLE).

        Args:
            regions: each region with the file descriptor that came with it; borrowed, the caller
                closes its descriptors afterwards.
            mapper: how to map; the default is ``MmapMapper()``. Later `add` calls use it too.

        Raises:
            TooManyRegions: more than `MAX_MEM_SLOTS`.
            InvalidRegion: a region that is empty, wraps around or is larger than its file.
            Overlap: two regions share guest or user addresses.
            MappingFailed: the system refused.

        Whatever is raised, nothing stays mapped.
        """
        pairs = list(regions)
        if len(pairs) > MAX_MEM_SLOTS:
            raise TooManyRegions(len(pairs), MAX_MEM_SLOTS)
        for region, _ in pairs:
            region.check()
        _check_overlaps([region for region, _ in pairs])
        mapper = MmapMapper() if mapper is None else mapper
        window = None
        if pairs and isinstance(mapper, WindowMapper):
            window = Window.reserve(sum(_room(region) for region, _ in pairs))
        entries: list[_Entry] = []
        try:
            for region, fd in pairs:
                try:
                    entry = _map_one(mapper, region, fd, window)
                except WindowFull:  # pages so large that even ample room cannot be aligned to them
                    entry = _map_one(mapper, region, fd, None)
                entries.append(entry)
        except BaseException:
            for entry in entries:
                entry.release()
            raise
        entries.sort(key=_guest_of)
        return cls._make(entries, _State(mapper, window, None, None, False))

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
            mapper: how to map; the default is ``MmapMapper()``.

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
            region: what to add.
            fd: its file; borrowed.
            mapper: how to map it; the default is the one that the table was made with.

        Raises:
            As `map`; this snapshot is unchanged, and nothing more is mapped.
        """
        base = self._base or self
        region.check()
        entries, state = base._entries, base._state
        if len(entries) >= MAX_MEM_SLOTS:
            raise TooManyRegions(len(entries) + 1, MAX_MEM_SLOTS)
        place = bisect_left(base._starts, region.guest_address)
        _check_neighbours(region, entries[max(place - 1, 0) : place + 1], "guest")
        user_place = bisect_left(base._user_starts, region.user_address)
        _check_neighbours(region, base._by_user[max(user_place - 1, 0) : user_place + 1], "user")
        mapper = state.mapper if mapper is None else mapper
        window = state.window
        fresh: list[_Entry] = []
        try:
            if isinstance(mapper, WindowMapper):
                if window is None:
                    window = Window.reserve(_room(region))
                try:
                    entry = _map_one(mapper, region, fd, window)
                except WindowFull:
                    # A postcopy front-end has been told the addresses: nothing may move then.
                    bigger = None if state.postcopy else _bigger(window, _room(region))
                    if bigger is not None:
                        entries = _move_over(entries, window, bigger, fresh)
                        window = bigger
                    try:
                        entry = _map_one(mapper, region, fd, bigger)
                    except WindowFull:
                        entry = _map_one(mapper, region, fd, None)
            else:
                entry = _map_one(mapper, region, fd, None)
        except BaseException:
            for other in fresh:
                other.release()
            raise
        return self._make(
            [*entries[:place], entry, *entries[place:]], state._replace(window=window)
        )

    def remove(self, region: Region) -> "GuestMemory":
        """Return a snapshot without one region (REM_MEM_REG).

        Args:
            region: guest address, size and user address must be those of a region in the table;
                the other fields are ignored, as the specification says.

        Raises:
            NoSuchRegion: there is none.
        """
        base = self._base or self
        place = bisect_left(base._starts, region.guest_address)
        if place == len(base._entries) or base._entries[place].region[:3] != region[:3]:
            raise NoSuchRegion(region.guest_address, region.size)
        entries = base._entries[:place] + base._entries[place + 1 :]
        return self._make(entries, base._state)

    def with_iotlb(self, iotlb: Iotlb | None) -> "GuestMemory":
        """Return a snapshot that translates I/O virtual addresses by the IOTLB's present entries.

        With None the snapshot takes guest-physical addresses again.
        """
        frozen = None if iotlb is None else iotlb.freeze()
        return self._derive(self._state._replace(iotlb=frozen))

    def with_log(self, log: "DirtyLog | None") -> "GuestMemory":
        """Return a snapshot whose `write`, `store` and `copy_from_fd` mark what they wrote.

        They do so while ``log.enabled`` is true. Writes through views and by other engines are
        theirs to mark.
        """
        return self._derive(self._state._replace(log=log))

    def with_postcopy(self, active: bool) -> "GuestMemory":
        """Return a snapshot that knows whether pages may still be on their way (postcopy).

        While they may, copies release the GIL and `bounded` is False, so that a page which is
        waited for stops one thread and not the process.
        """
        return self._derive(self._state._replace(postcopy=active))

    def with_pins(self, ranges: Iterable[tuple[GuestAddress, int, int]]) -> "GuestMemory":
        """Return a snapshot in which parts of on-demand regions are mapped, as long as it lives.

        This is how an engine gets at memory that is mapped on demand: it says which range it needs
        (`NotMapped`), and goes on with the snapshot in which the range is there. What this snapshot
        has pinned stays pinned in the new one. `add` and `remove` make snapshots without pins.

        Args:
            ranges: (guest-physical address, length, access); rounded to pages here. Parts that are
                mapped anyway are skipped, and parts pinned for another access are pinned anew.

        Raises:
            OutOfBounds: a range that is not in guest memory.
            GuestMemoryError: the mapper could not map one; nothing more is pinned than before.
        """
        base = self._base or self
        kept = [entry for entry in self._entries if entry.parent is not None and entry.host]
        wanted: list[tuple[_Entry, int, int, int]] = []
        for address, length, access in ranges:
            if length <= 0:
                if length:
                    raise UsageError("a length cannot be negative")
                continue
            for entry, guest, size in base._physical(address, length, _READ, address, length):
                if entry.host:
                    continue
                page = entry.page_size
                start = max(guest & -page, entry.guest)
                end = min(-(-(guest + size) & -page), entry.end)
                for old in kept[:]:
                    if old.guest < end and start < old.end and access & ~old.access:
                        kept.remove(old)
                        wanted.append((entry, old.guest, old.end, access | old.access))
                wanted.append((entry, start, end, access))
        wanted.sort(key=lambda item: item[1:])
        merged: list[tuple[_Entry, int, int, int]] = []
        for entry, start, end, access in wanted:
            if merged and merged[-1][0] is entry and start <= merged[-1][2]:
                _, first, last, before = merged[-1]
                if start < last or access == before:
                    merged[-1] = (entry, first, max(last, end), before | access)
                    continue
            merged.append((entry, start, end, access))
        missing: list[tuple[_Entry, int, int, int]] = []
        for entry, start, end, access in merged:
            for old in kept:
                if old.guest < end and start < old.end:
                    if start < old.guest:
                        missing.append((entry, start, old.guest, access))
                    start = old.end
            if start < end:
                missing.append((entry, start, end, access))
        pinned: list[_Entry] = []
        try:
            for entry, start, end, access in missing:
                pinned.append(entry.pinned(start, end - start, access))
        except BaseException:
            for entry in pinned:
                entry.release()
            raise
        rows: list[_Entry] = []
        parts = iter(sorted([*kept, *pinned], key=_guest_of))
        part = next(parts, None)
        for entry in base._entries:
            position = entry.guest
            while part is not None and part.parent is entry:
                if position < part.guest:
                    rows.append(_rest(entry, position, part.guest))
                rows.append(part)
                position = part.end
                part = next(parts, None)
            if position == entry.guest:
                rows.append(entry)
            elif position < entry.end:
                rows.append(_rest(entry, position, entry.end))
        return self._make(rows, self._state, base)

    @classmethod
    def _make(
        cls, entries: list[_Entry], state: _State, base: "GuestMemory | None" = None
    ) -> "GuestMemory":
        memory = cls.__new__(cls)
        memory._assemble(entries, state, base)
        return memory

    def _assemble(
        self, entries: list[_Entry], state: _State, base: "GuestMemory | None" = None
    ) -> None:
        self._entries = entries
        self._starts = [entry.guest for entry in entries]
        users = [entry.user for entry in entries]
        order = sorted(range(len(users)), key=users.__getitem__)
        self._order = array("I", order)
        self._by_user = [entries[index] for index in order]
        self._user_starts = [users[index] for index in order]
        self._records = b"".join([entry.record for entry in entries])
        self._base = base
        self._hint = 0
        self._enter(state)

    def _derive(self, state: _State) -> "GuestMemory":
        memory = self.__class__.__new__(self.__class__)
        for name in (
            "_entries",
            "_starts",
            "_order",
            "_by_user",
            "_user_starts",
            "_records",
            "_base",
            "_hint",
        ):
            setattr(memory, name, getattr(self, name))
        memory._enter(state)
        return memory

    def _enter(self, state: _State) -> None:
        """Build the C table over what is there."""
        self._state = state
        self._postcopy = state.postcopy
        self._physical_addresses = state.iotlb is None
        iotlb, window = state.iotlb, state.window
        if window is not None and not any(
            entry.host and window.contains(entry.host, entry.end - entry.guest)
            for entry in self._entries
        ):
            window = None
        self._view = None if window is None else window.view
        self._table = GmTable(
            TABLE_MAGIC,
            ABI_VERSION,
            ctypes.sizeof(GmTable),
            len(self._entries),
            syscalls.address_of(self._records),
            self._order.buffer_info()[0],
            0 if iotlb is None else syscalls.address_of(iotlb.records),
            0 if iotlb is None else len(iotlb.entries),
            0 if iotlb is None else TABLE_IOMMU,
            0 if window is None else window.base,
            0 if window is None else window.size,
        )

    # --- what is there ---------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, sorted by guest address."""
        return tuple(entry.region for entry in (self._base or self)._entries)

    def __len__(self) -> int:
        return len((self._base or self)._entries)

    def __repr__(self) -> str:
        size = sum(region.size for region in self.regions)
        return f"<GuestMemory of {len(self)} regions, {size:#x} bytes>"

    @property
    def host_addresses(self) -> tuple[int | None, ...]:
        """Where the regions are in this process, in their order; None for those mapped on demand.

        A postcopy front-end is told these (the answer to SET_MEM_TABLE in postcopy).
        """
        return tuple(entry.host or None for entry in (self._base or self)._entries)

    @property
    def ranges(self) -> tuple[tuple[int, int, int], ...]:
        """(host address, length, page size) of what is mapped, widened to whole pages."""
        result = []
        for entry in (self._base or self)._entries:
            if entry.host:
                page = entry.page_size
                start = entry.host & -page
                end = -(-(entry.host + entry.end - entry.guest) & -page)
                result.append((start, end - start, page))
        return tuple(result)

    @property
    def table(self) -> GmTable:
        """The C view of this snapshot; valid as long as the snapshot is referenced."""
        return self._table

    @property
    def table_address(self) -> int:
        """Host address of `table`."""
        return ctypes.addressof(self._table)

    @property
    def pins(self) -> int:
        """How many requests a C engine has taken and not yet completed with this snapshot.

        Whoever runs the engine keeps a reference to the snapshot while this is not zero.
        """
        return self._table.pins

    @property
    def window(self) -> memoryview | None:
        """The flat window, writable, format ``"B"``; None when no region lies in it.

        The byte at host address ``h`` is at index ``h - window_base``. Only bytes of mapped regions
        may be touched. It does not keep regions mapped: those that are released read as zeroes.
        """
        return self._view

    @property
    def window_base(self) -> int:
        """Host address of the window's first byte, 0 when there is none."""
        return self._table.window_base

    @property
    def poisoned(self) -> bool:
        """True when an access to some region has failed because its file had been truncated."""
        return any(
            entry.poison.value or entry.mapping.poisoned for entry in (self._base or self)._entries
        )

    @property
    def bounded(self) -> bool:
        """True when no access can wait for another process: memory files only, and no postcopy."""
        return not self._postcopy and all(entry.bounded for entry in self._entries)

    @property
    def iommu(self) -> bool:
        """True when the snapshot takes I/O virtual addresses."""
        return self._state.iotlb is not None

    # --- translation -----------------------------------------------------------------------------

    def _index(self, address: int) -> int:
        """Index of the entry that holds a guest-physical address, or -1."""
        starts = self._starts
        hint = self._hint  # any value that was valid once is: the table does not change
        if hint < len(starts) and starts[hint] <= address < self._entries[hint].end:
            return hint
        index = bisect_right(starts, address) - 1
        if index >= 0 and address < self._entries[index].end:
            self._hint = index
            return index
        return -1

    def _find(self, address: int, length: int) -> _Entry | None:
        """The short way: the entry that holds a range, if it is one and the range is not empty."""
        if self._physical_addresses and length > 0:
            starts, entries = self._starts, self._entries
            index = self._hint
            if index < len(starts) and starts[index] <= address:
                entry = entries[index]
                if address + length <= entry.end:
                    return entry
            index = bisect_right(starts, address) - 1
            if index >= 0:
                entry = entries[index]
                if address + length <= entry.end:
                    self._hint = index
                    return entry
        return None

    def _physical(
        self, address: int, length: int, access: int, whole: int, whole_length: int
    ) -> list[_Span]:
        """Split a range of guest-physical addresses; errors name the whole range."""
        index = self._index(address)
        if index < 0:
            raise OutOfBounds(whole, whole_length)
        entries = self._entries
        entry = entries[index]
        if access & _WRITE and entry.read_only:
            raise _refusal(entry, whole, whole_length, access)
        room = entry.end - address
        if length <= room:
            return [(entry, address, length)]
        spans = [(entry, address, room)]
        length -= room
        while length:
            previous = entry
            index += 1
            if index == len(entries) or entries[index].guest != previous.end:
                raise OutOfBounds(whole, whole_length)
            entry = entries[index]
            if access & _WRITE and entry.read_only:
                raise _refusal(entry, whole, whole_length, access)
            room = min(length, entry.end - entry.guest)
            spans.append((entry, entry.guest, room))
            length -= room
        return spans

    def _user(
        self, address: int, length: int, access: int, whole: int, whole_length: int
    ) -> list[_Span]:
        """Split a range of user addresses; errors name the whole range."""
        spans: list[_Span] = []
        index = bisect_right(self._user_starts, address) - 1
        while True:
            if not 0 <= index < len(self._by_user):
                raise OutOfBounds(whole, whole_length)
            entry = self._by_user[index]
            if not entry.user <= address < entry.user_end:
                raise OutOfBounds(whole, whole_length)
            if access & _WRITE and entry.read_only:
                raise _refusal(entry, whole, whole_length, access)
            room = min(length, entry.user_end - address)
            spans.append((entry, entry.guest + address - entry.user, room))
            length -= room
            if not length:
                return spans
            address += room
            index += 1

    def _spans(self, address: int, length: int, access: int) -> list[_Span]:
        """Split a range of the driver's addresses, which is not empty."""
        iotlb = self._state.iotlb
        if iotlb is None:
            return self._physical(address, length, access, address, length)
        spans: list[_Span] = []
        for user, size in iotlb.lookup(address, length, access):
            spans += self._user(user, size, access, address, length)
        return spans

    def _span(self, address: int, length: int, access: int) -> _Span:
        """The one piece of a range of the driver's addresses; an empty range counts as one byte."""
        if length < 0:
            raise UsageError("a length cannot be negative")
        spans = self._spans(address, length or 1, access)
        if len(spans) > 1:
            raise NotContiguous(address, length)
        return spans[0]

    def segments(
        self, address: BusAddress, length: int, access: int = Access.READ_WRITE
    ) -> list[Segment]:
        """Split a range into pieces, with host and guest-physical addresses.

        Args:
            address: in the driver's address space (guest-physical, or an IOVA with an IOTLB).
            length: bytes; 0 gives an empty list.
            access: 1 read, 2 write, 3 both.

        Returns:
            Pieces in order. Those of on-demand regions have host address 0.

        Raises:
            OutOfBounds: a part of the range is no guest memory.
            IotlbMiss, AccessDenied: what the IOTLB has to say.
        """
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return []
        return [
            Segment(entry.host and entry.host + guest - entry.guest, GuestAddress(guest), size)
            for entry, guest, size in self._spans(address, length, access)
        ]

    def pieces(
        self, address: BusAddress, length: int, access: int = Access.READ_WRITE
    ) -> list[tuple[int, int]]:
        """Split a range into (host address, length) pieces.

        Arguments and errors are those of `segments`, and:

        Raises:
            NotMapped: a part of the range is mapped on demand.
        """
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return []
        result = []
        for entry, guest, size in self._spans(address, length, access):
            if not entry.host:
                raise NotMapped(guest, size, access)
            result.append((entry.host + guest - entry.guest, size))
        return result

    def translate(self, address: BusAddress, length: int, access: int = Access.READ_WRITE) -> int:
        """Return the host address of a range that is contiguous in this process.

        Arguments and errors are those of `pieces`, and:

        Raises:
            NotContiguous: the range has more than one piece.
        """
        found = self._find(address, length)
        if found is not None and found.host and not (found.read_only and access & _WRITE):
            return found.host + address - found.guest
        entry, guest, _ = self._span(address, length, access)
        if not entry.host:
            raise NotMapped(guest, length, access)
        return entry.host + guest - entry.guest

    def translate_user(
        self, address: UserAddress, length: int, access: int = Access.READ_WRITE
    ) -> int:
        """Return the host address of a contiguous range of user addresses (rings: SET_VRING_ADDR).

        Raises:
            OutOfBounds, NotContiguous, AccessDenied, NotMapped.
        """
        if length < 0:
            raise UsageError("a length cannot be negative")
        spans = self._user(address, length or 1, access, address, length)
        if len(spans) > 1:
            raise NotContiguous(address, length)
        entry, guest, _ = spans[0]
        if not entry.host:
            raise NotMapped(guest, length, access)
        return entry.host + guest - entry.guest

    def user_to_guest(self, address: UserAddress) -> GuestAddress:
        """Translate a user address to a guest-physical one.

        Raises:
            OutOfBounds: it belongs to no region.
        """
        return GuestAddress(self._user(address, 1, _READ, address, 1)[0][1])

    def view(self, address: BusAddress, length: int, access: int = Access.READ_WRITE) -> memoryview:
        """Return a zero-copy view of a range, which keeps the memory mapped as long as it exists.

        A view of memory that needs a guard keeps the whole snapshot, so that it stays watched.

        Args:
            address: in the driver's address space.
            length: bytes.
            access: with 1 (read) the view is read-only.

        Raises:
            Unguarded: the memory may vanish and no guard is installed; use `read` and `write`.
            NotContiguous: the range has more than one piece; see `views`.
            OutOfBounds, IotlbMiss, AccessDenied, Poisoned.
        """
        return self._export(self._span(address, length, access), length, access)

    def views(
        self, address: BusAddress, length: int, access: int = Access.READ_WRITE
    ) -> list[memoryview]:
        """The same as `view` for ranges of any number of pieces; an empty range has none."""
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return []
        spans = self._spans(address, length, access)
        return [self._export(span, span[2], access) for span in spans]

    def _export(self, span: _Span, length: int, access: int) -> memoryview:
        entry, guest, _ = span
        if not entry.direct:
            raise Unguarded(guest, length)
        if entry.poison.value:
            raise Poisoned(guest, length)
        if not entry.host:
            entry = entry.pinned(guest, length or 1, access)
        view = entry.export(entry.host + guest - entry.guest, length, self)
        return view if access & _WRITE else view.toreadonly()

    # --- copies ----------------------------------------------------------------------------------

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
        spans = self._spans(address, length, _READ)
        result, local = syscalls.new_bytes(length)
        self._copy(spans, local, _READ)
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
                self._copy(self._spans(address, length, _READ), local, _READ)
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
                spans = self._spans(address, length, _WRITE)
                try:
                    self._copy(spans, local, _WRITE)
                finally:
                    self._mark(spans)
            return length

    def _copy(self, spans: Sequence[_Span], local: int, access: int) -> None:
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
        self, entry: _Entry, host: int, guest: int, local: int, length: int, access: int
    ) -> None:
        if entry.direct and not self._postcopy:
            if access == _WRITE:
                _memmove(host, local, length)
            else:
                _memmove(local, host, length)
            if entry.poison.value:
                raise Poisoned(guest, length)
        elif entry.poison.value:
            raise Poisoned(guest, length)
        elif not syscalls.try_copy(host, local, length, access == _WRITE):
            entry.poison.value = 1
            raise Poisoned(guest, length)

    def _mark(self, spans: Sequence[_Span]) -> None:
        log = self._state.log
        if log is not None and log.enabled:
            try:
                for _, guest, length in spans:
                    log.mark(GuestAddress(guest), length)
            except UsageError:
                if log.enabled:  # otherwise it has been closed meanwhile, and logging is over
                    raise

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
        return self._transfer(address, fd, length, offset, _WRITE)

    def copy_to_fd(
        self, address: BusAddress, fd: int, length: int, offset: int | None = None
    ) -> int:
        """Write guest memory straight to a file (writev or pwritev).

        Arguments, result and errors are those of `copy_from_fd`.
        """
        return self._transfer(address, fd, length, offset, _READ)

    def _transfer(self, address: int, fd: int, length: int, offset: int | None, access: int) -> int:
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return 0
        spans = self._spans(address, length, access)[:_IOV_MAX]
        held: list[_Entry] = []
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
                if access == _WRITE:
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
            if access == _WRITE:
                self._mark(_first(spans, done))
        for entry, guest, size in spans:
            if entry.poison.value:
                raise Poisoned(guest, size)
        return done

    def _find_hole(self, spans: Sequence[_Span]) -> None:
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

    # --- atomic words ----------------------------------------------------------------------------

    def _word(self, address: int, size: int, access: int) -> tuple[_Entry, int]:
        if size not in _WORDS:
            raise UsageError("atomic accesses have 1, 2, 4 or 8 bytes")
        if address & (size - 1):
            raise Misaligned(address, size)
        found = self._find(address, size)
        if found is not None and not (found.read_only and access & _WRITE):
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
        entry, guest = self._word(address, size, _READ)
        if entry.fast and not self._postcopy:
            value: int = _WORDS[size].from_address(entry.host + guest - entry.guest).value
            if entry.poison.value:
                raise Poisoned(address, size)
            return value
        first, second = _WORDS[size](), _WORDS[size]()
        # The kernel may copy a word in pieces. Two equal copies are one value that was there,
        # unless a driver goes once around all values in between.
        span = [(entry, guest, size)]
        self._copy(span, ctypes.addressof(first), _READ)
        for _ in range(_TRIES):  # a guest that changes it all the time gets what it asks for
            self._copy(span, ctypes.addressof(second), _READ)
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
        entry, guest = self._word(address, size, _WRITE)
        host, token = entry.mapping.pin(guest, size, _WRITE) if not entry.host else (0, None)
        try:
            self._store(entry, host or entry.host + guest - entry.guest, guest, size, value)
        finally:
            if not entry.host:
                entry.mapping.unpin(token)
            self._mark([(entry, guest, size)])

    def _store(self, entry: _Entry, host: int, guest: int, size: int, value: int) -> None:
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
            self._move(entry, host, guest, ctypes.addressof(word), size, _WRITE)


_guest_of = attrgetter("guest")


def _refusal(entry: _Entry, address: int, length: int, access: int) -> AccessError:
    """Why a range must not be written: pages pinned for reading only can be pinned again."""
    if entry.access & _WRITE:
        return AccessDenied(address, length, access)
    return NotMapped(address, length, access)


def _room(region: Region) -> int:
    """What a region may take of a window at most: itself, and alignment before and behind."""
    return region.size + (1 << 22)


def _check_neighbours(region: Region, others: Iterable[_Entry], space: str) -> None:
    for entry in others:
        other = entry.region
        if space == "guest":
            clash = (
                other.guest_address < region.guest_end and region.guest_address < other.guest_end
            )
        else:
            clash = other.user_address < region.user_end and region.user_address < other.user_end
        if clash:
            start = region.guest_address if space == "guest" else region.user_address
            raise Overlap(start, region.size, space)


def _check_overlaps(regions: Sequence[Region]) -> None:
    by_guest = sorted(regions)
    for before, after in pairwise(by_guest):
        if before.guest_end > after.guest_address:
            raise Overlap(after.guest_address, after.size, "guest")
    by_user = sorted(regions, key=attrgetter("user_address"))
    for before, after in pairwise(by_user):
        if before.user_end > after.user_address:
            raise Overlap(after.user_address, after.size, "user")


def _map_one(mapper: Mapper, region: Region, fd: int | None, window: Window | None) -> _Entry:
    """Map a region; ``window`` is None for mappers that know nothing of windows."""
    if window is None:
        return _Entry.of(region, mapper.map(region, fd))
    return _Entry.of(region, cast(WindowMapper, mapper).map_into(region, fd, window))


def _bigger(window: Window | None, room: int) -> Window | None:
    return Window.reserve(2 * (0 if window is None else window.taken) + room)


def _move_over(
    entries: list[_Entry], window: Window | None, bigger: Window, fresh: list[_Entry]
) -> list[_Entry]:
    """Map what can be mapped twice into a larger window; present snapshots keep the old one.

    What cannot be had twice stays where it is, outside of the new window.
    """
    result = []
    for entry in entries:
        if (
            window is not None
            and entry.host
            and window.contains(entry.host, entry.end - entry.guest)
            and isinstance(entry.mapping, WindowMapping)
        ):
            try:
                entry = _Entry.of(entry.region, entry.mapping.duplicate(bigger))
                fresh.append(entry)
            except GuestMemoryError:
                pass
        result.append(entry)
    return result


def _rest(entry: _Entry, start: int, end: int) -> _Entry:
    """The part of an on-demand region between pinned ones; the region's entry keeps the mapping."""
    return _Entry(
        entry.region,
        entry.mapping,
        lambda: None,
        parent=entry,
        start=start - entry.region.guest_address,
        size=end - start,
    )


def _first(spans: Sequence[_Span], count: int) -> list[_Span]:
    """The spans that the first ``count`` bytes lie in."""
    result: list[_Span] = []
    for entry, guest, length in spans:
        if count <= 0:
            break
        result.append((entry, guest, min(length, count)))
        count -= length
    return result
