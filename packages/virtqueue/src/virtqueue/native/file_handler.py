"""Requests that read and write a file, done in C a batch at a time."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from ..c_library import library
from ..errors import EngineUnavailable, UsageError
from .handler import CHandler
from .transfer import MAX_ENTRIES, TransferItem, open_ring

TYPES: Final = 16
"""Request types that can be given an action are smaller."""


class FileAction(IntEnum):
    """What a request of some type does."""

    READ = 0
    """Fill the writable bytes (all but a status byte) from the file."""
    WRITE = 1
    """Write the readable bytes after the header to the file."""
    SYNC = 4
    """Have everything written so far on the disk."""
    SUCCEED = 254
    """Nothing: it succeeds."""
    LEAVE = 255
    """Leave it to Python."""


class FileBlock(ctypes.Structure):
    """``struct vq_file`` (128 bytes)."""

    size: int
    fd: int
    length: int
    shift: int
    flags: int
    uring: int
    items: int
    capacity: int
    warm: int
    actions: ctypes.Array[ctypes.c_uint8]
    moved: int
    batch: int
    reserved: int
    pace: ctypes.Array[ctypes.c_uint64]

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("length", ctypes.c_uint64),
        ("shift", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("uring", ctypes.c_uint64),
        ("items", ctypes.c_uint64),
        ("capacity", ctypes.c_uint32),
        ("warm", ctypes.c_uint32),
        ("actions", ctypes.c_uint8 * TYPES),
        ("moved", ctypes.c_uint64),
        ("batch", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("pace", ctypes.c_uint64 * 6),  # struct vq_pace, the handler's own
    ]


_DURABLE: Final = 1
_BATCH: Final[int] = FileBlock.batch.offset  # type: ignore[attr-defined]


class FileHandler(CHandler):
    """A handler for queues whose requests begin with ``{le32 type, le32 unused, le64 position}``.

    ``fd`` is the file.  The handler keeps a descriptor of its own, since the number may go to
    another file while a request waits for a disk that hangs.  ``length`` bytes of the file may be
    read and written.  A position counts units of ``unit`` bytes, a power of two, and requests move
    whole units.  ``actions`` says what each type means; other types are left to the caller.  With
    ``durable`` a write completes when it is on the disk.  With ``uring`` requests that would wait
    for the file wait together (see `Transfer`).  One worker uses a handler at a time.

    The handler also leaves a request to the caller whose length is no whole number of units, that
    reaches beyond ``length``, or that the file fails; it may have been done in part.  When the file
    failed, the request's entry of `Batch.done` has the errno as its status (255 for a larger one).
    The caller must not try a failed `SYNC` again: the kernel reports a failed write-back once.

    Raises `EngineUnavailable` without the C engine, `UringUnavailable`, `UsageError`.
    """

    def __init__(
        self,
        fd: int,
        length: int,
        actions: Mapping[int, FileAction],
        *,
        unit: int = 512,
        durable: bool = False,
        uring: bool = False,
        capacity: int = 128,
    ) -> None:
        if unit < 1 or unit & (unit - 1):
            raise UsageError(f"a unit of {unit} bytes is no power of two")
        if any(not 0 <= kind < TYPES for kind in actions):
            raise UsageError(f"request types with an action are 0 to {TYPES - 1}: {set(actions)}")
        try:
            loaded = library()
        except ImportError as error:
            raise EngineUnavailable(f"no handlers in C: {error}") from error
        self._items: ctypes.Array[TransferItem] = (TransferItem * capacity)()
        own = os.dup(fd) if fd >= 0 else -1
        if own >= 0:
            weakref.finalize(self, os.close, own).atexit = False
        block = self._block = FileBlock(
            size=ctypes.sizeof(FileBlock),
            fd=own,
            length=length,
            shift=unit.bit_length() - 1,
            items=ctypes.addressof(self._items),
            capacity=capacity,
        )
        block.actions = (ctypes.c_uint8 * TYPES)(
            *(actions.get(kind, FileAction.LEAVE) for kind in range(TYPES))
        )
        self.durable = durable
        if uring:
            ring = open_ring(min(capacity, MAX_ENTRIES))
            block.uring = ring.value or 0
            finalizer = weakref.finalize(self, loaded.released.vq_uring_close, ring)
            finalizer.atexit = False  # a worker may be using it; the process's end gives it back
        function = ctypes.cast(loaded.released.vq_file_handle, ctypes.c_void_p).value
        assert function is not None
        address = ctypes.addressof(block)
        super().__init__(function, address, address + _BATCH)

    @property
    def durable(self) -> bool:
        """Whether a write completes only when it is on the disk."""
        return bool(self._block.flags & _DURABLE)

    @durable.setter
    def durable(self, durable: bool) -> None:
        self._block.flags = _DURABLE if durable else 0

    @property
    def length(self) -> int:
        """Bytes of the file that may be read and written; change it while no queue is served."""
        length: int = self._block.length
        return length

    @length.setter
    def length(self, length: int) -> None:
        self._block.length = length

    @property
    def moved(self) -> int:
        """Bytes read and written, ever."""
        moved: int = self._block.moved
        return moved
