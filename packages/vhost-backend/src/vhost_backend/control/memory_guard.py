"""Surviving a front-end that truncates the memory it shared.

Touching such a page causes a bus error. The C engine's library has a handler for it, which is
installed when a daemon is made, never by an import. With the handler, all memory is accessed
directly. Without it, only files that are sealed against shrinking are; guest_memory copies other
memory through the kernel, which reports missing pages.
"""

from __future__ import annotations

import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

from guest_memory import GuestMemory, Mapper, MmapMapper, SharedMapping
from virtqueue import SigbusGuard


class MemoryGuard:
    """Watches the memory that the front-end shares, as long as it is mapped."""

    def __init__(self) -> None:
        self.active: bool = SigbusGuard.available()
        if self.active:
            SigbusGuard.install()

    def mapper(self, mapper: Mapper | None) -> Mapper:
        """`mapper`, or the default one when that is None."""
        return mapper if mapper is not None else MmapMapper(guarded=self.active)

    def watch(self, memory: GuestMemory) -> None:
        """Watch `memory` until its last reference goes."""
        if self.active:
            SigbusGuard.watch(memory)
            # A finalizer runs before the object's own fields go, so the table is still there.
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
