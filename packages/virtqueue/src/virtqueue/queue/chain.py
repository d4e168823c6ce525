"""One chain as an object: a request's buffers, built as far as its user asks for them."""

import ctypes
from typing import Any, Final, NamedTuple, Protocol

from guest_memory import abi

from ..errors import ChainCompleted, UsageError
from ..layout import HEADER_SIZE, SEGMENT, SEGMENT_SIZE, RecordField, RecordFlags, SegmentFlags
from ..memory.access import Shadow
from ..memory.table import Memory, Table


class Segment(NamedTuple):
    """One piece of a chain: addresses in this process and in the guest, bytes."""

    host: int
    guest: int
    length: int
    writable: bool


# Bound once: a record's fields are read for each request.
_HEADER: Final = RecordField.HEADER
_READABLE: Final = RecordField.READABLE
_WRITABLE: Final = RecordField.WRITABLE
_READABLE_LENGTH: Final = RecordField.READABLE_LENGTH
_WRITABLE_LENGTH: Final = RecordField.WRITABLE_LENGTH
_HEAD: Final = RecordField.HEAD
_FLAGS: Final = RecordField.FLAGS
_SEGMENT_COUNT: Final = RecordField.SEGMENT_COUNT
_FIRST_SEGMENT: Final = RecordField.FIRST_SEGMENT
_READABLE_CONTIGUOUS: Final = int(RecordFlags.READABLE_CONTIGUOUS)
_WRITABLE_CONTIGUOUS: Final = int(RecordFlags.WRITABLE_CONTIGUOUS)
_SHORT_HEADER: Final = int(RecordFlags.SHORT_HEADER)
_RESUBMITTED: Final = int(RecordFlags.RESUBMITTED)
_SEGMENT_WRITABLE: Final = int(SegmentFlags.WRITABLE)


class Origin(Protocol):
    """What a chain asks of the batch that it came from."""

    _memory: Memory | None
    _segments: memoryview


class Chain:
    """One request: the buffers of a descriptor chain (virtio 2.7.5, 2.8.6).

    It may be kept after the batch it came from, until it is completed; then every use raises
    `ChainCompleted`.  It keeps the guest memory it lies in mapped.

    Only what is asked for is built: most requests need the header, which the record holds, and
    one slice of the window.
    """

    # Class-level defaults, so that making a chain stores four attributes only.
    _segments: tuple[Segment, ...] | None = None
    _readable: list[memoryview] | None = None
    _writable: list[memoryview] | None = None
    _total: int | None = None
    _position: int = 0
    _written: int = 0
    _shared: bool = False
    _shadows: list[Shadow] | None = None

    def __init__(self, batch: Origin, record: tuple[Any, ...], index: int) -> None:
        self._batch: Origin | None = batch
        self.record: tuple[Any, ...] = record
        """The fields of its `RECORD`."""
        self._memory: Memory | None = batch._memory
        self.index: int = index
        """Place in the batch it came from."""

    def __repr__(self) -> str:
        state = "completed" if self._memory is None else f"{self.record[_WRITABLE_LENGTH]} writable"
        return f"<Chain {self.record[_HEAD]} {state}>"

    def _check(self) -> Memory:
        memory = self._memory
        if memory is None:
            raise ChainCompleted(f"chain {self.record[_HEAD]} has been completed")
        return memory

    def _close(self) -> None:
        # What the user still holds of a completed chain does not keep memory mapped.
        self._memory = self._batch = self._readable = self._writable = None

    def _count_written(self, written: int | None, status_byte: bool) -> int:
        """What a completion counts as written: what `write` wrote when None is said."""
        room = self.writable_length
        if written is None:
            written = self._written
            if status_byte and written == room - 1:
                written = room
        if not 0 <= written <= room:
            raise UsageError(f"chain {self.head} has room for {room} bytes, not {written}")
        return written

    def _keep(self) -> None:
        """Copy what the next take overwrites."""
        self._load()
        self._batch = None

    def _load(self) -> tuple[Segment, ...]:
        segments = self._segments
        if segments is None:
            batch = self._batch
            assert batch is not None
            count, start = self.record[_SEGMENT_COUNT], self.record[_FIRST_SEGMENT] * SEGMENT_SIZE
            pieces = batch._segments[start : start + count * SEGMENT_SIZE]
            segments = self._segments = tuple(
                [
                    Segment(host, guest, length, bool(kind & _SEGMENT_WRITABLE))
                    for host, guest, length, kind, _ in SEGMENT.iter_unpack(pieces)
                ]
            )
        return segments

    def _sum(self) -> int:
        """Readable bytes of a header that is not full: the record does not tell."""
        segments, batch = self._segments, self._batch
        if segments is not None or batch is None:
            return sum([s.length for s in segments or () if not s.writable])
        total = 0
        start = self.record[_FIRST_SEGMENT] * SEGMENT_SIZE
        for offset in range(
            start, start + self.record[_SEGMENT_COUNT] * SEGMENT_SIZE, SEGMENT_SIZE
        ):
            _, _, length, kind, _ = SEGMENT.unpack_from(batch._segments, offset)
            if kind & _SEGMENT_WRITABLE:
                break
            total += length
        return total

    def _views(self, writable: bool) -> list[memoryview]:
        memory = self._check()
        table = abi.GmTable.from_address(memory.table_address)
        base, size = table.window_base, table.window_size
        window = memory.window
        views: list[memoryview] = []
        start = 0
        for segment in self._load():
            if segment.writable != writable:
                continue
            offset = segment.host - base
            if window is not None and 0 <= offset <= size - segment.length:
                view = window[offset : offset + segment.length]
            else:
                poison = Table.of(memory).unguarded_guest(segment.guest)
                if poison is not None:
                    shadow = Shadow(segment.host, segment.length, poison, start)
                    if writable:
                        self._shadows = [*(self._shadows or ()), shadow]
                    view = memoryview(shadow.data)
                else:
                    octets: Any = (ctypes.c_uint8 * segment.length).from_address(segment.host)
                    octets.owner = memory
                    view = memoryview(octets).cast("B")
            views.append(view if writable else view.toreadonly())
            start += segment.length
        return views

    @property
    def head(self) -> int:
        """Names the chain until it is completed: head descriptor (split) or buffer id (packed)."""
        head: int = self.record[_HEAD]
        return head

    @property
    def header(self) -> bytes:
        """A copy of the first 16 device-readable bytes, zero padded."""
        header: bytes = self.record[_HEADER]
        return header

    @property
    def readable_length(self) -> int:
        """Bytes the driver sends, the header included."""
        total = self._total
        if total is None:
            if not self.record[_FLAGS] & _SHORT_HEADER:
                total = HEADER_SIZE + self.record[_READABLE_LENGTH]
            elif self._memory is None and self._segments is None:
                raise ChainCompleted(f"chain {self.record[_HEAD]} has been completed")
            else:
                total = self._sum()
            self._total = total
        return total

    @property
    def writable_length(self) -> int:
        """Bytes the driver has room for."""
        length: int = self.record[_WRITABLE_LENGTH]
        return length

    @property
    def resubmitted(self) -> bool:
        """Whether a back-end before us may have executed the request already."""
        return bool(self.record[_FLAGS] & _RESUBMITTED)

    @property
    def completed(self) -> bool:
        """Whether the chain has been given back."""
        return self._memory is None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The pieces in order, the readable ones first."""
        self._check()
        return self._load()

    @property
    def readable(self) -> list[memoryview]:
        """The device-readable bytes, piece by piece, without a copy.

        Memory that may vanish, and that no `SigbusGuard` watches, is copied once.
        """
        self._check()
        if self._readable is None:
            self._readable = self._views(writable=False)
        return self._readable

    @property
    def writable(self) -> list[memoryview]:
        """The device-writable bytes, piece by piece.  All of them count as written from now on
        for the dirty log.

        Where memory may vanish, and no `SigbusGuard` watches, the views are of a copy that goes to
        the guest when the chain is completed.
        """
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
        memory = self._check()
        record, position = self.record, self._position
        left = self.readable_length - position
        if count < 0 or count > left:
            count = left
        end = self._position = position + count
        header: bytes = record[_HEADER]
        if end <= HEADER_SIZE:
            return header[position:end]
        window = memory.window
        if record[_FLAGS] & _READABLE_CONTIGUOUS and window is not None:
            offset = record[_READABLE] - HEADER_SIZE
            if position >= HEADER_SIZE:
                return bytes(window[offset + position : offset + end])
            return header[position:] + bytes(window[record[_READABLE] : offset + end])
        return _copy_out(self.readable, position, count)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the device-writable bytes; returns how many there was room for."""
        memory = self._check()
        record, written = self.record, self._written
        source = memoryview(data).cast("B")
        end = written + len(source)
        window = memory.window
        # With a status byte the last byte may lie elsewhere.
        if (
            record[_FLAGS] & _WRITABLE_CONTIGUOUS
            and end < record[_WRITABLE_LENGTH]
            and window is not None
        ):
            offset = record[_WRITABLE]
            window[offset + written : offset + end] = source
            self._written = end
            return len(source)
        done = 0
        skip = written
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
        self._written = written + done
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
