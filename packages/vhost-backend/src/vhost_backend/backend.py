"""The interface between the daemon and a device: `VhostUserBackend`.

The daemon speaks vhost-user and owns rings and threads. A back-end says which features it offers,
and works on its queues when they are kicked. Most devices are easier to write as a `VirtioDevice`,
which is adapted to this interface; implement it directly for full control of the rings.

The Protocol is frozen: hooks that are added later go to `VhostUserBackendBase` only. The hooks that
a back-end defines, here and in `device.hooks`, decide which features are offered. A method of the
base does not count as defined, even in a back-end without that base that takes it from there:
`get_shmem_config = VhostUserBackendBase.get_shmem_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from guest_memory import GuestMemory
from vhost_protocol import BackendChannel, GpuBackendChannel, ProtocolFeatures

from .device.hooks import (
    BY_REQUEST,
    CRYPTO_SESSIONS,
    GPU_SOCKET,
    MTU,
    OF_A_TYPE,
    RARP,
    HookGroup,
    defaults,
    provided,
)
from .fds.eventfd import WakeFd
from .vring.locks import Vring

# A back-end has the hooks of device types under the same names.
__all__ = [
    "BY_REQUEST",
    "CRYPTO_SESSIONS",
    "GPU_SOCKET",
    "MTU",
    "OF_A_BACKEND",
    "OF_A_TYPE",
    "RARP",
    "STATE_TRANSFER",
    "STATUS_BYTE",
    "HookGroup",
    "VhostUserBackend",
    "VhostUserBackendBase",
    "provided",
]


@defaults
class VhostUserBackend(Protocol):
    """The methods that the daemon calls. Derive from `VhostUserBackendBase` for the defaults.

    Configuration methods are called on the connection's thread, `handle_event` on a worker's.
    """

    def num_queues(self) -> int:
        """The number of the device's queues."""

    def max_queue_size(self) -> int:
        """The advised ring size, in descriptors; a front-end may set up larger rings."""

    def features(self) -> int:
        """Virtio feature bits offered, the device's and the rings'."""

    def acked_features(self, features: int) -> None:
        """Called with the feature bits that the driver accepted."""

    def protocol_features(self) -> ProtocolFeatures:
        """Features to use on the channel: HOST_NOTIFIER, or SHARED_OBJECT to look up objects.

        Features that have hooks need no mention here.
        """

    def reset_device(self) -> None:
        """Reset the device's own state."""

    def set_event_idx(self, enabled: bool) -> None:
        """Called with whether EVENT_IDX was negotiated."""

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of configuration space from `offset`; fewer than `size` is an error."""

    def set_config(self, offset: int, data: bytes) -> None:
        """Write to configuration space; raise `DeviceRefused` for a field that is read-only."""

    def update_memory(self, memory: GuestMemory) -> None:
        """Called with every new snapshot of the guest's memory."""

    def set_backend_req_fd(self, channel: BackendChannel) -> None:
        """Called with the channel for our own requests to the front-end; the daemon closes it."""

    def get_shared_object(self, uuid: bytes) -> int | None:
        """A descriptor for the shared object of that UUID; the daemon does not close it."""

    def set_gpu_socket(self, channel: GpuBackendChannel) -> None:
        """Called with the GPU protocol's channel, which the back-end owns from here on."""

    def queues_per_thread(self) -> Sequence[int]:
        """One mask of queue indices for each worker thread."""

    def exit_event(self, thread_index: int) -> WakeFd | None:
        """A wake-up that the back-end may use to end that worker; None for none."""

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Work on a queue, or on a descriptor registered with `VringEpollHandler`.

        `vrings` are this worker's queues, in the order of their mask's bits. `device_event` is the
        index in `vrings` of the queue that was kicked, or the larger number with which a listener
        was registered. `event_set` holds epoll's bits. Returns True when there is more work: the
        worker then calls again soon.
        """

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """Start to save (0) or load (1) the device's state over `fd`, and take `fd` over.

        Returns a descriptor to use instead, or None.
        """

    def check_device_state(self) -> bool:
        """Whether the transfer is complete and successful."""

    def get_shmem_config(self) -> Sequence[int]:
        """Sizes in bytes of the shared memory regions, by id; 0 for an id that is not used."""


@defaults
class VhostUserBackendBase:
    """`VhostUserBackend` with defaults for all methods but `num_queues` and `handle_event`.

    It has the later hooks as well. With `status_byte` completions write a status byte.
    `error_status` is then the status of a request that the back-end has taken and will not
    complete.
    """

    status_byte: bool = False
    error_status: int = 1

    def num_queues(self) -> int:
        """The number of the device's queues."""
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
        """Do nothing: the rings of this library apply it themselves."""

    def get_config(self, offset: int, size: int) -> bytes:
        """No configuration space."""
        return b""

    def set_config(self, offset: int, data: bytes) -> None:
        """Ignore the write."""

    def update_memory(self, memory: GuestMemory) -> None:
        """Do nothing: the rings take the new snapshot themselves."""

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
        """None: only the daemon ends the worker."""
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
        """Called before the first ring starts; raise `DeviceRefused` when the device cannot run."""

    def device_stopped(self) -> None:
        """Called when the last ring has stopped: the device may now run elsewhere."""

    def abandon_device_state(self) -> None:
        """Called when the front-end has gone: state that it sent must not reach the device."""

    def device_name(self) -> str:
        """The device's name in the log: the class's name."""
        return type(self).__name__

    def describe_request(self, header: bytes) -> str:
        """Describe a request for the log, by its first 16 bytes (zero padded)."""
        return header.hex()

    def check_listener(self) -> None:
        """Raise `BackendUsageError` unless `handle_event` takes listeners' events."""

    def suspend_queue(
        self, queue: int, wake: Callable[[], None], keep: bool = True
    ) -> Callable[[], bool]:
        """Call back the requests of that queue that only wait; nothing new is taken meanwhile.

        Returns a function that tells whether the back-end has ended its other requests. The
        back-end must call `wake`, from any thread, when it has. With `keep` requests that cannot be
        given back may stay in the in-flight region. In a back-end without this hook each request is
        worked on until it completes.
        """
        raise NotImplementedError


class StateTransfer(Protocol):
    """A back-end that moves its device's state in a migration."""

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """Begin a transfer; see `VhostUserBackend`."""

    def check_device_state(self) -> bool:
        """Whether the transfer succeeded."""


class StatusByte(Protocol):
    """A back-end whose requests end in a status byte."""

    status_byte: bool
    error_status: int


STATE_TRANSFER: Final = HookGroup[StateTransfer](StateTransfer, ProtocolFeatures.DEVICE_STATE)
STATUS_BYTE: Final = HookGroup[StatusByte](StatusByte)

#: The table of all hooks of a back-end: those of device types, state transfer, status byte.
OF_A_BACKEND: Final[tuple[HookGroup[Any], ...]] = (*OF_A_TYPE, STATE_TRANSFER, STATUS_BYTE)
