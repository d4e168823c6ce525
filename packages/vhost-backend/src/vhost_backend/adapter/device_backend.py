"""`DeviceBackend`: runs a `VirtioDevice` behind the `VhostUserBackend` interface.

Here is the whole life of a batch: take it under the ring's lock, have the device work on it with no
lock held, complete it and take the next in one engine call, until the ring is empty; then ask for
kicks, look once more, and sleep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from guest_memory import GuestMemory
from vhost_protocol import BackendChannel, ProtocolFeatures
from virtqueue import DONE, RECORD, Batch, CHandler, DoneFlags, UsageError

from ..backend import VhostUserBackendBase
from ..device.base import Queue, VirtioDevice, fail_request
from ..device.state_stream import StateTransfer
from ..epoll_handler import VringEpollHandler
from ..errors import BackendUsageError
from ..features import RING_FEATURES, VirtioFeature
from ..vring.locks import Vring
from ..vring.state import VringState
from .checks import check_device
from .ring_worker import QueueWorker

log: logging.Logger = logging.getLogger("vhost_backend")

#: Hooks that a device of the type has, and no other: see `control.device`.
DEVICE_HOOKS = frozenset(
    ("send_rarp", "net_set_mtu", "create_crypto_session", "close_crypto_session")
)
_HOOK_FEATURES = {
    "get_shared_object": ProtocolFeatures.SHARED_OBJECT,
    "get_shmem_config": ProtocolFeatures.SHMEM,
}

#: Chains taken at once.
BATCH = 128
#: Batches in a row for one queue before its neighbours on the same worker get their turn.
TURN = 8


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
        self._queues: dict[int, Queue] = {}
        #: Handlers in C by queue, where the device has them.
        self._handlers: dict[int, CHandler | None] = {}
        self._transfer: StateTransfer | None = None
        #: In an event loop of the caller's: what ends that when a handler raises to end it.
        self.on_exit: Callable[[BaseException], None] | None = None

    @property
    def status_byte(self) -> bool:
        """Whether completions write a status byte."""
        return self.device.status_byte

    @property
    def error_status(self) -> int:
        """The status byte of a request that the device will not complete any more."""
        return self.device.error_status

    def num_queues(self) -> int:
        """The device's."""
        return self.device.num_queues

    def max_queue_size(self) -> int:
        """The device's `queue_size`."""
        return self.device.queue_size

    def features(self) -> int:
        """The device's own bits and what the rings offer for every device."""
        return self.device.features | self.ring_features

    def acked_features(self, features: int) -> None:
        """Told to the device."""
        self.device.acked_features(features)

    def protocol_features(self) -> ProtocolFeatures:
        """What the device overrides, and what it asks for."""
        device, kind = self.device, type(self.device)
        features = device.protocol_features
        if device.config or kind.get_config is not VirtioDevice.get_config:
            features |= ProtocolFeatures.CONFIG
        if kind.save_state is not VirtioDevice.save_state:
            features |= ProtocolFeatures.DEVICE_STATE
        for name, feature in _HOOK_FEATURES.items():
            if hasattr(device, name):
                features |= feature
        return features

    def __getattr__(self, name: str) -> Any:
        """Hooks of device types, which only some devices have."""
        if name in DEVICE_HOOKS:
            return getattr(self.device, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def set_backend_req_fd(self, channel: object) -> None:
        """Kept where the device finds it."""
        assert isinstance(channel, BackendChannel)
        self.device.channel = channel

    def get_shared_object(self, uuid: bytes) -> int | None:
        """Asked of the device."""
        hook = getattr(self.device, "get_shared_object", None)
        return None if hook is None else hook(uuid)

    def get_shmem_config(self) -> Sequence[int]:
        """Asked of the device."""
        hook = getattr(self.device, "get_shmem_config", None)
        return () if hook is None else hook()

    def set_gpu_socket(self, channel: object) -> None:
        """Told to the device."""
        self.device.set_gpu_socket(channel)  # type: ignore[attr-defined]

    @property
    def uses_gpu_socket(self) -> bool:
        """Whether the device wants the GPU protocol's socket."""
        return hasattr(self.device, "set_gpu_socket")

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """Save (0) or load (1) the device's state on a thread of its own."""
        self.abandon_device_state()
        self._transfer = StateTransfer(self.device, fd, load=direction == 1)
        return None

    def abandon_device_state(self) -> None:
        """No state of the present front-end's is loaded any more."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.abandon()

    def check_device_state(self) -> bool:
        """How the last transfer ended; False without one."""
        transfer, self._transfer = self._transfer, None
        return transfer is not None and transfer.succeeded()

    def reset_device(self) -> None:
        """Told to the device."""
        self.device.reset()

    def get_config(self, offset: int, size: int) -> bytes:
        """Asked of the device."""
        return self.device.get_config(offset, size)

    def set_config(self, offset: int, data: bytes) -> None:
        """Told to the device."""
        self.device.set_config(offset, data)

    def device_started(self) -> None:
        """Told to the device."""
        self.device.started()

    def device_stopped(self) -> None:
        """Told to the device."""
        self.device.stopped()

    def describe_request(self, header: bytes) -> str:
        """Asked of the device, for the log."""
        return self.device.describe(header)

    def update_memory(self, memory: GuestMemory) -> None:
        """Told to the device."""
        self.device.update_memory(memory)

    def queues_per_thread(self) -> Sequence[int]:
        """The device's choice."""
        return self.device.queues_per_thread()

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
            # A ring that is stopped, broken or moved meanwhile gets a new generation: then nobody
            # waits for the batch in hand any more.
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

    def _cycle(self, state: VringState, view: Queue, limit: int) -> Batch | None:
        """`VringState.cycle`, also when the device has left a batch that cannot be completed."""
        try:
            return state.cycle(limit)
        except UsageError as error:
            if state.queue is None:
                raise
            batch = state.queue.refused_batch()
            self._put_right(view, batch, error)
            # Also where it was taken in C, so that the driver is signalled for it.
            state.finish(len(batch))
        return state.cycle(limit)

    def _put_right(self, queue: Queue, batch: Batch, refused: UsageError) -> None:
        """Fail the requests of a batch that `done` says impossible things of."""
        flags, found = int(self.device.status_byte), False
        for position, record in enumerate(RECORD.iter_unpack(batch.records)):
            head, room = record[6], record[5]
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
        if type(self.device).handle_event is VirtioDevice.handle_event:
            raise BackendUsageError(
                f"{type(self.device).__name__} has no handle_event for a listener's events:"
                " define it, or give a callback"
            )

    def serve_batch(self, queue: Queue, batch: Batch) -> None:
        """Have the device work on what is left for it of a batch; no lock is held."""
        try:
            self.device.handle_batch(queue, batch)
        except BaseException as error:
            self.fail_batch(queue, batch, error)

    def fail_batch(self, queue: Queue, batch: Batch, error: BaseException) -> None:
        """The device has failed in `handle_batch`; nobody knows how far it came.

        Requests that may not have been served must not look as if they were.
        """
        self._fail(batch, fail_request(self.device, queue, error))

    def _fail(self, batch: Batch, status: int) -> None:
        """Every request that is left ends with `status`, where it has a status byte."""
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
        """Its worker has ended."""
        self._handlers.pop(index, None)

    def view(self, state: VringState) -> Queue:
        """The queue as the device sees it."""
        view = self._queues.get(state.index)
        if view is None:
            view = self._queues[state.index] = Queue(state.index, state.counters)
            view._on_exit = self.on_exit
        return view
