"""The arguments of a handler: its queue and a request; and the fate of a request called back.

A handler may use a request in any way; `check_use` checks the result when the handler has ended.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import CoroutineType
from typing import Any, ClassVar, Final

from virtqueue import Batch, Chain, ChainCompleted, Memory, RecordField, RecordFlags

from ..counters import QueueCounters
from ..errors import BackendUsageError

_HEADER: Final = 16
_SHORT_HEADER: Final = int(RecordFlags.SHORT_HEADER)
# Plain numbers: enum members would cost a lookup each time.
_FIRST_BYTES: Final = int(RecordField.HEADER)
_READABLE_LENGTH: Final = int(RecordField.READABLE_LENGTH)
_WRITABLE_LENGTH: Final = int(RecordField.WRITABLE_LENGTH)
_HEAD: Final = int(RecordField.HEAD)
_FLAGS: Final = int(RecordField.FLAGS)


class QueueInfo:
    """A queue as a handler sees it.

    `index` is its number, `counters` are its counters. `window` is the flat view of guest memory to
    which the offsets in a batch's records refer (None when there is no such view). `memory` is the
    snapshot of guest memory of that view. Both are valid for the batch that came with them.
    """

    __slots__ = ("_on_exit", "counters", "index", "memory", "window")

    def __init__(self, index: int, counters: QueueCounters) -> None:
        self.index: int = index
        self.counters: QueueCounters = counters
        self.window: memoryview | None = None
        # Held here, it stays mapped while a handler in C works, even if the ring is stopped.
        self.memory: Memory | None = None
        #: In a caller's event loop: ends it when a handler raises KeyboardInterrupt or SystemExit.
        self._on_exit: Callable[[BaseException], None] | None = None

    def forget(self) -> None:
        """Let go of the memory, as the worker has ended its batch."""
        self.window = self.memory = None


class Request:
    """One request: the driver's bytes to read, and room for the device's answer.

    `write` does not fill the status byte. Using a request that has completed raises
    `virtqueue.UsageError`.

    Lengths and the first 16 bytes come from the batch's record; the `Chain` is made only when more
    is needed.
    """

    __slots__ = (
        "_batch",
        "_chain",
        "_index",
        "_position",
        "_recalled",
        "_record",
        "_serial",
        "_waits",
        "status",
        "written",
    )

    #: How many of the driver's writable bytes are a status byte, the last one.
    _STATUS_BYTES: ClassVar[int] = 0

    status: int
    """The value of the status byte, for device types that have one."""
    # Set by a worker with coroutines: how many `waiting` blocks this one's is in, and whether its
    # ring is being stopped.
    _waits: int
    _recalled: bool
    written: int
    """Bytes reported to the driver: what `write` wrote, unless set."""

    def __init__(self, batch: Batch, record: tuple[Any, ...], index: int) -> None:
        self._batch = batch
        self._serial = batch.serial
        self._record = record
        self._index = index
        self._chain: Chain | None = None
        #: Bytes of the header that `read` has returned.
        self._position = 0
        self.status = 0
        self.written = 0

    @property
    def chain(self) -> Chain:
        """The chain of descriptors that carries the request."""
        chain = self._chain
        if chain is None:
            if self._batch.serial != self._serial:
                raise ChainCompleted(f"request {self._record[_HEAD]} has been completed")
            chain = self._chain = self._batch[self._index]
            if self._position:
                chain.read(self._position)
        return chain

    @property
    def header(self) -> bytes:
        """The first 16 bytes the driver sent, zero padded; `read` begins with them, too."""
        header: bytes = self._record[_FIRST_BYTES]
        return header

    @property
    def readable_length(self) -> int:
        """Bytes the driver sent."""
        record = self._record
        if not record[_FLAGS] & _SHORT_HEADER:
            length: int = _HEADER + record[_READABLE_LENGTH]
            return length
        return self.chain.readable_length

    @property
    def writable_length(self) -> int:
        """Bytes that the driver has room for in the answer, without a status byte."""
        length: int = self._record[_WRITABLE_LENGTH]
        return length - self._STATUS_BYTES

    @property
    def readable(self) -> list[memoryview]:
        """The driver's bytes in place, piece by piece; nothing is copied."""
        return self.chain.readable

    @property
    def writable(self) -> list[memoryview]:
        """The room for the answer in place, piece by piece, without a status byte.

        Set `written` after filling it.
        """
        return self.chain.writable

    def read(self, size: int = -1) -> bytes:
        """The next `size` of the driver's bytes; all remaining ones when `size` is negative."""
        if self._chain is None and size >= 0 and self._batch.serial == self._serial:
            position = self._position
            end = position + size
            if end <= _HEADER and not self._record[_FLAGS] & _SHORT_HEADER:
                self._position = end
                header: bytes = self._record[_FIRST_BYTES]
                return header[position:end]
        return self.chain.read(size)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the answer; returns the number of bytes written, as far as there was room."""
        count = self.chain.write(data)
        self.written += count
        return count

    def waiting(self) -> AbstractAsyncContextManager[None]:
        """Mark a wait of a coroutine: `async with request.waiting(): await news.get()`.

        When the ring is stopped meanwhile, the wait is cancelled (`asyncio.CancelledError` is
        raised in it). Outside of such a wait a coroutine is left to end by itself. So during the
        wait nothing else, such as a thread, must touch the request's memory. See
        `VirtioDevice.recalled` for the request's fate.
        """
        return _Waiting(self)

    @property
    def begun(self) -> bool:
        """Whether something was written, or could have been through `writable`."""
        chain = self._chain
        return bool(self.written) or (
            chain is not None and (chain.wrote_anywhere or chain.written > 0)
        )


class StatusRequest(Request):
    """A request of a device type with a status byte."""

    __slots__ = ()
    _STATUS_BYTES: ClassVar[int] = 1

    @property
    def writable(self) -> list[memoryview]:
        """The room for the answer in place, piece by piece, without the status byte."""
        *pieces, last = self.chain.writable
        return [*pieces, last[:-1]] if len(last) > 1 else pieces

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the answer; returns how many bytes there was room for before the status."""
        room = self.writable_length - self.chain.written
        return super().write(memoryview(data).cast("B")[:room])


class _Waiting:
    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        self._request = request

    async def __aenter__(self) -> None:
        if self._request._recalled:
            # The ring is being stopped already: cancel here, where the coroutine expects it.
            from asyncio import CancelledError, sleep

            await sleep(0)
            raise CancelledError
        self._request._waits += 1

    async def __aexit__(self, *exc: object) -> None:
        self._request._waits -= 1


class Recall(enum.Enum):
    """The fate of a request whose wait was cancelled because its ring is stopped."""

    GIVEN_BACK = "given back"
    """As if it had never been taken: the next back-end of the ring takes it again."""
    KEPT = "kept"
    """Left in the in-flight region: the next back-end that uses the region takes it again."""
    EMPTY = "empty"
    """Completed with nothing written (and `error_status`, where there is a status byte)."""


def check_use(request: Request, answer: object, flags: int) -> None:
    """Raise `BackendUsageError` when a request cannot be completed as its handler has left it.

    `answer` is the handler's return value; `flags` is 1 with a status byte.
    """
    if isinstance(answer, CoroutineType):
        answer.close()
        raise BackendUsageError(
            "handle returned a coroutine that nothing awaits: it must be an `async def` itself"
        )
    if isinstance(answer, bytes | bytearray | memoryview | str | Awaitable):
        raise BackendUsageError(
            f"handle returned {type(answer).__name__}: an answer is written with request.write()"
        )
    written, room = request.written, request.writable_length
    if not 0 <= written <= room:
        raise BackendUsageError(f"request.written is {written}, but there is room for {room} bytes")
    if request.status and not flags:
        raise BackendUsageError(
            f"request.status is {request.status}, but the device has no status byte"
        )
    if not 0 <= request.status <= 255:
        raise BackendUsageError(f"request.status is {request.status}, a status byte is 0 to 255")
