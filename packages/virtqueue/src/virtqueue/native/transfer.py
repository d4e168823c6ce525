"""Moving the bytes of many chains in one call: to and from a file, a socket or a buffer."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from enum import IntEnum, IntFlag
from functools import partial
from types import TracebackType
from typing import Final, Self

from ..c_library import library
from ..errors import EngineUnavailable, UringUnavailable, UsageError
from ..layout import SEGMENT_SIZE

STREAM: Final = 0xFFFF_FFFF_FFFF_FFFF
"""An offset: the file's own position, as sockets and pipes want it."""


class Operation(IntEnum):
    """Which way the bytes go."""

    READ = 0
    """File to the device-writable pieces."""
    WRITE = 1
    """The device-readable pieces to the file."""
    COPY_IN = 2
    """Buffer to the device-writable pieces; ``offset`` is its host address."""
    COPY_OUT = 3
    """The device-readable pieces to the buffer; ``offset`` is its host address."""
    SYNC = 4
    """fdatasync(2), after the items before it and before those behind it; moves nothing."""


class TransferFlags(IntFlag):
    """How an item is done."""

    DSYNC = 1
    """A write is on the medium when it ends (RWF_DSYNC)."""


_NO_FLAGS: Final = TransferFlags(0)
MAX_ENTRIES: Final = 256


class TransferItem(ctypes.Structure):
    """One chain's part (``struct vq_io``, 56 bytes)."""

    segments: int
    skip: int
    length: int
    offset: int
    result: int
    segment_count: int
    operation: int
    flags: int
    tag: int

    _fields_ = [
        ("segments", ctypes.c_uint64),
        ("skip", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("segment_count", ctypes.c_uint32),
        ("operation", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("tag", ctypes.c_uint32),
    ]


def _nothing() -> None:
    """Close a transfer that has no ring."""


def _closed(*_: object) -> int:
    raise UsageError("the transfer is closed")


def open_ring(entries: int) -> ctypes.c_void_p:
    """An io_uring of the kernel, for `vq_uring_transfer`; raises `UringUnavailable`."""
    ring = ctypes.c_void_p()
    result: int = library().held.vq_uring_open(ctypes.c_uint32(entries), ctypes.byref(ring))
    if result < 0:
        raise UringUnavailable(-result)
    return ring


class Transfer:
    """Up to ``capacity`` moves, done by one call into C.

    ``add`` names a chain by its segments (host address and count, as a batch's record has them),
    `run` does what was added, and `results` says how each ended.  The chains must be in flight
    while it runs.

    Without ``uring`` each move is a system call, one after the other.  With it an io_uring gets
    the moves that would wait for the file, up to 256 at a time, and they wait together; the others
    are calls as before.  Reads and writes then end in no order, but for `Operation.SYNC`: two of
    one run must not overlap in the file unless a SYNC is between them.  `run` returns when all have
    ended.  `close`, the end of a ``with`` block or the collector gives the ring back.  One run at a
    time; any thread may make it, though a transfer that stays with one thread is a little faster.
    A child after fork may use its copy of the transfer.

    Raises `EngineUnavailable` without the C engine, `UringUnavailable` when the kernel refuses.
    """

    def __init__(self, capacity: int, *, uring: bool = False) -> None:
        if capacity < 1:
            raise UsageError(f"a transfer has room for 1 item or more, not {capacity}")
        try:
            loaded = library()
        except ImportError as error:
            raise EngineUnavailable(f"no transfers in C: {error}") from error
        self._items: ctypes.Array[TransferItem] = (TransferItem * capacity)()
        self._count = 0
        self._ran = 0
        self._argument = ctypes.c_void_p(ctypes.addressof(self._items))
        self._run: Callable[..., int] = loaded.released.vq_transfer
        self._run_short: Callable[..., int] = loaded.held.vq_transfer
        self._close: Callable[[], object] = _nothing
        if uring:
            ring = open_ring(min(capacity, MAX_ENTRIES))
            self._run = partial(loaded.released.vq_uring_transfer, ring)
            self._run_short = partial(loaded.held.vq_uring_transfer, ring)
            self._close = finalizer = weakref.finalize(self, loaded.released.vq_uring_close, ring)
            finalizer.atexit = False  # a daemon thread may be in a run then; exit gives it back

    @staticmethod
    def uring_available() -> bool:
        """Whether ``uring=True`` works here now: the C engine is there and the kernel agrees."""
        try:
            library().released.vq_uring_close(open_ring(1))
        except (ImportError, UringUnavailable):
            return False
        return True

    def close(self) -> None:
        """Give the ring back; the transfer cannot run any more.  Not during a run."""
        self._run = self._run_short = _closed
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        operation: Operation,
        segments: int,
        segment_count: int,
        length: int,
        offset: int,
        skip: int = 0,
        flags: TransferFlags = _NO_FLAGS,
    ) -> None:
        """Move ``length`` bytes of a chain, passing over ``skip`` bytes of its side first.

        ``segments`` is the host address of the chain's `SEGMENT` entries.  ``offset`` is in the
        file in bytes, `STREAM`, or a host address for copies.
        """
        if self._count == len(self._items):
            raise UsageError(f"a transfer has room for {self._count} items")
        item = self._items[self._count]
        item.segments = segments
        item.segment_count = segment_count
        item.operation = operation
        item.length = length
        item.offset = offset
        item.skip = skip
        item.flags = flags
        self._count += 1

    def add_sync(self) -> None:
        """fdatasync(2) the file after what was added before, and before what is added next."""
        self.add(Operation.SYNC, 0, 0, 0, 0)

    def add_record(
        self,
        operation: Operation,
        segments: int,
        first_segment: int,
        segment_count: int,
        length: int,
        offset: int,
        skip: int = 0,
        flags: TransferFlags = _NO_FLAGS,
    ) -> None:
        """`add` with a record's own fields; ``segments`` is the address of the batch's array."""
        address = segments + SEGMENT_SIZE * first_segment
        self.add(operation, address, segment_count, length, offset, skip, flags)

    def run(self, fd: int = -1, *, short: bool = False) -> int:
        """Do the moves that were added since the last run; how many moved all of their bytes.

        Releases the GIL unless ``short`` says that the work is bounded and small: a few kilobytes
        out of the page cache take less time than getting the GIL back from a busy thread, which is
        up to 5 ms.
        """
        count, self._ran, self._count = self._count, self._count, 0
        call = self._run_short if short else self._run
        return call(ctypes.c_int(fd), self._argument, ctypes.c_uint32(count))

    @property
    def results(self) -> list[int]:
        """For each item of the last run the bytes it moved (SYNC: 0), or a negative errno."""
        return [self._items[index].result for index in range(self._ran)]
