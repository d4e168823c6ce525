"""The holder of a connection's present memory snapshot."""

import threading

from .memory import GuestMemory


class MemoryHolder:
    """Holds the current snapshot; replacing it is one atomic step.

    A reader takes `current` once and works with that snapshot to the end. The snapshot stays valid,
    and its memory mapped, even if another one replaces it in the holder.
    """

    def __init__(self, memory: GuestMemory | None = None) -> None:
        self._memory = GuestMemory() if memory is None else memory
        self._lock = threading.Lock()

    @property
    def current(self) -> GuestMemory:
        """The present snapshot."""
        return self._memory

    def replace(self, memory: GuestMemory) -> GuestMemory:
        """Put another snapshot in place.

        Returns:
            The old snapshot. Its memory is released with the last reference to it.
        """
        with self._lock:
            old, self._memory = self._memory, memory
        return old
