"""Devices the comfortable way: derive from `VirtioDevice` and override one of three methods.

- `handle(queue, request)` is called for each request, which completes when it returns.
- `async def handle(queue, request)`: requests of all queues run concurrently on one event loop
  and complete in whatever order their coroutines end. What only waits, for a packet or a key,
  is marked with `async with request.waiting():`, so that stopping the ring need not wait for it.
- `handle_batch(queue, batch)` is called with everything that was waiting: the fastest way.

A handler that raises fails its request (with `error_status`, where the device type has a status
byte), is logged, and takes nothing else down, whatever it raises: `sys.exit()` is no way to end a
daemon from a worker. So does one that misuses its request: `written` beyond the room there is, a
`status` where the device type has no status byte, an answer that is returned instead of written.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from types import CoroutineType
from typing import Any, Final, Self

from guest_memory import GuestMemory
from vhost_protocol import BackendChannel, ProtocolError, ProtocolFeatures
from virtqueue import (
    DONE,
    RECORD,
    Batch,
    Chain,
    ChainCompleted,
    CHandler,
    Memory,
    RecordFlags,
)

from ..counters import QueueCounters
from ..errors import BackendUsageError, Refused
from ..rate_limited_log import RateLimited

log: logging.Logger = logging.getLogger("vhost_backend")

_HEADER: Final = 16
_RECORD_SIZE: Final = RECORD.size
_unpack: Final = RECORD.unpack
_unpack_all: Final = RECORD.iter_unpack
_pack_done: Final = DONE.pack_into
_SHORT_HEADER: Final = int(RecordFlags.SHORT_HEADER)


class Queue:
    """A queue as a handler sees it.

    `index` is its number, `counters` what it has done. `window` is the flat view of guest memory
    that the offsets in a batch's records refer to (None when there is no such view), `memory` the
    snapshot of guest memory that it belongs to; both are valid for the batch that came with them.
    """

    __slots__ = ("_on_exit", "counters", "index", "memory", "window")

    def __init__(self, index: int, counters: QueueCounters) -> None:
        self.index: int = index
        self.counters: QueueCounters = counters
        self.window: memoryview | None = None
        # Held here, it stays mapped for what a handler in C works on, whatever becomes of the ring.
        self.memory: Memory | None = None
        #: In an event loop of the caller's: ends it with what a handler has raised to end it.
        self._on_exit: Callable[[BaseException], None] | None = None

    def forget(self) -> None:
        """Let go of the memory: the worker has done what there was."""
        self.window = self.memory = None


class Request:
    """One request: the driver's bytes to read, and room for the device's answer.

    The status byte is not part of what `write` fills. A request that has completed raises
    `virtqueue.UsageError` when used.

    What the record of a batch tells (lengths, the first 16 bytes) comes from there; the `Chain` is
    made when more is asked for.
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

    status: int
    """What the status byte will say, for device types that have one."""
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
                raise ChainCompleted(f"request {self._record[6]} has been completed")
            chain = self._chain = self._batch[self._index]
            if self._position:
                chain.read(self._position)
        return chain

    @property
    def header(self) -> bytes:
        """The first 16 bytes the driver sent, zero padded; `read` begins with them, too."""
        header: bytes = self._record[0]
        return header

    @property
    def readable_length(self) -> int:
        """Bytes the driver sent."""
        record = self._record
        if not record[7] & _SHORT_HEADER:
            length: int = _HEADER + record[4]
            return length
        return self.chain.readable_length

    @property
    def writable_length(self) -> int:
        """Bytes the driver has room for, a status byte included."""
        length: int = self._record[5]
        return length

    @property
    def readable(self) -> list[memoryview]:
        """The driver's bytes in place, piece by piece; nothing is copied."""
        return self.chain.readable

    @property
    def writable(self) -> list[memoryview]:
        """The room for the answer in place, piece by piece. Set `written` after filling it."""
        return self.chain.writable

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes of what the driver sent; all that is left when negative."""
        if self._chain is None and size >= 0 and self._batch.serial == self._serial:
            position = self._position
            end = position + size
            if end <= _HEADER and not self._record[7] & _SHORT_HEADER:
                self._position = end
                header: bytes = self._record[0]
                return header[position:end]
        return self.chain.read(size)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the answer; returns how many bytes there was room for."""
        count = self.chain.write(data)
        self.written += count
        return count

    def waiting(self) -> AbstractAsyncContextManager[None]:
        """Mark what a coroutine only waits for: `async with request.waiting(): await news.get()`.

        When the ring is stopped meanwhile, the wait is cancelled (`asyncio.CancelledError` is
        raised in it); everywhere else a coroutine is left to end by itself. So nothing may go on
        in the background of the wait that touches the request's memory, such as a thread. See
        `VirtioDevice.recalled` for what becomes of the request.
        """
        return _Waiting(self)

    @property
    def begun(self) -> bool:
        """Whether something was written, or could have been through `writable`."""
        chain = self._chain
        return bool(self.written) or (
            chain is not None and (chain.wrote_anywhere or chain.written > 0)
        )


class _Waiting:
    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        self._request = request

    async def __aenter__(self) -> None:
        if self._request._recalled:
            # The ring is being stopped already: this is where a cancellation is expected.
            from asyncio import CancelledError, sleep

            await sleep(0)
            raise CancelledError
        self._request._waits += 1

    async def __aexit__(self, *exc: object) -> None:
        self._request._waits -= 1


class Recall(enum.Enum):
    """What became of a request whose wait was cancelled because its ring is stopped."""

    GIVEN_BACK = "given back"
    """As if it had never been taken: whoever serves the ring next takes it again."""
    KEPT = "kept"
    """Left in the in-flight region: whoever goes on with the region takes it again."""
    EMPTY = "empty"
    """Completed with nothing written (and `error_status`, where there is a status byte)."""


class VirtioDevice:
    """A virtio device: what it is, and what it does with a request.

    Class or instance attributes describe it: `device_id` (virtio 1.3, section 5), `num_queues`,
    `queue_size` (the largest accepted, in descriptors), `features` (the device type's own bits),
    `status_byte` (requests end in a status byte that completion writes), `error_status` (its value
    for a failed request), `config` (the configuration space, little-endian), `name` (what log lines
    and counters call it; the class's name where it is empty).

    `protocol_features` are what the device uses on `channel` by itself: HOST_NOTIFIER, or
    SHARED_OBJECT to look up others' objects. What follows from a hook needs no mention there.
    A device has the hooks of its type by defining them: `send_rarp(mac)`, `net_set_mtu(mtu)`,
    `create_crypto_session(op_code, session)` (returns the session's id, negative for failure) with
    `close_crypto_session(id)`, `get_shared_object(uuid)` (16 bytes; a descriptor that stays the
    device's, or None), `get_shmem_config()` (sizes in bytes by id), `set_gpu_socket(channel)`.
    """

    device_id: int = 0
    num_queues: int = 1
    queue_size: int = 1024
    features: int = 0
    status_byte: bool = False
    error_status: int = 1
    config: bytes = b""
    name: str = ""
    protocol_features: ProtocolFeatures = ProtocolFeatures(0)
    #: Queues of which every request of `async def handle` only waits, for news or for a thread that
    #: does not touch it: all of their coroutines are in `Request.waiting`, as it were.
    waiting_queues: frozenset[int] = frozenset()
    #: Version of what `save_state` returns; streams of a newer one are refused.
    state_version: int = 1
    #: The channel for requests of our own to the front-end, while there is one.
    channel: BackendChannel | None = None

    _failures: RateLimited | None = None

    def handle(self, queue: Queue, request: Request) -> Awaitable[None] | None:
        """Serve one request. Override this, as `def` or `async def`, or `handle_batch`."""
        raise NotImplementedError(
            f"{type(self).__name__} overrides neither handle nor handle_batch"
        )

    def handle_batch(self, queue: Queue, batch: Batch) -> None:
        """Serve every chain of the batch; `batch.done` says how each one went.

        The entries (`virtqueue.DONE`: head, status, flags, written) are filled in beforehand as
        success with everything written; the default calls `handle` for each that is `Batch.left`
        and records the rest.
        """
        done, packed, handle = batch.done, batch.records, self.handle
        flags = 1 if self.status_byte else 0
        requests: Iterable[tuple[int, tuple[Any, ...]]]
        if len(packed) == _RECORD_SIZE:
            # What a driver that waits for each brings: iterators would be dear.
            requests = ((0, _unpack(packed)),)
        else:
            requests = enumerate(_unpack_all(packed))
            left = batch.left
            if len(left) != len(batch):
                records = list(requests)
                requests = [records[position] for position in left]
        for position, record in requests:
            request = Request(batch, record, position)
            try:
                answer = handle(queue, request)
                status, written = request.status, request.written + flags
                if answer is not None or status or not flags <= written <= record[5]:
                    check_use(request, answer, flags)
                _pack_done(done, 8 * position, record[6], status, flags, written)
            except BaseException as error:
                status = fail_request(self, queue, error)
                _pack_done(done, 8 * position, record[6], status, flags, flags)

    def batch_handler(self, queue: int) -> CHandler | None:
        """A handler in C for the batches of that queue, or None; asked once for each queue.

        `handle_batch` is then called only when the handler leaves something, and works on the
        requests that `batch.left` names.
        """
        return None

    def describe(self, header: bytes) -> str:
        """What a request is, in a few words for the log, by its first 16 bytes (zero padded)."""
        return header.hex()

    def handle_event(self, data: int, events: int) -> None:
        """A descriptor is ready that was registered with `VringEpollHandler.register_listener`
        without a callback. Called on the worker's thread; override it before registering any.
        """
        raise NotImplementedError(f"{type(self).__name__} has no handle_event")

    def failed(self, queue: Queue, error: BaseException) -> int:
        """Log a handler's exception (rate-limited) and count it; returns `error_status`."""
        queue.counters.errors += 1
        if self._failures is None:
            self._failures = RateLimited(log)
        self._failures.error(
            "%s failed a request of queue %d", name_of(self), queue.index, exc_info=error
        )
        return self.error_status

    def recalled(self, queue: Queue, request: Request, recall: Recall) -> None:
        """Told what became of a request whose `waiting` was cancelled, since its ring is stopped.

        Called in the worker's loop when the coroutine has ended. A request that has begun nothing
        is given back, if all that was taken after it can be given back, too; otherwise it stays
        in the in-flight region, where that is negotiated; otherwise it completes empty. A coroutine
        that catches the `asyncio.CancelledError` and returns completes its request as ever.
        """

    # -- life cycle, called on the connection's thread ------------------------------------------

    def acked_features(self, features: int) -> None:
        """Told which feature bits the driver accepted."""

    def started(self) -> None:
        """The first ring is about to start. Raise `Refused` if the device cannot run now."""

    def stopped(self) -> None:
        """The last ring has stopped: the device is suspended and may run elsewhere."""

    def reset(self) -> None:
        """Bring the device's state back to the beginning."""

    def update_memory(self, memory: GuestMemory) -> None:
        """Told of every new snapshot of the guest's memory."""

    def get_config(self, offset: int, size: int) -> bytes:
        """Read `config`; bytes behind its end are zero."""
        return self.config[offset : offset + size].ljust(size, b"\0")

    def set_config(self, offset: int, data: bytes) -> None:
        """Refuse: no field is writable."""
        raise Refused("SET_CONFIG", "no field of this device's configuration is writable")

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed, if the front-end can."""
        channel = self.channel
        if channel is not None:
            with contextlib.suppress(ProtocolError, OSError):
                channel.config_change()

    # -- migration: override both to have the device's own state moved --------------------------

    def save_state(self) -> bytes:
        """The device's own state, all of it; called while every ring is stopped."""
        raise NotImplementedError

    def load_state(self, version: int, state: bytes) -> None:
        """Take over what `save_state` of `version` returned. Raise anything to refuse it."""
        raise NotImplementedError

    # -- placement ------------------------------------------------------------------------------

    def queues_per_thread(self) -> Sequence[int]:
        """Which queues each worker has, as masks: by default one worker for each queue.

        Where `handle` is a coroutine function and this is not overridden, one worker has them all.
        Coroutines of different workers run on different threads' event loops: they must not share
        what asyncio has (a Queue, an Event).
        """
        return [1 << index for index in range(self.num_queues)]

    def close(self) -> None:
        """Release what the device holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def close_device(device: VirtioDevice) -> None:
    """Close a device; one that fails keeps no other from being closed."""
    try:
        device.close()
    except Exception:
        log.exception("%s has failed to close", name_of(device))


def fail_request(device: VirtioDevice, queue: Queue, error: BaseException) -> int:
    """A handler has raised `error`: the status of its request, whatever `failed` does."""
    try:
        status = device.failed(queue, error)
        if not 0 <= status <= 255:
            raise BackendUsageError(f"failed() returned {status!r}, which is no status byte")
    except BaseException:
        log.exception("%s.failed has failed itself", name_of(device))
        status = device.error_status
    if queue._on_exit is not None and isinstance(error, KeyboardInterrupt | SystemExit):
        queue._on_exit(error)
    return status


def check_use(request: Request, answer: object, flags: int) -> None:
    """Raise `BackendUsageError` when a handler that returned `answer` has not left its request as
    it can be completed; `flags` is 1 with a status byte.
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
    written, room = request.written, request.writable_length - flags
    if not 0 <= written <= room:
        raise BackendUsageError(f"request.written is {written}, but there is room for {room} bytes")
    if request.status and not flags:
        raise BackendUsageError(
            f"request.status is {request.status}, but the device has no status byte"
        )
    if not 0 <= request.status <= 255:
        raise BackendUsageError(f"request.status is {request.status}, a status byte is 0 to 255")


def name_of(device: VirtioDevice) -> str:
    """What to call it in front of people."""
    return device.name or type(device).__name__
