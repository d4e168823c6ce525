"""Surviving a front-end that truncates the memory it shared.

The C engine's library holds a handler for the bus error that touching such a page causes. It is
installed when a daemon is made, never by an import. With it, memory may be touched directly
whatever file it comes from; without it, only files that are sealed against shrinking are
(guest_memory copies everything else through the kernel, which reports what is gone).
"""

from __future__ import annotations

import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

from guest_memory import GuestMemory, Mapper, MmapMapper, SharedMapping
from virtqueue import SigbusGuard


class MemoryGuard:
    """Watches all that the front-end shares, for as long as it is mapped."""

    def __init__(self) -> None:
        self.active: bool = SigbusGuard.available()
        if self.active:
            SigbusGuard.install()

    def mapper(self, mapper: Mapper | None) -> Mapper:
        """The mapper to use where none was asked for."""
        return mapper if mapper is not None else MmapMapper(guarded=self.active)

    def watch(self, memory: GuestMemory) -> None:
        """Watch `memory` until nobody refers to it any more."""
        if self.active:
            SigbusGuard.watch(memory)
            # Weak references go before anything else of an object does: its table is still there.
            weakref.finalize(memory, _unwatch, memory.table_address).atexit = False

    def watch_mapping(self, mapping: SharedMapping) -> None:
        """Watch a dirty log's or in-flight region's `mapping` until it is unmapped."""
        if self.active:
            address, length = mapping.pages
            SigbusGuard.watch_range(address, length, mapping.page_size, mapping.poison_address)
            mapping.before_unmapping(partial(SigbusGuard.unwatch_range, address, length))


def _unwatch(table_address: int) -> None:
    table: Any = SimpleNamespace(table_address=table_address)
    SigbusGuard.unwatch(table)
