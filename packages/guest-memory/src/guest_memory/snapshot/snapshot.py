"""Snapshots: rows that never change, their properties, and the C table over them."""

import ctypes
from array import array
from typing import NamedTuple, Self

from ..abi import ABI_VERSION, TABLE_IOMMU, TABLE_MAGIC, GmTable
from ..dirty_log import DirtyLog
from ..iotlb import FrozenIotlb
from ..linux import buffers
from ..regions.entry import Entry
from ..regions.mapping import Mapper
from ..regions.region import Region
from ..regions.window import Window


class State(NamedTuple):
    """The fields that a snapshot takes from the one it was made of, besides regions."""

    mapper: Mapper
    window: Window | None
    iotlb: FrozenIotlb | None
    log: DirtyLog | None
    postcopy: bool


class Snapshot:
    """The rows of a table, sorted by both kinds of addresses, and their properties.

    Where rows were split (`with_pins`), ``_base`` is the snapshot with whole regions.
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

    _entries: list[Entry]
    _starts: list[int]
    _by_user: list[Entry]
    _user_starts: list[int]
    _order: "array[int]"
    _records: bytes
    _state: State
    _base: Self | None
    _hint: int
    _postcopy: bool
    _physical_addresses: bool
    _table: GmTable
    _view: memoryview | None

    @classmethod
    def _make(cls, entries: list[Entry], state: State, base: Self | None = None) -> Self:
        memory = cls.__new__(cls)
        memory._assemble(entries, state, base)
        return memory

    def _assemble(self, entries: list[Entry], state: State, base: Self | None = None) -> None:
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

    def _derive(self, state: State) -> Self:
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

    def _enter(self, state: State) -> None:
        """Set the state, and build the C table over the rows."""
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
            buffers.address_of(self._records),
            self._order.buffer_info()[0],
            0 if iotlb is None else buffers.address_of(iotlb.records),
            0 if iotlb is None else len(iotlb.entries),
            0 if iotlb is None else TABLE_IOMMU,
            0 if window is None else window.base,
            0 if window is None else window.size,
        )

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, sorted by guest address."""
        return tuple(entry.region for entry in (self._base or self)._entries)

    def __len__(self) -> int:
        return len((self._base or self)._entries)

    @property
    def host_addresses(self) -> tuple[int | None, ...]:
        """The regions' host addresses, in their order; None for a region mapped on demand.

        In postcopy the answer to SET_MEM_TABLE has these addresses.
        """
        return tuple(entry.host or None for entry in (self._base or self)._entries)

    @property
    def ranges(self) -> tuple[tuple[int, int, int], ...]:
        """(host address, length, page size) of the mapped regions, widened to whole pages."""
        return tuple(pages for pages, _ in self._mapped())

    def _mapped(self) -> list[tuple[tuple[int, int, int], Entry]]:
        """`ranges`, each with the entry that keeps it mapped."""
        result = []
        for entry in (self._base or self)._entries:
            if entry.host:
                page = entry.page_size
                start = entry.host & -page
                end = -(-(entry.host + entry.end - entry.guest) & -page)
                result.append(((start, end - start, page), entry))
        return result

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
        """The number of requests that a C engine has taken with this snapshot and not completed.

        The engine's owner keeps a reference to the snapshot while this is not zero.
        """
        return self._table.pins

    @property
    def window(self) -> memoryview | None:
        """The flat window, writable, format ``"B"``; None when no region lies in it.

        The byte at host address ``h`` is at index ``h - window_base``. Only bytes of mapped regions
        may be touched. The view does not keep regions mapped: released ones read as zeroes.
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
        """True when no access can wait for another process: only memory files, and no postcopy."""
        return not self._postcopy and all(entry.bounded for entry in self._entries)

    @property
    def iommu(self) -> bool:
        """True when the snapshot takes I/O virtual addresses."""
        return self._state.iotlb is not None
