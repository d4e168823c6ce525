"""Memory that is mapped on demand: which pieces a queue was given, and when they go."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

from ..layout import Provision, QueueBlock

PROVISIONS: Final = 1024
"""Pieces mapped on demand that a queue can use at a time."""

ProvisionArray: Final = Provision * PROVISIONS


class Provisions:
    """The pieces of one queue.  Its engine counts their uses by chains."""

    def __init__(self, block: QueueBlock, entries: ctypes.Array[Provision]) -> None:
        self._block = block
        self.entries: ctypes.Array[Provision] = entries
        """The array that `QueueBlock.provisions` points to."""
        self._releases: dict[int, Callable[[], object]] = {}
        self._used = 0  # entries that were ever used: the first so many

    def provide(
        self,
        address: int,
        length: int,
        access: int,
        host_address: int,
        release: Callable[[], object] | None = None,
    ) -> bool:
        """Say where memory that is mapped on demand lies, after `Need`.

        The queue calls ``release`` when no chain uses the piece and its place is wanted, or in
        `reclaim` and `close`.  False when there is no place left: complete something first.
        """
        for attempt in range(2):
            for index in range(len(self.entries)):
                entry = self.entries[index]
                if not entry.length:
                    self._used = max(self._used, index + 1)
                    entry.guest_address = address
                    entry.host_address = host_address
                    entry.access = access
                    entry.uses = 0
                    entry.length = length
                    if release is not None:
                        self._releases[index] = release
                    return True
            if not attempt:
                self.reclaim()
        return False

    def reclaim(self) -> int:
        """Release every piece that neither a chain in flight nor the ring uses; how many."""
        count = 0
        for index in range(self._used):
            entry = self.entries[index]
            if entry.length and not entry.uses and not self._holds_ring(entry):
                self._release(index)
                count += 1
        return count

    def _holds_ring(self, entry: Provision) -> bool:
        block = self._block
        return any(
            entry.host_address <= host < entry.host_address + entry.length
            for host in (block.descriptors, block.driver, block.device)
        )

    def _release(self, index: int) -> None:
        self.entries[index].length = 0
        release = self._releases.pop(index, None)
        if release is not None:
            release()

    def close(self) -> None:
        """Release all, also those in use."""
        for index in range(self._used):
            if self.entries[index].length:
                self._release(index)
