"""The state that the sections of the control plane share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import vhost_protocol as vp
from guest_memory import DirtyLog, GuestMemory, Iotlb, Mapper, MemoryHolder, Region

from ..backend import VhostUserBackend, VhostUserBackendBase, provided
from ..epoll_handler import VringEpollHandler
from ..errors import BackendUsageError, Refused
from ..features import VirtioFeature
from ..vring.locks import Vring
from .memory_guard import MemoryGuard
from .outcome import Outcome
from .unshared import UnsharedMemory

log: logging.Logger = logging.getLogger("vhost_backend")

#: Descriptors of the largest possible ring (virtio 2.6). The device's `queue_size` is no limit.
MAX_RING_SIZE: Final = 32768


class Section(Protocol):
    """One subject of the control plane."""

    @property
    def handlers(self) -> dict[type[vp.Message], Callable[..., Outcome]]:
        """Handler by message class; each takes the message and its descriptors."""

    def offers(self) -> vp.ProtocolFeatures:
        """The protocol features that this section implements."""

    def disconnect(self) -> None:
        """Forget the front-end that has gone. Rings are stopped already."""


class Context:
    """The device on the present connection.

    Only the connection's thread uses it. State that workers share is in the vrings, behind their
    locks.
    """

    def __init__(
        self,
        backend: VhostUserBackend,
        vrings: Sequence[Vring],
        workers: Sequence[VringEpollHandler],
        memory: MemoryHolder,
        mapper: Mapper | None,
        guard: MemoryGuard,
        wake: Callable[[], None],
        name: str,
    ) -> None:
        self.name: str = name
        self.backend = backend
        self.vrings = vrings
        self.memory = memory
        self.mapper = mapper
        self.guard = guard
        #: Wakes the connection's thread, which may wait for a `Wait` to be ready.
        self.wake = wake
        self.features: VirtioFeature = VirtioFeature(0)
        self.protocol_features: vp.ProtocolFeatures = vp.ProtocolFeatures(0)
        self.session: vp.Session | None = None
        self.channel: vp.BackendChannel | None = None
        self.iotlb: Iotlb | None = None
        self.log: DirtyLog | None = None
        self.unshared: UnsharedMemory = UnsharedMemory(name, vrings, memory)
        self._started = False
        self._places = [_place(vring, workers) for vring in vrings]

    def has(self, feature: vp.ProtocolFeatures) -> bool:
        """Whether a protocol feature is negotiated."""
        return not int(feature) & ~int(self.protocol_features)

    def vring(self, request: str, index: int) -> Vring:
        """The vring of that index. Raises `Refused`."""
        if index >= len(self.vrings):
            raise Refused(request, f"there is no vring {index}")
        return self.vrings[index]

    def device_started(self) -> None:
        """Called before a ring starts. Raises `DeviceRefused` when the device cannot run now."""
        if not self._started:
            started = provided(self.backend, VhostUserBackendBase.device_started)
            if started is not None:
                started()
            self._started = True

    def device_stopped(self) -> None:
        """Called when no ring is started any more ("Suspended device state").

        A device whose hook raises counts as stopped all the same; the error is logged.
        """
        if self._started:
            self._started = False
            stopped = provided(self.backend, VhostUserBackendBase.device_stopped)
            if stopped is not None:
                try:
                    stopped()
                except Exception:
                    log.exception("%s: the device has failed to stop", self.device_name)

    @property
    def device_name(self) -> str:
        """The device's name in the log."""
        name = provided(self.backend, VhostUserBackendBase.device_name)
        return type(self.backend).__name__ if name is None else name()

    def place(self, index: int) -> tuple[VringEpollHandler, int]:
        """The worker of a vring, and the vring's position there."""
        return self._places[index]

    def scan(self, index: int) -> None:
        """Have the worker look at a started ring without a kick."""
        with self.vrings[index].get_ref() as state:
            if not state.started:
                return
        worker, position = self._places[index]
        worker.scan(position)

    def unwatch(self, index: int) -> None:
        """Stop watching the ring's kick descriptor."""
        worker, position = self._places[index]
        worker.unwatch(position)

    def use_memory(self, memory: GuestMemory, entry: tuple[int, int] | None = None) -> None:
        """Make `memory` the current snapshot, in one swap; queues resolve their rings anew.

        The IOTLB and the dirty log are added to it here. `entry` (IOVA and size) says that only
        that part of the IOTLB has changed. A ring that waits for another entry then goes on
        waiting: if it asked again at each change, every answer would cause more questions.
        """
        if entry is None and log.isEnabledFor(logging.DEBUG):
            for region in memory.regions:
                log.debug("%s: memory %s", self.name, _describe(region))
        memory = memory.with_iotlb(self.iotlb).with_log(self.log)
        self.guard.watch(memory)
        self.memory.replace(memory)
        for index, vring in enumerate(self.vrings):
            with vring.get_mut() as state:
                need = state.need
                state.set_memory(memory)
                if entry is None:
                    look = True
                else:
                    start, size = entry
                    look = need is not None and start <= need.address < start + size
                    if not look:
                        state.need = need
            if look:
                self.scan(index)
        self.backend.update_memory(memory)


def _describe(region: Region) -> str:
    return (
        f"{region.guest_address:#x} to {region.guest_address + region.size:#x} "
        f"({region.size / 2**20:g} MiB), for the front-end at {region.user_address:#x}"
    )


def _place(vring: Vring, workers: Sequence[VringEpollHandler]) -> tuple[VringEpollHandler, int]:
    for worker in workers:
        if vring in worker.vrings:
            return worker, worker.vrings.index(vring)
    raise BackendUsageError("a queue belongs to no worker")
