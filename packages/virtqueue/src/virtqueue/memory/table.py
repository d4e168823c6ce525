"""Reading a snapshot of guest memory out of the structure that guest_memory publishes.

The same bytes serve the C engine.  A structure is refused when its magic, version or size is
another than this package knows.
"""

import ctypes
from bisect import bisect_right
from typing import Any, Final, NamedTuple, Protocol
from weakref import WeakValueDictionary

from guest_memory import abi

from ..errors import UsageError
from ..layout import Reason

MEMORY_ABI: Final = 1
"""The version of guest_memory's structures whose meaning is known here and in C."""
READ: Final = 1
WRITE: Final = 2


class Memory(Protocol):
    """What a queue asks of a snapshot of guest memory (`guest_memory.GuestMemory` is one)."""

    @property
    def table_address(self) -> int:
        """Host address of the snapshot's ``gm_table``."""

    @property
    def window(self) -> memoryview | None:
        """The flat window over all mapped regions, or None."""


class DirtyLog(Protocol):
    """What a queue asks of a dirty log (`guest_memory.DirtyLog` is one)."""

    @property
    def struct_address(self) -> int:
        """Host address of its ``gm_log``."""


PINS_OFFSET: Final[int] = abi.GmTable.pins.offset  # type: ignore[attr-defined]


class Missing(Exception):
    """Memory that has to be provided first; internal, turned into NEED."""

    def __init__(self, address: int, length: int, access: int) -> None:
        super().__init__(address, length, access)
        self.address: int = address
        self.length: int = length
        self.access: int = access


class Broken(Exception):
    """The ring is wrong; internal, turned into BROKEN."""

    def __init__(self, reason: Reason, detail: int = 0) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail: int = detail


class Piece(NamedTuple):
    """Host memory behind part of a guest range."""

    host: int
    guest: int
    length: int
    provision: int
    poison: Any
    """The region's poison word, or None."""
    unguarded: bool = False
    """It may vanish and nothing catches the fault: only `access` may touch it."""


class Region(NamedTuple):
    """One region, copied out of the table."""

    guest: int
    size: int
    user: int
    host: int
    flags: int
    poison: Any


class Table:
    """One snapshot, ready for look-ups; reads nothing but provisions afterwards."""

    def __init__(self, memory: Memory) -> None:
        address = memory.table_address
        table = abi.GmTable.from_address(address)
        if (table.magic, table.abi, table.size) != (
            abi.TABLE_MAGIC,
            MEMORY_ABI,
            ctypes.sizeof(abi.GmTable),
        ):
            raise UsageError(
                f"memory table has magic {table.magic:#x}, ABI {table.abi}, {table.size} bytes"
            )
        self.memory: Memory = memory
        self.address: int = address
        self.window_base: int = table.window_base
        self.window_end: int = table.window_base + table.window_size
        raw = (abi.GmRegion * table.region_count).from_address(table.regions or address)
        self.regions: list[Region] = [
            Region(
                r.guest_address,
                r.size,
                r.user_address,
                r.host_address,
                r.flags,
                ctypes.c_uint32.from_address(r.poison) if r.poison else None,
            )
            for r in raw
        ]
        self._unguarded = [region for region in self.regions if region.flags & abi.REGION_UNGUARDED]
        self._starts = [region.guest for region in self.regions]
        self._by_user = sorted(self.regions, key=lambda region: region.user)
        self._user_starts = [region.user for region in self._by_user]
        self._entries: list[tuple[int, int, int, int]] = []
        if table.iotlb:
            entries = (abi.GmIotlbEntry * table.iotlb_count).from_address(table.iotlb)
            self._entries = [(e.iova, e.size, e.user_address, e.access) for e in entries]
        self._iovas = [entry[0] for entry in self._entries]

    @classmethod
    def of(cls, memory: Memory) -> "Table":
        """The table of a snapshot, parsed once for all queues that use it."""
        # A table keeps its snapshot alive, so that the address stands for one snapshot.
        table = _tables.get(memory.table_address)
        if table is None:
            table = _tables[memory.table_address] = cls(memory)
        return table

    @property
    def pins(self) -> int:
        """Requests taken with this snapshot and not completed, in all engines."""
        return abi.GmTable.from_address(self.address).pins

    def poison_words(self, host: int) -> list[Any]:
        """The poison word of the region that is mapped at a host address.

        Those of all where none is: its pages may be of several (see `placement`).
        """
        known = [region for region in self.regions if region.poison is not None]
        there = [region for region in known if region.host <= host < region.host + region.size]
        return [region.poison for region in there or known]

    def unguarded_host(self, host: int, length: int) -> Any:
        """The poison word of unguarded memory that a host range touches, else None."""
        for region in self._unguarded:
            if region.host < host + length and host < region.host + region.size:
                return _word(region)
        return None

    def unguarded_guest(self, guest: int) -> Any:
        """The poison word of the region at a guest address when it is unguarded, else None."""
        for region in self._unguarded:
            if region.guest <= guest < region.guest + region.size:
                return _word(region)
        return None

    def pieces(
        self, address: int, length: int, access: int, iommu: bool, provisions: Any
    ) -> list[Piece]:
        """Host memory behind ``length`` bytes at a guest address, or at an IOVA.

        Raises `Broken` (ADDRESS, ACCESS) and `Missing`.
        """
        if address + length > 1 << 64:
            raise Broken(Reason.ADDRESS, address)
        if not iommu:
            return self._guest_pieces(address, length, access, provisions)
        pieces: list[Piece] = []
        while length:
            index = bisect_right(self._iovas, address) - 1
            if index < 0:
                raise Missing(address, length, access)
            iova, size, user, granted = self._entries[index]
            offset = address - iova
            # A grant that does not cover the access is a miss too: the front-end decides.
            if offset >= size or access & ~granted:
                raise Missing(address, length, access)
            step = min(length, size - offset)
            pieces += self.user_pieces(user + offset, step, access, provisions)
            address += step
            length -= step
        return pieces

    def user_pieces(self, user: int, length: int, access: int, provisions: Any) -> list[Piece]:
        """Host memory behind front-end user addresses."""
        pieces: list[Piece] = []
        while length:
            index = bisect_right(self._user_starts, user) - 1
            region = self._by_user[index] if index >= 0 else None
            if region is None or user - region.user >= region.size:
                raise Broken(Reason.ADDRESS, user)
            offset = user - region.user
            step = min(length, region.size - offset)
            pieces += self._in_region(region, offset, step, access, provisions)
            user += step
            length -= step
        return pieces

    def _guest_pieces(self, address: int, length: int, access: int, provisions: Any) -> list[Piece]:
        pieces: list[Piece] = []
        while length:
            index = bisect_right(self._starts, address) - 1
            region = self.regions[index] if index >= 0 else None
            if region is None or address - region.guest >= region.size:
                raise Broken(Reason.ADDRESS, address)
            offset = address - region.guest
            step = min(length, region.size - offset)
            pieces += self._in_region(region, offset, step, access, provisions)
            address += step
            length -= step
        return pieces

    def _in_region(
        self, region: Region, offset: int, length: int, access: int, provisions: Any
    ) -> list[Piece]:
        guest = region.guest + offset
        if access & WRITE and region.flags & abi.REGION_READ_ONLY:
            raise Broken(Reason.ACCESS, guest)
        unguarded = bool(region.flags & abi.REGION_UNGUARDED)
        if not region.flags & abi.REGION_ON_DEMAND:
            return [Piece(region.host + offset, guest, length, 0, region.poison, unguarded)]
        pieces: list[Piece] = []
        while length:
            for index, entry in enumerate(provisions):
                inside = guest - entry.guest_address
                if 0 <= inside < entry.length and not access & ~entry.access:
                    step = min(length, entry.length - inside)
                    host = entry.host_address + inside
                    pieces.append(Piece(host, guest, step, index + 1, region.poison, unguarded))
                    guest += step
                    length -= step
                    break
            else:
                raise Missing(guest, length, access)
        return pieces

    def ring_pieces(
        self, address: int, length: int, access: int, iommu: bool, provisions: Any
    ) -> list[Piece]:
        """Host memory behind a part of a ring, at a user address or an IOVA."""
        if iommu:
            return self.pieces(address, length, access, True, provisions)
        return self.user_pieces(address, length, access, provisions)


def _word(region: Region) -> Any:
    return ctypes.c_uint32() if region.poison is None else region.poison


_tables: WeakValueDictionary[int, Table] = WeakValueDictionary()
