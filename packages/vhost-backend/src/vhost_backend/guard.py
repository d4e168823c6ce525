"""Surviving a front-end that truncates the memory it shared.

The C engine's library holds a handler for the bus error that touching such a page causes. It is
installed by the daemon, never by an import. With it, memory may be touched directly whatever file
it comes from; without it, only files that are sealed against shrinking are (guest_memory copies
everything else through the kernel, which reports what is gone).
"""

from __future__ import annotations

import weakref

import virtqueue
from guest_memory import GuestMemory, Mapper, MmapMapper


class MemoryGuard:
    """Watches every snapshot of guest memory for as long as it exists."""

    def __init__(self) -> None:
        self._guard = getattr(virtqueue, "guard", None)

    @property
    def active(self) -> bool:
        """Whether bus errors in guest memory are survived."""
        return self._guard is not None

    def mapper(self, mapper: Mapper | None) -> Mapper:
        """The mapper to use where none was asked for."""
        return mapper if mapper is not None else MmapMapper(guarded=self.active)

    def watch(self, memory: GuestMemory) -> None:
        """Watch `memory` until nobody refers to it any more."""
        guard = self._guard
        if guard is not None:
            guard.watch(memory)
            # The table is still in place when the finaliser runs: weak references go first.
            weakref.finalize(memory, guard.unwatch, memory.table_address).atexit = False
