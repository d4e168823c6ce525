"""Where the present snapshot of a connection's memory lives."""

import threading

from .memory import GuestMemory


class MemoryHolder:
    """Holds the current snapshot; replacing it is one atomic step.

    A reader takes `current` once and works with that snapshot to the end: it stays valid, and its
    memory mapped, whatever happens to the holder meanwhile.
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
            The one that was there. Its memory is released with the last reference to it.
        """
        with self._lock:
            old, self._memory = self._memory, memory
        return old
