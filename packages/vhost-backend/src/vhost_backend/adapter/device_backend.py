"""`DeviceBackend`: runs a `VirtioDevice` behind the `VhostUserBackend` interface.

Here is the whole life of a batch. A worker takes it under the ring's lock and has the device work
on it without the lock. One engine call then completes it and takes the next, until the ring is
empty. Before it sleeps, the worker asks for kicks and looks once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from vhost_protocol import BackendChannel, ProtocolFeatures
from virtqueue import DONE, RECORD, Batch, CHandler, DoneFlags, RecordField, UsageError

from ..backend import STATE_TRANSFER, VhostUserBackendBase
from ..device.base import VirtioDevice, asked_features, fail_request
from ..device.hooks import OF_A_TYPE, SAVED_STATE, provided
from ..device.request import QueueInfo
from ..device.state_stream import StateTransfers
from ..epoll_handler import VringEpollHandler
from ..errors import BackendUsageError
from ..features import RING_FEATURES, VirtioFeature
from ..vring.locks import Vring
from ..vring.state import VringState
from .checks import check_device
from .passing import passes_on
from .ring_worker import QueueWorker

log: logging.Logger = logging.getLogger("vhost_backend")

#: Chains taken at once.
BATCH = 128
#: Batches in a row for one queue before its neighbours on the same worker get their turn.
TURN = 8


@passes_on(
    *("acked_features", "update_memory", "queues_per_thread", "abandon_device_state"),
    *(hook for group in (*OF_A_TYPE, STATE_TRANSFER) for hook in group.hooks),
    reset_device=VirtioDevice.reset,
    device_started=VirtioDevice.started,
    device_stopped=VirtioDevice.stopped,
    describe_request=VirtioDevice.describe,
)
class DeviceBackend(VhostUserBackendBase):
    """A device as a back-end. `DeviceBackend.of(device)` picks the kind its `handle` needs."""

    #: The kind of worker that serves it.
    worker_type: type[VringEpollHandler] = QueueWorker
    #: What its rings offer.
    ring_features: int = RING_FEATURES | VirtioFeature.IN_ORDER

    @staticmethod
    def of(device: VirtioDevice) -> DeviceBackend:
        """A back-end for `device`: on an event loop when its `handle` is a coroutine function.

        Raises `BackendUsageError` for a device that cannot work.
        """
        from . import backend_for

        return backend_for(device)

    def __init__(self, device: VirtioDevice) -> None:
        check_device(device)
        self.device = device
        #: The objects whose methods are passed on.
        self.parts: tuple[object, ...] = (device,)
        if SAVED_STATE.of(device) is not None:
            self.parts = device, StateTransfers(device)
        self.status_byte: bool = device.status_byte
        self.error_status: int = device.error_status
        self._queues: dict[int, QueueInfo] = {}
        #: Handlers in C by queue, where the device has them.
        self._handlers: dict[int, CHandler | None] = {}
        #: In a caller's event loop: ends it when a handler raises KeyboardInterrupt or SystemExit.
        self.on_exit: Callable[[BaseException], None] | None = None

    def num_queues(self) -> int:
        """The device's."""
        return self.device.num_queues

    def max_queue_size(self) -> int:
        """The device's `queue_size`."""
        return self.device.queue_size

    def features(self) -> int:
        """The device's own bits, and those that the rings offer for every device."""
        return self.device.features | self.ring_features

    def protocol_features(self) -> ProtocolFeatures:
        """The features that the device asks for, and CONFIG where it has a `config`."""
        return asked_features(self.device)

    def set_backend_req_fd(self, channel: BackendChannel) -> None:
        """Kept where the device finds it."""
        self.device.channel = channel

    def device_name(self) -> str:
        """The class of the device."""
        return type(self.device).__name__

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Serve a queue until it is empty or has had its turn; pass other events on."""
        if device_event >= len(vrings):
            self.device.handle_event(device_event, event_set)
            return False
        vring = vrings[device_event]
        with vring.get_mut() as state:
            if not state.running:
                return False
            # A ring that is stopped, broken or moved meanwhile gets a new generation. The batch in
            # hand is then dropped.
            generation = state.generation
            view = self.view(state)
            queue = state.queue
            assert queue is not None
            handler = self.batch_handler(state.index) if queue.engine == "c" else None
            state.disable_notification()
        try:
            for _ in range(TURN):
                with vring.get_mut() as state:
                    if state.generation != generation:
                        return False
                    batch = self._cycle(state, view, BATCH)
                    if not batch:
                        return False  # broken, or empty, and the driver has been asked for kicks
                    view.window, view.memory = queue.window, queue.memory
                    on_demand = state.on_demand
                    unusable = on_demand.has_stand_ins and not on_demand.usable(batch[0])
                if unusable:
                    self._fail(batch, self.device.error_status)
                elif handler is None:
                    self.serve_batch(view, batch)
                elif handler.handle(queue):
                    with vring.get_ref() as state:
                        if state.generation != generation:
                            return False
                    self.serve_batch(view, batch)
        finally:
            view.forget()
        with vring.get_mut() as state:
            if state.generation == generation:
                self._cycle(state, view, 0)
        return True

    def _cycle(self, state: VringState, view: QueueInfo, limit: int) -> Batch | None:
        """`VringState.cycle`; first fails the requests that the device has completed wrongly."""
        try:
            return state.cycle(limit)
        except UsageError as error:
            if state.queue is None:
                raise
            batch = state.queue.refused_batch()
            self._put_right(view, batch, error)
            # A batch that was taken in C must be completed here, too, to signal the driver.
            state.finish(len(batch))
        return state.cycle(limit)

    def _put_right(self, queue: QueueInfo, batch: Batch, refused: UsageError) -> None:
        """Fail the requests of a batch for which `done` holds impossible values."""
        flags, found = int(self.device.status_byte), False
        for position, record in enumerate(RECORD.iter_unpack(batch.records)):
            head, room = record[RecordField.HEAD], record[RecordField.WRITABLE_LENGTH]
            named, _, kind, written = DONE.unpack_from(batch.done, position * DONE.size)
            if kind & DoneFlags.KEEP:
                continue
            if named != head:
                what = f"done[{position}] names chain {named} instead of {head}"
            elif written > room:
                what = (
                    f"done[{position}] says {written} bytes written, but there is room for {room}"
                )
            else:
                continue
            found = True
            status = fail_request(self.device, queue, BackendUsageError(what))
            DONE.pack_into(batch.done, position * DONE.size, head, status, flags, flags)
        if not found:
            raise refused

    def check_listener(self) -> None:
        """Raise `BackendUsageError` unless the device takes events of its own."""
        if provided(self.device, VirtioDevice.handle_event) is None:
            raise BackendUsageError(
                f"{type(self.device).__name__} has no handle_event for a listener's events:"
                " define it, or give a callback"
            )

    def serve_batch(self, queue: QueueInfo, batch: Batch) -> None:
        """Have the device work on the rest of a batch (`batch.left`), with no lock held."""
        try:
            self.device.handle_batch(queue, batch)
        except BaseException as error:
            self.fail_batch(queue, batch, error)

    def fail_batch(self, queue: QueueInfo, batch: Batch, error: BaseException) -> None:
        """Fail every request that was left to the device, whose `handle_batch` raised `error`.

        It is unknown how many it has served, and an unserved request must not look served.
        """
        self._fail(batch, fail_request(self.device, queue, error))

    def _fail(self, batch: Batch, status: int) -> None:
        """End every request that is left with `status`, where it has a status byte."""
        flags = int(self.device.status_byte)
        for position in batch.left:
            head, _, kind, _ = DONE.unpack_from(batch.done, position * DONE.size)
            if not kind & DoneFlags.KEEP:
                DONE.pack_into(batch.done, position * DONE.size, head, status, flags, flags)

    def batch_handler(self, index: int) -> CHandler | None:
        """The device's handler in C for that queue, made when it is first asked for."""
        if index not in self._handlers:
            try:
                self._handlers[index] = self.device.batch_handler(index)
            except BaseException:
                log.exception(
                    "%s.batch_handler failed: queue %d is served in Python",
                    type(self.device).__name__,
                    index,
                )
                self._handlers[index] = None
        return self._handlers[index]

    def drop_handler(self, index: int) -> None:
        """Forget the handler of a queue whose worker has ended."""
        self._handlers.pop(index, None)

    def view(self, state: VringState) -> QueueInfo:
        """The queue as the device sees it."""
        view = self._queues.get(state.index)
        if view is None:
            view = self._queues[state.index] = QueueInfo(state.index, state.counters)
            view._on_exit = self.on_exit
        return view
