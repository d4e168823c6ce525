"""What a take returns: a batch of chains, in records for speed and as objects for comfort."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from .errors import ChainCompleted
from .layout import (
    DONE_SIZE,
    RECORD,
    RECORD_SIZE,
    SEGMENT,
    SEGMENT_SIZE,
    RecordFlags,
    SegmentFlags,
)
from .table import Memory, MemoryTable

RECORD_FIELDS: Final[dict[str, Any]] = {
    "names": [
        "header",
        "readable",
        "writable",
        "status",
        "readable_length",
        "writable_length",
        "head",
        "flags",
        "segment_count",
        "first_segment",
    ],
    "formats": ["V16", "u8", "u8", "u8", "u4", "u4", "u2", "u2", "u2", "u4"],
    "offsets": [0, 16, 24, 32, 40, 44, 48, 50, 52, 56],
    "itemsize": RECORD_SIZE,
}
"""``numpy.dtype(RECORD_FIELDS)`` describes `Batch.records`."""

DONE_FIELDS: Final[dict[str, Any]] = {
    "names": ["head", "status", "flags", "written"],
    "formats": ["u2", "u1", "u1", "u4"],
    "offsets": [0, 2, 3, 4],
    "itemsize": DONE_SIZE,
}
"""``numpy.dtype(DONE_FIELDS)`` describes `Batch.done`."""


class Segment(NamedTuple):
    """One piece of a chain: addresses in this process and in the guest, bytes."""

    host: int
    guest: int
    length: int
    writable: bool


class Chain:
    """One request: the buffers of a descriptor chain (virtio 2.7.5, 2.8.6).

    It may be kept after the batch it came from, until it is completed; then every use raises
    `ChainCompleted`.  It keeps the guest memory it lies in mapped.
    """

    __slots__ = (
        "_memory",
        "_open",
        "_position",
        "_readable",
        "_segments",
        "_shared",
        "_writable",
        "_written",
        "head",
        "index",
        "readable_length",
        "resubmitted",
        "serial",
        "writable_length",
    )

    head: int
    """Names the chain until it is completed: head descriptor (split) or buffer id (packed)."""
    readable_length: int
    """Bytes the driver sends, the header included."""
    writable_length: int
    """Bytes the driver has room for."""
    resubmitted: bool
    """Whether a back-end before us may have executed the request already."""

    def __init__(
        self,
        memory: Memory,
        segments: tuple[Segment, ...],
        head: int,
        index: int,
        serial: int,
        resubmitted: bool,
    ) -> None:
        self._memory: Memory | None = memory
        self._segments = segments
        self._readable: list[memoryview] | None = None
        self._writable: list[memoryview] | None = None
        self._position = 0
        self._written = 0
        self._open = True
        self._shared = False
        self.head = head
        self.index: int = index
        self.serial: int = serial
        self.resubmitted = resubmitted
        self.readable_length = sum(s.length for s in segments if not s.writable)
        self.writable_length = sum(s.length for s in segments if s.writable)

    def __repr__(self) -> str:
        state = "" if self._open else " completed"
        return f"<Chain {self.head} {self.readable_length}->{self.writable_length}{state}>"

    def _check(self) -> None:
        if not self._open:
            raise ChainCompleted(f"chain {self.head} has been completed")

    def _close(self) -> None:
        self._open = False
        # What the user still holds of a completed chain does not keep memory mapped.
        self._memory = None
        self._readable = self._writable = None

    def _views(self, writable: bool) -> list[memoryview]:
        memory = self._memory
        assert memory is not None
        table = MemoryTable.from_address(memory.table_address)
        base, size = table.window_base, table.window_size
        window = memory.window
        views: list[memoryview] = []
        for segment in self._segments:
            if segment.writable != writable:
                continue
            offset = segment.host - base
            if window is not None and 0 <= offset <= size - segment.length:
                view = window[offset : offset + segment.length]
            else:
                octets: Any = (ctypes.c_uint8 * segment.length).from_address(segment.host)
                octets.owner = memory
                view = memoryview(octets).cast("B")
            views.append(view if writable else view.toreadonly())
        return views

    @property
    def completed(self) -> bool:
        """Whether the chain has been given back."""
        return not self._open

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The pieces in order, the readable ones first."""
        self._check()
        return self._segments

    @property
    def readable(self) -> list[memoryview]:
        """The device-readable bytes, piece by piece, without a copy."""
        self._check()
        if self._readable is None:
            self._readable = self._views(writable=False)
        return self._readable

    @property
    def writable(self) -> list[memoryview]:
        """The device-writable bytes, piece by piece.  All of them count as written from now on
        for the dirty log."""
        self._check()
        self._shared = True
        return self._writable_views()

    def _writable_views(self) -> list[memoryview]:
        if self._writable is None:
            self._writable = self._views(writable=True)
        return self._writable

    @property
    def written(self) -> int:
        """Bytes that `write` has written."""
        return self._written

    @property
    def wrote_anywhere(self) -> bool:
        """Whether views of the writable bytes were handed out."""
        return self._shared

    def read(self, count: int = -1) -> bytes:
        """The next ``count`` device-readable bytes (all that are left when negative).

        Fewer when the chain ends before.
        """
        left = self.readable_length - self._position
        if count < 0 or count > left:
            count = left
        pieces = self.readable
        data = _copy_out(pieces, self._position, count)
        self._position += count
        return data

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the device-writable bytes; returns how many there was room for."""
        self._check()
        source = memoryview(data).cast("B")
        done = 0
        skip = self._written
        for view in self._writable_views():
            if skip >= len(view):
                skip -= len(view)
                continue
            step = min(len(view) - skip, len(source) - done)
            if not step:
                break
            view[skip : skip + step] = source[done : done + step]
            done += step
            skip = 0
        self._written += done
        return done


def _copy_out(pieces: list[memoryview], position: int, count: int) -> bytes:
    parts: list[memoryview] = []
    for view in pieces:
        if not count:
            break
        if position >= len(view):
            position -= len(view)
            continue
        step = min(len(view) - position, count)
        parts.append(view[position : position + step])
        count -= step
        position = 0
    return b"".join(parts)


class Batch:
    """The chains of one take, valid until the next.

    ``records`` holds one `RECORD` a chain and ``done`` one `DONE` a chain, prefilled for a
    request that filled all of its writable bytes and succeeded; change what differs, then
    `DeviceQueue.cycle`.  Indexing and iterating give `Chain` objects.
    """

    __slots__ = (
        "_built",
        "_chains",
        "_count",
        "_done_views",
        "_gone",
        "_memory",
        "_record_views",
        "_segments",
        "_serial",
        "done",
        "more",
        "notify",
        "records",
        "stalled",
    )

    records: memoryview
    """``len(batch) * 64`` bytes; read them with ``RECORD.iter_unpack``."""
    done: memoryview
    """``len(batch) * 8`` bytes, writable."""
    notify: bool
    """The driver wants to be signalled for what this cycle completed."""
    more: bool
    """More chains are known to be available."""
    stalled: bool
    """A chain waits until others are completed: take again after that, no kick will come."""

    def __init__(
        self, records: memoryview, done: memoryview, segments: memoryview, chains: dict[int, Chain]
    ) -> None:
        capacity = len(done) // DONE_SIZE
        self._record_views = [records[: n * RECORD_SIZE] for n in range(capacity + 1)]
        self._done_views = [done[: n * DONE_SIZE] for n in range(capacity + 1)]
        self._segments = segments
        self._chains = chains
        self._built: dict[int, Chain] = {}
        self._gone: set[int] = set()
        self._count = 0
        self._serial = 0
        self._memory: Memory | None = None
        self.records = self._record_views[0]
        self.done = self._done_views[0]
        self.notify = False
        self.more = False
        self.stalled = False

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self._count != 0

    def __getitem__(self, index: int) -> Chain:
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            raise IndexError(f"the batch has {self._count} chains")
        chain = self._built.get(index)
        if chain is not None:
            return chain
        if index in self._gone or self._memory is None:
            raise ChainCompleted(f"chain {index} of the batch has been completed")
        record = RECORD.unpack_from(self.records, index * RECORD_SIZE)
        head, flags, count, first = record[6], record[7], record[8], record[9]
        start = first * SEGMENT_SIZE
        pieces = self._segments[start : start + count * SEGMENT_SIZE]
        segments = tuple(
            Segment(host, guest, length, bool(kind & SegmentFlags.WRITABLE))
            for host, guest, length, kind, _ in SEGMENT.iter_unpack(pieces)
        )
        chain = Chain(
            self._memory,
            segments,
            head,
            index,
            self._serial,
            bool(flags & RecordFlags.RESUBMITTED),
        )
        self._built[index] = self._chains[head] = chain
        return chain

    def __iter__(self) -> Iterator[Chain]:
        serial = self._serial
        for index in range(self._count):
            if serial != self._serial:
                raise ChainCompleted("the batch ended with the next take")
            yield self[index]
