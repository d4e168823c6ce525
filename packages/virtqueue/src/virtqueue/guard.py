"""Surviving guest memory that is truncated under us.

A front-end that shortens the file behind a region turns every later touch of the lost pages into
a SIGBUS, which by default ends the process: one guest would take down the device of all others.
The guard's handler maps a zero page over the faulting page instead, marks the region as poisoned
and goes on; engines look at the mark before they publish a completion and break the queue
(`Reason.TRUNCATED`).  Faults elsewhere go to the handler that was there before.
"""

from __future__ import annotations

import ctypes
import os

from .c_engine import library
from .errors import EngineUnavailable, UsageError
from .table import Memory


class SigbusGuard:
    """The guard of this process.  Installed by whoever owns the process, never on import.

    Needs the C engine's library; `install` raises `EngineUnavailable` without it.
    """

    @staticmethod
    def available() -> bool:
        """Whether the library that holds the handler can be loaded."""
        try:
            library()
        except ImportError:
            return False
        return True

    @staticmethod
    def install() -> bool:
        """Take SIGBUS over; false when it was taken over already.

        Call it again after something else (faulthandler, say) has set a handler for SIGBUS.
        Raises `OSError` when the kernel refuses.
        """
        try:
            result: int = library().held.vq_guard_install()
        except ImportError as error:
            raise EngineUnavailable(f"no SIGBUS guard: {error}") from error
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result == 1

    @staticmethod
    def watch(memory: Memory) -> None:
        """Guard the regions of a snapshot; once more for each snapshot that shares them.

        Balance it with `unwatch` before the mappings go: another file mapped at the same place
        would be guarded in their stead.
        """
        _check(library().held.vq_guard_watch(ctypes.c_uint64(memory.table_address)))

    @staticmethod
    def unwatch(memory: Memory) -> None:
        """Undo one `watch` of the same snapshot."""
        _check(library().held.vq_guard_unwatch(ctypes.c_uint64(memory.table_address)))

    @staticmethod
    def events() -> int:
        """Bus errors survived in this process, ever."""
        result: int = library().held.vq_guard_events()
        return result


def _check(result: int) -> None:
    if result == -5:
        raise MemoryError("no room for another watched region")
    if result < 0:
        raise UsageError("the memory table has another ABI")
