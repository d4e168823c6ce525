"""Marking pages in the dirty log (vhost-user specification, "Migration")."""

from __future__ import annotations

import ctypes
from typing import Any

from guest_memory import abi, atomic_or

from ...errors import UsageError
from ...layout import QueueBlock, Reason
from ...memory.barrier import full_barrier
from ...memory.placement import PAGE
from ...memory.table import MEMORY_ABI, Broken


class Log:
    """A ``gm_log`` seen from an engine.

    Bits are set by an atomic OR in the kernel: the front-end reads and clears
    the bitmap meanwhile, and may even truncate it, which is `Broken`.  Every mark follows the
    write that it stands for.
    """

    def __init__(self, address: int) -> None:
        self._log = abi.GmLog.from_address(address)
        found = (self._log.magic, self._log.abi, self._log.size, self._log.page_shift)
        if found != (abi.LOG_MAGIC, MEMORY_ABI, ctypes.sizeof(abi.GmLog), 12):
            raise UsageError(f"dirty log has magic {found[0]:#x}, ABI {found[1]}")
        address = self._log.poison
        self.poison: Any = ctypes.c_uint32.from_address(address) if address else ctypes.c_uint32()
        """Not 0 once a page of the bitmap was found missing."""

    @property
    def enabled(self) -> bool:
        """Whether writes to buffers are logged."""
        return self._log.enabled != 0

    def mark(self, guest_address: int, length: int) -> None:
        """Mark the pages of a write; what lies beyond the bitmap has no bit."""
        if not length:
            return
        # Partner: the front-end's atomic read-and-clear before it copies the page.  Without the
        # barrier a bit could be seen set here while the write is not visible there yet.
        full_barrier()
        bitmap, size = self._log.bitmap, self._log.bitmap_size
        last = min((guest_address + length - 1) >> 12, size * 8 - 1)
        for page in range(guest_address >> 12, last + 1):
            address = bitmap + (page >> 3)
            # The word that holds the byte; its other bytes keep their value.
            word = address & ~3
            if not atomic_or(word, 1 << (address - word) * 8 + (page & 7)):
                self.poison.value = 1
                raise Broken(Reason.TRUNCATED, guest_address)


def mark_ring(log: Log, block: QueueBlock, offset: int, length: int) -> None:
    """Mark a write at an offset of what `QueueBlock.log_used` stands for."""
    position, pages = block.log_used + offset, block.log_pages
    if not pages:
        log.mark(position, length)
        return
    while length > 0:
        page, inside = divmod(position, PAGE)
        step = min(length, PAGE - inside)
        guest = ctypes.c_uint64.from_address(pages + 8 * page).value
        log.mark(guest + inside, step)
        position += step
        length -= step
