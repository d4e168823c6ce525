"""Surviving a front-end that truncates the memory it shared.

The C engine's library holds a handler for the bus error that touching such a page causes. It is
installed when a daemon is made, never by an import. With it, memory may be touched directly
whatever file it comes from; without it, only files that are sealed against shrinking are
(guest_memory copies everything else through the kernel, which reports what is gone).
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

from guest_memory import GuestMemory, Mapper, MmapMapper
from virtqueue import SigbusGuard


class MemoryGuard:
    """Watches every snapshot of guest memory for as long as it exists."""

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


def _unwatch(table_address: int) -> None:
    table: Any = SimpleNamespace(table_address=table_address)
    SigbusGuard.unwatch(table)
