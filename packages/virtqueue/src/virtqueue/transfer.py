"""Moving the bytes of many chains in one call: to and from a file, a socket or a buffer."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Final

from .c_engine import library
from .errors import EngineUnavailable, UsageError
from .layout import SEGMENT_SIZE

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


class Transfer:
    """Up to ``capacity`` moves, done by one call into C.

    ``add`` names a chain by its segments (host address and count, as a batch's record has them),
    `run` does what was added, in order, and `results` says how each ended.  The chains must be
    in flight while it runs.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise UsageError(f"a transfer of {capacity} items")
        try:
            loaded = library()
        except ImportError as error:
            raise EngineUnavailable(f"no transfers in C: {error}") from error
        self._items: ctypes.Array[TransferItem] = (TransferItem * capacity)()
        self._count = 0
        self._ran = 0
        argument = ctypes.c_void_p(ctypes.addressof(self._items))
        self._run = loaded.released.vq_transfer
        self._run_short = loaded.held.vq_transfer
        self._argument = argument

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
        self._count += 1

    def add_record(
        self,
        operation: Operation,
        segments: int,
        first_segment: int,
        segment_count: int,
        length: int,
        offset: int,
        skip: int = 0,
    ) -> None:
        """`add` with a record's own fields; ``segments`` is the address of the batch's array."""
        self.add(
            operation, segments + SEGMENT_SIZE * first_segment, segment_count, length, offset, skip
        )

    def run(self, fd: int = -1, *, short: bool = False) -> int:
        """Do what was added since the last run; how many moved all of their bytes.

        The GIL is released unless ``short`` says that the work is bounded and small: a few
        kilobytes out of the page cache take less time than getting the GIL back from a busy
        thread, which is up to 5 ms.
        """
        count, self._ran, self._count = self._count, self._count, 0
        call = self._run_short if short else self._run
        result: int = call(ctypes.c_int(fd), self._argument, ctypes.c_uint32(count))
        return result

    @property
    def results(self) -> list[int]:
        """For each item of the last run the bytes that were moved, or a negative errno."""
        return [self._items[index].result for index in range(self._ran)]
