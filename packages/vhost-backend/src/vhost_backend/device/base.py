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
import logging
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Final, Self

from guest_memory import GuestMemory
from vhost_protocol import BackendChannel, ProtocolError, ProtocolFeatures
from virtqueue import (
    DONE,
    RECORD,
    Batch,
    CHandler,
    RecordField,
)

from ..errors import BackendUsageError, DeviceRefused
from ..rate_limited_log import RateLimited
from .hooks import defaults
from .request import QueueInfo, Recall, Request, StatusRequest, check_use

log: logging.Logger = logging.getLogger("vhost_backend")

_RECORD_SIZE: Final = RECORD.size
# Plain numbers: enum members would cost a lookup each time.
_WRITABLE_LENGTH: Final = int(RecordField.WRITABLE_LENGTH)
_HEAD: Final = int(RecordField.HEAD)
_unpack: Final = RECORD.unpack
_unpack_all: Final = RECORD.iter_unpack
_pack_done: Final = DONE.pack_into


@defaults
class VirtioDevice:
    """A virtio device: what it is, and what it does with a request.

    Class or instance attributes describe it: `device_id` (virtio 1.3, section 5), `num_queues`,
    `queue_size` (the largest accepted, in descriptors), `features` (the device type's own bits),
    `status_byte` (requests end in a status byte that completion writes), `error_status` (its value
    for a failed request), `config` (the configuration space, little-endian), `name` (what log lines
    and counters call it; the class's name where it is empty).

    `protocol_features` are what the device uses on `channel` by itself: HOST_NOTIFIER, or
    SHARED_OBJECT to look up others' objects. What follows from a hook needs no mention there.
    A device has the hooks of its type by defining them. Protocols of the package name them:
    `Rarp`, `Mtu`, `CryptoSessions`, `SharedObjects`, `SharedMemory`, `GpuSocket`. Half of one is
    refused when the device is served.
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

    def handle(self, queue: QueueInfo, request: Request) -> Awaitable[None] | None:
        """Serve one request. Override this, as `def` or `async def`, or `handle_batch`."""
        raise NotImplementedError(
            f"{type(self).__name__} overrides neither handle nor handle_batch"
        )

    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        """Serve every chain of the batch; `batch.done` says how each one went.

        The entries (`virtqueue.DONE`: head, status, flags, written) are filled in beforehand as
        success with everything written; the default calls `handle` for each that is `Batch.left`
        and records the rest.
        """
        done, packed, handle = batch.done, batch.records, self.handle
        flags = 1 if self.status_byte else 0
        make = StatusRequest if flags else Request
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
            request = make(batch, record, position)
            try:
                answer = handle(queue, request)
                status, written = request.status, request.written + flags
                if answer is not None or status or not flags <= written <= record[_WRITABLE_LENGTH]:
                    check_use(request, answer, flags)
                _pack_done(done, 8 * position, record[_HEAD], status, flags, written)
            except BaseException as error:
                status = fail_request(self, queue, error)
                _pack_done(done, 8 * position, record[_HEAD], status, flags, flags)

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

    def failed(self, queue: QueueInfo, error: BaseException) -> int:
        """Log a handler's exception (rate-limited) and count it; returns `error_status`."""
        queue.counters.errors += 1
        if self._failures is None:
            self._failures = RateLimited(log)
        self._failures.error(
            "%s failed a request of queue %d", name_of(self), queue.index, exc_info=error
        )
        return self.error_status

    def recalled(self, queue: QueueInfo, request: Request, recall: Recall) -> None:
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
        """The first ring is about to start. Raise `DeviceRefused` if the device cannot run now."""

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
        raise DeviceRefused("no field of this device's configuration is writable")

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


def asked_features(device: VirtioDevice) -> ProtocolFeatures:
    """Protocol features that the device asks for beside its hooks."""
    return device.protocol_features | (ProtocolFeatures.CONFIG if device.config else 0)


def close_device(device: VirtioDevice) -> None:
    """Close a device; one that fails keeps no other from being closed."""
    try:
        device.close()
    except Exception:
        log.exception("%s has failed to close", name_of(device))


def fail_request(device: VirtioDevice, queue: QueueInfo, error: BaseException) -> int:
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


def name_of(device: VirtioDevice) -> str:
    """What to call it in front of people."""
    return device.name or type(device).__name__
