"""What a take returns: a batch of chains, in records for speed and as objects for comfort."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from ..errors import ChainCompleted
from ..layout import (
    DONE,
    DONE_SIZE,
    RECORD,
    RECORD_SIZE,
    DoneField,
    DoneFlags,
    More,
    QueueBlock,
)
from ..memory.table import Memory
from .chain import Chain

_STALLED: Final = int(More.STALLED)
_LEFT: Final = int(DoneFlags.LEFT)

# Any, because numpy.dtype takes no dict but one of a type that only numpy has.
RECORD_FIELDS: Final[Any] = {
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

DONE_FIELDS: Final[Any] = {
    "names": ["head", "status", "flags", "written"],
    "formats": ["u2", "u1", "u1", "u4"],
    "offsets": [0, 2, 3, 4],
    "itemsize": DONE_SIZE,
}
"""``numpy.dtype(DONE_FIELDS)`` describes `Batch.done`."""


class _Views(dict[int, memoryview]):
    """The first so many entries of an array, by their number; made when it is first asked for."""

    def __init__(self, whole: memoryview, size: int) -> None:
        self._whole = whole
        self._size = size

    def __missing__(self, count: int) -> memoryview:
        view = self[count] = self._whole[: count * self._size]
        return view


class Batch:
    """The chains of one take, valid until the next.

    ``records`` holds one `RECORD` a chain and ``done`` one `DONE` a chain, prefilled for a
    request that filled all of its writable bytes and succeeded; change what differs, then
    `DeviceQueue.cycle`.  Indexing and iterating give `Chain` objects.
    """

    __slots__ = (
        "_block",
        "_count",
        "_done_views",
        "_gone",
        "_left",
        "_memory",
        "_record_views",
        "_segments",
        "built",
        "done",
        "notify",
        "records",
        "serial",
    )

    records: memoryview
    """``len(batch) * 64`` bytes; read them with ``RECORD.iter_unpack``."""
    done: memoryview
    """``len(batch) * 8`` bytes, writable."""
    notify: bool
    """The driver wants to be signalled for what this cycle completed."""
    built: dict[int, Chain]
    """The chains that were asked for as objects, by position."""

    def __init__(
        self, block: QueueBlock, records: memoryview, done: memoryview, segments: memoryview
    ) -> None:
        self._block = block
        self._record_views = _Views(records, RECORD_SIZE)
        self._done_views = _Views(done, DONE_SIZE)
        self._segments = segments
        self.built = {}
        self._gone: set[int] = set()
        self._count = 0
        self._left = 0
        self.serial: int = 0
        self._memory: Memory | None = None
        self.records = self._record_views[0]
        self.done = self._done_views[0]
        self.notify = False

    def _begin(self, count: int, left: int | None = None) -> "Batch":
        """The engine took ``count`` chains; ``left`` of them, or all, are for the caller."""
        if self._count != count:
            self._count = count
            self.records = self._record_views[count]
            self.done = self._done_views[count]
        self._left = count if left is None else left
        self.serial += 1
        if self._gone:
            self._gone = set()
        return self

    @property
    def more(self) -> bool:
        """More chains are known to be available."""
        return self._count != 0 and self._block.more != 0

    @property
    def stalled(self) -> bool:
        """A chain waits until others are completed: take again after that, no kick will come."""
        return not self._count and bool(self._block.more & _STALLED)

    @property
    def left(self) -> Sequence[int]:
        """Positions of the requests that are the caller's: all but those a handler in C served."""
        if self._left == self._count:
            return range(self._count)
        entries = DONE.iter_unpack(self.done)
        return [
            position for position, entry in enumerate(entries) if entry[DoneField.FLAGS] & _LEFT
        ]

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self._count != 0

    def __getitem__(self, index: int) -> Chain:
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            if self._memory is None:
                raise ChainCompleted("the batch has ended with its queue, or has not begun")
            raise IndexError(f"the batch has {self._count} chains")
        chain = self.built.get(index)
        if chain is not None:
            return chain
        if index in self._gone or self._memory is None:
            raise ChainCompleted(f"chain {index} of the batch has been completed")
        record = RECORD.unpack_from(self.records, index * RECORD_SIZE)
        chain = self.built[index] = Chain(self, record, index)
        return chain

    def __iter__(self) -> Iterator[Chain]:
        serial, built = self.serial, self.built
        if built or self._gone or self._memory is None:
            for index in range(self._count):
                if serial != self.serial:
                    raise ChainCompleted("the batch ended with the next take")
                yield self[index]
            return
        for index, record in enumerate(RECORD.iter_unpack(self.records)):
            if serial != self.serial:
                raise ChainCompleted("the batch ended with the next take")
            chain = built.get(index)
            if chain is None:
                chain = built[index] = Chain(self, record, index)
            yield chain
