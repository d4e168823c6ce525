"""Entries: the rows of a snapshot's table, each with the memory behind it."""

import ctypes
from collections.abc import Callable
from typing import Any, TypeAlias

from ..abi import REGION_ON_DEMAND, REGION_READ_ONLY, REGION_RECORD, REGION_UNGUARDED
from ..addresses import READ, WRITE, fits
from ..errors import UsageError
from .mapping import Mapping
from .region import Region


class Entry:
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

    region: Region
    mapping: Mapping
    parent: "Entry | None"  # of a part: the region's own entry
    guest: int
    end: int
    user: int
    user_end: int
    host: int  # 0 when mapped on demand
    page_size: int
    access: int  # of a part: the access that it was pinned for
    read_only: bool
    bounded: bool
    sealed: bool
    direct: bool  # may be touched other than through the kernel
    fast: bool  # direct, bounded and mapped: needs no further check
    poison: ctypes.c_uint32
    record: bytes

    def __init__(
        self,
        region: Region,
        mapping: Mapping,
        finish: Callable[[], object],
        *,
        parent: "Entry | None" = None,
        start: int = 0,
        size: int = 0,
        host: int | None = None,
        access: int = READ | WRITE,
    ) -> None:
        self._finish = [finish]  # set first: from here on the entry owns the memory
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
        self.read_only = not access & WRITE or bool(getattr(mapping, "read_only", False))
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
    def of(cls, region: Region, mapping: Mapping) -> "Entry":
        """Take over a mapping; on failure the mapping is closed."""
        try:
            host = mapping.host_address
            if host is not None and not (host > 0 and fits(host, region.size)):
                raise UsageError("the mapper returned an address that is none")
            return cls(region, mapping, mapping.close, host=host)
        except BaseException:
            mapping.close()
            raise

    def pinned(self, guest: int, length: int, access: int) -> "Entry":
        """Make a part of an on-demand region accessible for as long as the new entry lives."""
        host, token = self.mapping.pin(guest, length, access)
        start = guest - self.region.guest_address

        def unpin(mapping: Mapping = self.mapping) -> None:
            mapping.unpin(token)

        try:
            return Entry(
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

    @property
    def released(self) -> bool:
        """True once the memory may be gone."""
        return not self._finish

    def release(self) -> None:
        try:
            finish = self._finish.pop()  # atomic, with and without the GIL
        except IndexError:
            return
        finish()

    def __del__(self) -> None:
        self.release()

    def export(self, host: int, length: int, snapshot: object) -> memoryview:
        """A view that keeps the memory mapped as long as the view or a slice of it exists."""
        if self._array is None:
            self._array = ctypes.c_ubyte * (self.end - self.guest)
        exporter = self._array.from_address(self.host)
        # Unsealed memory needs a guard, which watches snapshots: the view must keep its snapshot.
        exporter.owner = self if self.sealed else (self, snapshot)
        offset = host - self.host
        return memoryview(exporter).cast("B")[offset : offset + length]

    def borrow(self, host: int, length: int) -> memoryview:
        """A view to use while the caller holds the entry; cheaper than `export`."""
        view = self._view
        if view is None:
            exporter = (ctypes.c_ubyte * (self.end - self.guest)).from_address(self.host)
            view = self._view = memoryview(exporter).cast("B")
        offset = host - self.host
        return view[offset : offset + length]


Span: TypeAlias = tuple[Entry, int, int]
"""A piece of a range that lies in one entry: the entry, guest-physical address, length."""
