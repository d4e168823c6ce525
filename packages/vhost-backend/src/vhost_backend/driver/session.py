"""One driver's session with a back-end: memory, negotiation, rings."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Any

import vhost_protocol as vp
from guest_memory import GuestAddress, GuestMemory, UserAddress
from virtqueue import DriverQueue, RingConfig, ring_layout

from .. import eventfd
from ..errors import VhostBackendError
from ..features import VirtioFeature

#: Where our memory starts in the guest's and in the front-end's address space. They differ, and
#: neither is 0, so that an address of the wrong kind is noticed.
GUEST_BASE = 0x1_0000_0000
USER_BASE = 0x7F00_0000_0000

_PAGE = 4096
# Descriptors in an indirect table.
_TABLE_LENGTH = 16


class SessionError(VhostBackendError):
    """The back-end did not do what a back-end has to do (no answer in time, a feature missing)."""


class DriverVring:
    """The driver's side of one vring: its ring, and the descriptors to kick and be called on."""

    def __init__(self, index: int, queue: DriverQueue, config: RingConfig) -> None:
        self.index = index
        self.queue = queue
        self.config = config
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self.call_fd, select.POLLIN)

    def submit(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        *,
        indirect: bool = False,
    ) -> int:
        """Add a chain of (guest address, length) pieces; returns its id. Not visible until `kick`.

        Raises `virtqueue.VirtqueueError` when the ring is full.
        """
        return self.queue.add(readable=readable, writable=writable, indirect=indirect)

    def kick(self) -> None:
        """Make what was submitted visible, and signal the device unless it said not to."""
        if self.queue.publish():
            eventfd.signal(self.kick_fd)

    def completions(self, timeout: float = 10.0) -> list[tuple[int, int]]:
        """Wait for at least one completion; (id, bytes written) for each there is.

        Raises `SessionError` after `timeout` seconds without one.
        """
        while True:
            done = self.queue.collect()
            if done:
                return done
            if self.queue.enable_notification():
                continue
            if not self._poller.poll(timeout * 1000):
                done = self.queue.collect()
                if done:
                    raise SessionError(
                        f"vring {self.index}: completions came without the signal asked for"
                    )
                raise SessionError(f"vring {self.index}: nothing completed in {timeout:g} s")
            eventfd.drain(self.call_fd)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.kick_fd)
        os.close(self.call_fd)


class DriverSession:
    """A driver attached to a back-end.

    Args:
        frontend: the connection; the session takes it over.
        features: virtio feature bits to accept when offered; VERSION_1 is always accepted.
        num_queues: rings to set up.
        queue_size: descriptors in each.
        memory_size: bytes of memory to share with the back-end.
        packed: use packed rings (the back-end has to offer RING_PACKED).
        event_idx: accept EVENT_IDX when offered.
        indirect: accept INDIRECT_DESC when offered.
        regions: how many regions the memory is cut into.
    """

    def __init__(
        self,
        frontend: vp.Frontend,
        *,
        features: int = 0,
        num_queues: int = 1,
        queue_size: int = 128,
        memory_size: int = 16 << 20,
        packed: bool = False,
        event_idx: bool = True,
        indirect: bool = True,
    ) -> None:
        self.frontend = frontend
        self.vrings: list[DriverVring] = []
        self.protocol_features = vp.ProtocolFeatures(0)
        self.memory, self._memory_fd = GuestMemory.allocate(
            memory_size,
            guest_address=GuestAddress(GUEST_BASE),
            user_address=UserAddress(USER_BASE),
        )
        self._next = GUEST_BASE
        self._end = GUEST_BASE + memory_size
        wanted = VirtioFeature(features) | VirtioFeature.VERSION_1
        wanted |= VirtioFeature.PROTOCOL_FEATURES
        if packed:
            wanted |= VirtioFeature.RING_PACKED
        if event_idx:
            wanted |= VirtioFeature.EVENT_IDX
        if indirect:
            wanted |= VirtioFeature.INDIRECT_DESC
        try:
            self._negotiate(wanted, packed)
            self._share_memory()
            for index in range(num_queues):
                self._set_up_ring(index, queue_size)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls, path: str | os.PathLike[str], timeout: float = 10.0, **options: Any
    ) -> DriverSession:
        """Connect to the back-end that listens on `path`; `options` as for the class."""
        return cls(vp.Frontend.connect(os.fspath(path), timeout=timeout), **options)

    # -- set-up ---------------------------------------------------------------------------------

    def _negotiate(self, wanted: VirtioFeature, packed: bool) -> None:
        frontend = self.frontend
        offered = VirtioFeature(frontend.get_features())
        if packed and not offered & VirtioFeature.RING_PACKED:
            raise SessionError("the back-end does not offer packed rings")
        self.features = offered & wanted
        if offered & VirtioFeature.PROTOCOL_FEATURES:
            supported = (
                vp.ProtocolFeatures.MQ
                | vp.ProtocolFeatures.REPLY_ACK
                | vp.ProtocolFeatures.CONFIG
                | vp.ProtocolFeatures.RESET_DEVICE
            )
            self.protocol_features = vp.ProtocolFeatures(
                frontend.get_protocol_features() & supported
            )
            frontend.set_protocol_features(self.protocol_features)
        frontend.set_owner()
        frontend.set_features(int(self.features))

    def _share_memory(self) -> None:
        table = [
            vp.MemoryRegion(
                guest_address=region.guest_address,
                size=region.size,
                user_address=region.user_address,
                mmap_offset=region.mmap_offset,
            )
            for region in self.memory.regions
        ]
        self.frontend.set_mem_table(table, [self._memory_fd] * len(table))

    def _set_up_ring(self, index: int, size: int) -> None:
        packed = bool(self.features & VirtioFeature.RING_PACKED)
        descriptor, driver, device, total = ring_layout(size, packed)
        base = self.allocate(total, align=_PAGE) - GUEST_BASE + USER_BASE
        config = RingConfig(
            size=size,
            descriptor_address=base + descriptor,
            driver_address=base + driver,
            device_address=base + device,
            packed=packed,
            event_idx=bool(self.features & VirtioFeature.EVENT_IDX),
            indirect=bool(self.features & VirtioFeature.INDIRECT_DESC),
        )
        tables = self.allocate(size * _TABLE_LENGTH * 16) if config.indirect else None
        queue = DriverQueue(config, self.memory, tables=tables, table_length=_TABLE_LENGTH)
        vring = DriverVring(index, queue, config)
        self.vrings.append(vring)
        self.start_ring(index)

    def start_ring(self, index: int, base: int | None = None) -> None:
        """Send a ring's configuration and start it, at `base` (default: its beginning)."""
        frontend, vring = self.frontend, self.vrings[index]
        config = vring.config
        if base is None:
            # Both wrap counters of a packed ring begin at 1.
            base = 0x8000_8000 if config.packed else 0
        frontend.set_vring_num(index, config.size)
        frontend.set_vring_base(index, base)
        frontend.set_vring_addr(
            index,
            descriptor=config.descriptor_address,
            used=config.device_address,
            available=config.driver_address,
        )
        frontend.set_vring_call(index, vring.call_fd)
        frontend.set_vring_kick(index, vring.kick_fd)
        if self.features & VirtioFeature.PROTOCOL_FEATURES:
            frontend.set_vring_enable(index, True)

    # -- use ------------------------------------------------------------------------------------

    def allocate(self, size: int, align: int = 16) -> GuestAddress:
        """Set `size` bytes of shared memory aside; never given back before the session ends."""
        address = -(-self._next // align) * align
        if address + size > self._end:
            raise SessionError(f"no {size} bytes of shared memory are left")
        self._next = address + size
        return GuestAddress(address)

    def stop_ring(self, index: int) -> int:
        """Stop a ring; returns where it stands."""
        return self.frontend.get_vring_base(index)

    def close(self) -> None:
        """Hang up and release the memory."""
        self.frontend.close()
        for vring in self.vrings:
            vring.close()
        self.vrings = []
        fd, self._memory_fd = self._memory_fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> DriverSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
