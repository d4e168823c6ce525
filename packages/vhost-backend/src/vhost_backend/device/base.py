"""Devices the comfortable way: derive from `VirtioDevice` and override one of three methods.

- `handle(queue, request)` is called for each request, which completes when it returns.
- `async def handle(queue, request)`: requests of all queues run concurrently on one event loop
  and complete in the order in which their coroutines end. A coroutine that only waits, for a packet
  or a key, does so in `async with request.waiting():`, and a stop of the ring cancels that wait.
- `handle_batch(queue, batch)` is called with all requests that are available: the fastest way.

A handler that raises any error fails its request (with `error_status`, where the device type has a
status byte). The error is logged and ends nothing else, so `sys.exit()` on a worker does not end
the daemon. A misused request fails likewise: `written` beyond the room, a `status` where the device
type has no status byte, an answer that is returned instead of written.
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
    """A virtio device: its description, and its handling of requests.

    Class or instance attributes describe it: `device_id` (virtio 1.3, section 5), `num_queues`,
    `queue_size` (the largest accepted, in descriptors), `features` (the device type's own bits),
    `status_byte` (requests end in a status byte that completion writes), `error_status` (its value
    for a failed request), `config` (the configuration space, little-endian), `name` (the name in
    log lines and counters; the class's name where it is empty).

    `protocol_features` are those that the device uses on `channel` by itself: HOST_NOTIFIER, or
    SHARED_OBJECT to look up others' objects. Features that follow from a hook need no mention
    there. A device has the hooks of its type by defining them. Protocols of the package name them:
    `Rarp`, `Mtu`, `CryptoSessions`, `SharedObjects`, `SharedMemory`, `GpuSocket`. A device that
    defines only a part of one is refused when it is served.
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
    #: Queues whose requests of `async def handle` all only wait, for an event or for a thread that
    #: does not touch the request: their coroutines count as being in `Request.waiting`.
    waiting_queues: frozenset[int] = frozenset()
    #: Version of what `save_state` returns; streams of a newer one are refused.
    state_version: int = 1
    #: The channel for our own requests to the front-end, while there is one.
    channel: BackendChannel | None = None

    _failures: RateLimited | None = None

    def handle(self, queue: QueueInfo, request: Request) -> Awaitable[None] | None:
        """Serve one request. Override this, as `def` or `async def`, or `handle_batch`."""
        raise NotImplementedError(
            f"{type(self).__name__} overrides neither handle nor handle_batch"
        )

    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        """Serve every chain of the batch, and put each one's result into `batch.done`.

        The entries (`virtqueue.DONE`: head, status, flags, written) are filled in beforehand as
        success with everything written. The default calls `handle` for each request in
        `Batch.left`, and records its result.
        """
        done, packed, handle = batch.done, batch.records, self.handle
        flags = 1 if self.status_byte else 0
        make = StatusRequest if flags else Request
        requests: Iterable[tuple[int, tuple[Any, ...]]]
        if len(packed) == _RECORD_SIZE:
            # A driver that waits for each request sends one: iterators would be expensive.
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
        """A handler in C for the batches of that queue, or None; called once for each queue.

        `handle_batch` is then called only when the handler leaves requests, and works on those that
        `batch.left` names.
        """
        return None

    def describe(self, header: bytes) -> str:
        """Describe a request in a few words for the log, by its first 16 bytes (zero padded)."""
        return header.hex()

    def handle_event(self, data: int, events: int) -> None:
        """Called on the worker's thread when a descriptor without a callback is ready.

        `VringEpollHandler.register_listener` registers descriptors; override this method before.
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
        """Called with the fate of a request whose `waiting` was cancelled by a stop of its ring.

        The call comes in the worker's loop, when the coroutine has ended. A request that has begun
        nothing is given back, if all requests taken after it can be given back, too. Otherwise it
        stays in the in-flight region, where that is negotiated, or else completes empty. A
        coroutine that catches the `asyncio.CancelledError` and returns completes its request as
        usual.
        """

    # -- life cycle, called on the connection's thread ------------------------------------------

    def acked_features(self, features: int) -> None:
        """Called with the feature bits that the driver accepted."""

    def started(self) -> None:
        """The first ring is about to start. Raise `DeviceRefused` if the device cannot run now."""

    def stopped(self) -> None:
        """Called when the last ring has stopped: the device may now run elsewhere."""

    def reset(self) -> None:
        """Reset the device's state."""

    def update_memory(self, memory: GuestMemory) -> None:
        """Called with every new snapshot of the guest's memory."""

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
        """The device's whole own state; called while every ring is stopped."""
        raise NotImplementedError

    def load_state(self, version: int, state: bytes) -> None:
        """Take over the state that `save_state` of `version` returned. Any error refuses it."""
        raise NotImplementedError

    # -- placement ------------------------------------------------------------------------------

    def queues_per_thread(self) -> Sequence[int]:
        """The queues of each worker, as masks: by default one worker for each queue.

        Where `handle` is a coroutine function and this is not overridden, one worker has all
        queues. Coroutines of different workers run on different threads' event loops, so they must
        not share asyncio's objects (a Queue, an Event).
        """
        return [1 << index for index in range(self.num_queues)]

    def close(self) -> None:
        """Release the device's resources."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def asked_features(device: VirtioDevice) -> ProtocolFeatures:
    """Protocol features that the device asks for beside its hooks."""
    return device.protocol_features | (ProtocolFeatures.CONFIG if device.config else 0)


def close_device(device: VirtioDevice) -> None:
    """Close a device; an error is logged, so that other devices are closed, too."""
    try:
        device.close()
    except Exception:
        log.exception("%s has failed to close", name_of(device))


def fail_request(device: VirtioDevice, queue: QueueInfo, error: BaseException) -> int:
    """The status of a request whose handler raised `error`, even if `failed` fails itself."""
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
    """The device's name for log lines and counters."""
    return device.name or type(device).__name__
