"""The interface between the daemon and a device: `VhostUserBackend`.

The daemon speaks vhost-user and owns rings and threads; a back-end says what it offers and works
on its queues when they are kicked. Most devices are easier to write as a `VirtioDevice`, which is
adapted to this interface; implement it directly for full control of the rings.

The Protocol is frozen: a hook that is added later goes to `VhostUserBackendBase` only. The hooks
that a back-end defines, here and in `device.hooks`, decide what is offered. A method of the base's
does not count as defined, also where a back-end without that base takes it from there:
`get_shmem_config = VhostUserBackendBase.get_shmem_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from guest_memory import GuestMemory
from vhost_protocol import BackendChannel, GpuBackendChannel, ProtocolFeatures

from .device import hooks
from .device.hooks import OF_A_TYPE, HookGroup, defaults, provided
from .fds.eventfd import WakeFd
from .vring.locks import Vring

# The hooks of device types are a back-end's, too, under the same names.
__all__ = [
    "OF_A_BACKEND",
    "STATE_TRANSFER",
    "STATUS_BYTE",
    "HookGroup",
    "VhostUserBackend",
    "VhostUserBackendBase",
    "hooks",
    "provided",
]


@defaults
class VhostUserBackend(Protocol):
    """What the daemon asks of a back-end. Derive from `VhostUserBackendBase` for the defaults.

    Configuration methods are called on the connection's thread, `handle_event` on a worker's.
    """

    def num_queues(self) -> int:
        """How many queues the device has."""

    def max_queue_size(self) -> int:
        """The ring size advised, in descriptors; a front-end may set up larger rings."""

    def features(self) -> int:
        """Virtio feature bits offered, the device's and the rings'."""

    def acked_features(self, features: int) -> None:
        """Told which of the offered feature bits the driver accepted."""

    def protocol_features(self) -> ProtocolFeatures:
        """Features to use on the channel: HOST_NOTIFIER, or SHARED_OBJECT to look up objects.

        Features that have hooks need no mention here.
        """

    def reset_device(self) -> None:
        """Bring the device's own state back to the beginning."""

    def set_event_idx(self, enabled: bool) -> None:
        """Told whether EVENT_IDX was negotiated."""

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of configuration space from `offset`; fewer than `size` is an error."""

    def set_config(self, offset: int, data: bytes) -> None:
        """Write to configuration space; raise `DeviceRefused` for a field that is read-only."""

    def update_memory(self, memory: GuestMemory) -> None:
        """Told of every new snapshot of the guest's memory."""

    def set_backend_req_fd(self, channel: BackendChannel) -> None:
        """Given the channel for requests of our own to the front-end, which closes it."""

    def get_shared_object(self, uuid: bytes) -> int | None:
        """A descriptor for the shared object of that UUID, which the daemon will not close."""

    def set_gpu_socket(self, channel: GpuBackendChannel) -> None:
        """Given the GPU protocol's channel, which is the back-end's from here on."""

    def queues_per_thread(self) -> Sequence[int]:
        """One mask of queue indices for each worker thread."""

    def exit_event(self, thread_index: int) -> WakeFd | None:
        """A wake-up of the back-end's own that ends that worker; None for the daemon's."""

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Work on a queue, or on a descriptor registered with `VringEpollHandler`.

        `device_event` is the index into `vrings` (this worker's queues, in the order of their
        mask's bits) of the queue that was kicked, or a larger number that a listener was
        registered with; `event_set` holds epoll's bits. True: there is more, call again soon.
        """

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """Start to save (0) or load (1) the device's state over `fd`, which it takes over.

        Returns a descriptor to use instead, or None.
        """

    def check_device_state(self) -> bool:
        """Whether the transfer that was started is complete and successful."""

    def get_shmem_config(self) -> Sequence[int]:
        """Sizes in bytes of the shared memory regions, by id; 0 for an id that is not used."""


@defaults
class VhostUserBackendBase:
    """`VhostUserBackend` with its defaults; `num_queues` and `handle_event` are left to do.

    It has the later hooks as well. With `status_byte` completions write a status byte; then
    `error_status` is that of a request which the back-end has taken and will not complete.
    """

    status_byte: bool = False
    error_status: int = 1

    def num_queues(self) -> int:
        """How many queues the device has."""
        raise NotImplementedError

    def max_queue_size(self) -> int:
        """1024."""
        return 1024

    def features(self) -> int:
        """Nothing."""
        return 0

    def acked_features(self, features: int) -> None:
        """Ignore them."""

    def protocol_features(self) -> ProtocolFeatures:
        """Nothing."""
        return ProtocolFeatures(0)

    def reset_device(self) -> None:
        """No state to reset."""

    def set_event_idx(self, enabled: bool) -> None:
        """Nothing to do: the rings of this library follow it themselves."""

    def get_config(self, offset: int, size: int) -> bytes:
        """No configuration space."""
        return b""

    def set_config(self, offset: int, data: bytes) -> None:
        """Ignore the write."""

    def update_memory(self, memory: GuestMemory) -> None:
        """Nothing to do: the rings follow it themselves."""

    def set_backend_req_fd(self, channel: BackendChannel) -> None:
        """Not used."""

    def get_shared_object(self, uuid: bytes) -> int | None:
        """No such object."""
        return None

    def set_gpu_socket(self, channel: GpuBackendChannel) -> None:
        """Not used."""

    def queues_per_thread(self) -> Sequence[int]:
        """All queues on one worker."""
        return [(1 << self.num_queues()) - 1]

    def exit_event(self, thread_index: int) -> WakeFd | None:
        """The daemon's own."""
        return None

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Work on a queue."""
        raise NotImplementedError

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """No state to transfer."""
        raise NotImplementedError

    def check_device_state(self) -> bool:
        """No transfer, no success."""
        return False

    def get_shmem_config(self) -> Sequence[int]:
        """No shared memory regions."""
        return ()

    # -- later hooks, which the Protocol does not have ------------------------------------------

    def device_started(self) -> None:
        """The first ring is about to start; raise `DeviceRefused` when the device cannot run."""

    def device_stopped(self) -> None:
        """The last ring has stopped: the device is suspended and may run elsewhere."""

    def abandon_device_state(self) -> None:
        """The front-end has gone: no state that it still sends must reach the device."""

    def device_name(self) -> str:
        """What the log calls the device: the class's name."""
        return type(self).__name__

    def describe_request(self, header: bytes) -> str:
        """What a request is, for the log, by its first 16 bytes (zero padded)."""
        return header.hex()

    def check_listener(self) -> None:
        """Raise `BackendUsageError` unless `handle_event` takes what listeners are told."""

    def suspend_queue(
        self, queue: int, wake: Callable[[], None], keep: bool = True
    ) -> Callable[[], bool]:
        """Call back the requests of that queue that only wait; nothing new is taken meanwhile.

        Returns what tells whether the back-end has ended those it works on; `wake` is to be called,
        from any thread, when that has come true. With `keep` requests that cannot be given back
        may stay in the in-flight region. Not asked of a back-end that does not define it: there
        each request is worked on until it completes.
        """
        raise NotImplementedError


class StateTransfer(Protocol):
    """A back-end that moves its device's state in a migration."""

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """Begin to move it."""

    def check_device_state(self) -> bool:
        """How that went."""


class StatusByte(Protocol):
    """A back-end whose requests end in a status byte."""

    status_byte: bool
    error_status: int


STATE_TRANSFER: Final = HookGroup[StateTransfer](StateTransfer, ProtocolFeatures.DEVICE_STATE)
STATUS_BYTE: Final = HookGroup[StatusByte](StatusByte)

#: The table: what a back-end has by its device's type, and what it moves.
OF_A_BACKEND: Final[tuple[HookGroup[Any], ...]] = (*OF_A_TYPE, STATE_TRANSFER, STATUS_BYTE)
