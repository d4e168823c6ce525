"""The arrays that the Python engine shares with its queue: records, segments, completions."""

from __future__ import annotations

import ctypes
from typing import Final

from ...layout import (
    DONE,
    DONE_SIZE,
    HEADER_SIZE,
    RECORD,
    RECORD_SIZE,
    SEGMENT,
    SEGMENT_SIZE,
    DoneFlags,
    Features,
    QueueBlock,
    RecordField,
    RecordFlags,
    SegmentFlags,
)
from ...memory import access
from ...memory.table import Piece
from .taken import Taken

# Plain integers: enum members cost a microsecond in an expression.
_STATUS: Final = int(DoneFlags.STATUS)
_SEGMENT_WRITABLE: Final = int(SegmentFlags.WRITABLE)
_READABLE_CONTIGUOUS: Final = int(RecordFlags.READABLE_CONTIGUOUS)
_WRITABLE_CONTIGUOUS: Final = int(RecordFlags.WRITABLE_CONTIGUOUS)
_SHORT_HEADER: Final = int(RecordFlags.SHORT_HEADER)
_EXTERNAL: Final = int(RecordFlags.EXTERNAL)
_RESUBMITTED: Final = int(RecordFlags.RESUBMITTED)


class Arrays:
    """Views of the arrays, whose places never change."""

    def __init__(self, block: QueueBlock) -> None:
        self._status_byte = Features.STATUS_BYTE in Features(block.features)
        self._records = _view(block.records, RECORD_SIZE * block.record_capacity)
        self._segments = _view(block.segments, SEGMENT_SIZE * block.segment_capacity)
        self.done: memoryview = _view(block.done, DONE_SIZE * block.record_capacity)
        """Completions of the current batch."""
        self.staged: memoryview = _view(block.staged, DONE_SIZE * block.staged_capacity)
        """Completions by head."""

    def segment_count(self, position: int) -> int:
        """Segments of a chain of the batch."""
        record = RECORD.unpack_from(self._records, RECORD_SIZE * position)
        count: int = record[RecordField.SEGMENT_COUNT]
        return count

    def describe(
        self,
        position: int,
        first: int,
        taken: Taken,
        pieces: list[tuple[Piece, bool]],
        resubmitted: bool,
    ) -> None:
        """Write the record, the segments and the default completion of a chain."""
        base, end = taken.table.window_base, taken.table.window_end
        flags = 0
        header = b""
        readable = 0
        readable_length = 0
        payload: list[Piece] = []
        for number, (piece, writable) in enumerate(pieces, first):
            SEGMENT.pack_into(
                self._segments,
                SEGMENT_SIZE * number,
                piece.host,
                piece.guest,
                piece.length,
                _SEGMENT_WRITABLE if writable else 0,
                piece.provision,
            )
            if not base <= piece.host <= end - piece.length:
                flags |= _EXTERNAL
            if writable:
                continue
            copied = min(HEADER_SIZE - len(header), piece.length)
            if copied:
                header += access.read(piece, copied)
            if piece.length > copied:
                rest = piece.length - copied
                payload.append(piece._replace(host=piece.host + copied, length=rest))
                readable_length += rest

        def offset(host: int) -> int:
            return host - base if base <= host < end else 0

        if len(header) < HEADER_SIZE:
            flags |= _SHORT_HEADER
        if len(payload) <= 1:
            flags |= _READABLE_CONTIGUOUS
        if payload:
            readable = offset(payload[0].host)
        writable_offset = status = 0
        if taken.writable:
            last = taken.writable[-1]
            writable_offset = offset(taken.writable[0].host)
            status = offset(last.host + last.length - 1)
        parts = len(taken.writable)
        if self._status_byte and parts and taken.writable[-1].length == 1:
            parts -= 1
        if parts <= 1:
            flags |= _WRITABLE_CONTIGUOUS
        if flags & _EXTERNAL:
            flags &= ~(_READABLE_CONTIGUOUS | _WRITABLE_CONTIGUOUS)
            readable = writable_offset = status = 0
        if resubmitted:
            flags |= _RESUBMITTED
        RECORD.pack_into(
            self._records,
            RECORD_SIZE * position,
            header,
            readable,
            writable_offset,
            status,
            readable_length,
            taken.writable_length,
            taken.head,
            flags,
            len(pieces),
            first,
        )
        DONE.pack_into(
            self.done,
            DONE_SIZE * position,
            taken.head,
            0,
            _STATUS if self._status_byte else 0,
            taken.writable_length,
        )


def _view(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * length).from_address(address)).cast("B")
