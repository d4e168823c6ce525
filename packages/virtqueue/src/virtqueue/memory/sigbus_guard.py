"""Surviving memory of the front-end's that is truncated under us.

A front-end that shortens the file behind a mapping turns every later touch of the lost pages into
a SIGBUS, which by default ends the process: one guest would take down the devices of all others.
The guard's handler maps a zero page over the faulting page instead, marks the mapping as poisoned
and goes on; engines look at the mark before they publish a completion and break the queue
(`Reason.TRUNCATED`).  Mappings are the regions of guest memory, the dirty log and the in-flight
records.  Faults elsewhere go to the handler that was there before.
"""

from __future__ import annotations

import ctypes
import os

from ..c_library import library
from ..errors import EngineUnavailable, UsageError
from ..layout import Result
from .table import Memory


class SigbusGuard:
    """The guard of this process.  The process's owner installs it; an import never does.

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
        """Take SIGBUS over; false when this was done before.

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

        Call `unwatch` as often, before the mappings go: the guard would take another file that is
        mapped at the same place for them.
        """
        _check(library().held.vq_guard_watch(ctypes.c_uint64(memory.table_address)))

    @staticmethod
    def unwatch(memory: Memory) -> None:
        """Undo one `watch` of the same snapshot."""
        _check(library().held.vq_guard_unwatch(ctypes.c_uint64(memory.table_address)))

    @staticmethod
    def watch_range(address: int, size: int, page_size: int, poison_address: int) -> None:
        """Guard a mapping that is no region, as of a dirty log or of in-flight records.

        ``size`` bytes at host ``address``, mapped from a file with pages of ``page_size`` bytes;
        ``poison_address`` is the host address of the 32-bit word to set.  Balance it with
        `unwatch_range` before the mapping goes.  Raises `UsageError` for addresses that are none.
        """
        _check(
            library().held.vq_guard_watch_range(
                *map(ctypes.c_uint64, (address, size, page_size, poison_address))
            )
        )

    @staticmethod
    def unwatch_range(address: int, size: int) -> None:
        """Undo one `watch_range`."""
        library().held.vq_guard_unwatch_range(ctypes.c_uint64(address), ctypes.c_uint64(size))

    @staticmethod
    def events() -> int:
        """Bus errors survived in this process, ever."""
        result: int = library().held.vq_guard_events()
        return result


def _check(result: int) -> None:
    if result == Result.NO_MEMORY:
        raise MemoryError("no room for another watched mapping")
    if result == Result.USAGE:
        raise UsageError("the guard watches pages of a mapping, and these addresses are none")
    if result < 0:
        raise UsageError("the memory table has another ABI")
