"""One driver's session with a back-end: memory, negotiation, rings."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

import vhost_protocol as vp
from guest_memory import (
    GuestAddress,
    GuestMemory,
    Iotlb,
    Iova,
    Region,
    UserAddress,
    allocate_memfd,
)
from virtqueue import DriverQueue, RingConfig, ring_layout

from ..errors import VhostBackendError
from ..fds import eventfd
from ..features import VirtioFeature
from .channel import ChannelServer

#: Where our memory starts in the guest's and in the front-end's address space. They differ, and
#: neither is 0, so that an address of the wrong kind is noticed.
GUEST_BASE = 0x1_0000_0000
USER_BASE = 0x7F00_0000_0000
IOVA_BASE = 0x20_0000_0000

_NO_FEATURES = vp.ProtocolFeatures(0)
_USUAL_FEATURES = (
    vp.ProtocolFeatures.MQ
    | vp.ProtocolFeatures.REPLY_ACK
    | vp.ProtocolFeatures.CONFIG
    | vp.ProtocolFeatures.RESET_DEVICE
    | vp.ProtocolFeatures.LOG_SHMFD
    | vp.ProtocolFeatures.DEVICE_STATE
)

_MAP_FIXED = 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]

#: Seconds that a device may take from a completion to its signal.
_SIGNAL_DELAY = 1.0

#: Seconds that `DriverSession.close` waits for the back-end to close its end.
GOODBYE = 1.0

_PAGE = 4096
# Descriptors in an indirect table.
_TABLE_LENGTH = 16


class SessionError(VhostBackendError):
    """The back-end did not do what a back-end has to do (no answer in time, a feature missing)."""


class DriverVring:
    """The driver's side of one vring: its ring, and the descriptors to kick and be called on."""

    def __init__(
        self,
        index: int,
        queue: DriverQueue,
        config: RingConfig,
        offset: int = 0,
        ring_offset: int = USER_BASE - GUEST_BASE,
    ) -> None:
        self.index = index
        #: What the device calls guest address 0: IOVAs differ from guest addresses by this.
        self._offset = offset
        #: The same of the ring's own addresses, which may be user addresses.
        self._ring_offset = ring_offset
        self.queue = queue
        self.config = config
        self.kick_fd: int = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd: int = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self.call_fd, select.POLLIN)
        self._connection = -1

    def watch(self, connection: int) -> None:
        """End the wait for completions when the back-end hangs up this socket (-1: none)."""
        if self._connection >= 0:
            self._poller.unregister(self._connection)
        self._connection = connection
        if connection >= 0:
            self._poller.register(connection, select.POLLRDHUP)

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
        offset = self._offset
        return self.queue.add(
            readable=[(address + offset, length) for address, length in readable],
            writable=[(address + offset, length) for address, length in writable],
            indirect=indirect,
        )

    def kick(self) -> None:
        """Make what was submitted visible, and signal the device unless it said not to."""
        if self.queue.publish():
            eventfd.signal(self.kick_fd)

    def completions(self, timeout: float = 10.0) -> list[tuple[int, int]]:
        """Wait for at least one completion; (id, bytes written) for each there is.

        With a `timeout` of 0 the ring is only looked at. Raises `SessionError` after `timeout`
        seconds without a completion, when the back-end has hung up, and when there is a completion
        that no signal follows.
        """
        while True:
            done = self.queue.collect()
            if done:
                return done
            if self.queue.enable_notification():
                continue
            ready = dict(self._poller.poll(timeout * 1000))
            if self.call_fd not in ready:
                done = self.queue.collect()
                if not done and ready:
                    raise SessionError(f"vring {self.index}: the back-end has hung up")
                if not done:
                    raise SessionError(f"vring {self.index}: nothing completed in {timeout:g} s")
                if timeout and not self._poller.poll(_SIGNAL_DELAY * 1000):
                    raise SessionError(
                        f"vring {self.index}: completions came without the signal asked for"
                    )
                return done
            eventfd.drain(self.call_fd)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.kick_fd)
        os.close(self.call_fd)

    # -- where the ring is, for drivers that break its rules ------------------------------------

    @property
    def descriptor_area(self) -> int:
        """Guest address of the descriptor table; of the descriptor ring when packed."""
        return self._place(self.config.descriptor_address)

    @property
    def driver_area(self) -> int:
        """Guest address of the available ring; of the driver's event structure when packed."""
        return self._place(self.config.driver_address)

    @property
    def device_area(self) -> int:
        """Guest address of the used ring; of the device's event structure when packed."""
        return self._place(self.config.device_address)

    def _place(self, address: int) -> int:
        return address - self._ring_offset


class DriverSession:
    """A driver attached to a back-end.

    Args:
        frontend: the connection; the session takes it over.
        features: virtio feature bits to accept when offered; VERSION_1 is always accepted.
        num_queues: rings to set up.
        queue_size: descriptors in each.
        memory_size: bytes of memory to share with the back-end.
        memory_fd: a file of that size to share, which the session takes over; a new sealed memfd
            by default.
        packed: use packed rings (the back-end has to offer RING_PACKED).
        event_idx: accept EVENT_IDX when offered.
        indirect: accept INDIRECT_DESC when offered.
        iommu: use IOVAs (the back-end has to offer ACCESS_PLATFORM). Entries of the IOTLB are given
            page by page as the back-end asks for them; `invalidate` takes them away.
        protocol_features: protocol features to accept besides the usual ones; with GPA_ADDRESSES
            the back-end is told no user addresses (and has to offer it).
        handlers: what to do with the back-end's own requests, by message class; each returns
            whether it succeeded. A channel is made when there are handlers, or an IOMMU.
        inflight: have the back-end record its requests in flight in memory that the session keeps
            (INFLIGHT_SHMFD), so that `reconnect` can hand them to the back-end's successor.
    """

    def __init__(
        self,
        frontend: vp.Frontend,
        *,
        features: int = 0,
        num_queues: int = 1,
        queue_size: int = 128,
        memory_size: int = 16 << 20,
        memory_fd: int | None = None,
        packed: bool = False,
        event_idx: bool = True,
        indirect: bool = True,
        iommu: bool = False,
        protocol_features: vp.ProtocolFeatures = _NO_FEATURES,
        handlers: dict[type[vp.Message], Callable[[vp.Message], bool]] | None = None,
        inflight: bool = False,
    ) -> None:
        self.frontend: vp.Frontend = frontend
        self.channel: ChannelServer | None = None
        #: IOVAs that the back-end has asked for.
        self.missed: list[int] = []
        #: By the IOVA of a page: the access to grant when it is asked for, if not all.
        self.granted: dict[int, vp.IotlbAccess] = {}
        self._wanted = _USUAL_FEATURES | protocol_features
        self._handlers = dict(handlers or {})
        self._iova = IOVA_BASE - GUEST_BASE if iommu else 0
        self.vrings: list[DriverVring] = []
        #: (guest address, bytes) of what rings take up, indirect tables included.
        self.ring_memory: list[tuple[int, int]] = []
        self.protocol_features: vp.ProtocolFeatures = vp.ProtocolFeatures(0)
        self._memory_fd = allocate_memfd(memory_size) if memory_fd is None else memory_fd
        gpa = bool(protocol_features & vp.ProtocolFeatures.GPA_ADDRESSES)
        self._user_base = GUEST_BASE if gpa else USER_BASE
        region = Region(GuestAddress(GUEST_BASE), memory_size, UserAddress(self._user_base))
        self.memory: GuestMemory = GuestMemory.map([(region, self._memory_fd)])
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
        if iommu:
            wanted |= VirtioFeature.ACCESS_PLATFORM
            self._wanted |= vp.ProtocolFeatures.BACKEND_REQ
            self._handlers[vp.BackendIotlbMsg] = self._answer_miss
        if self._handlers:
            self._wanted |= vp.ProtocolFeatures.BACKEND_REQ
        if inflight:
            self._wanted |= vp.ProtocolFeatures.INFLIGHT_SHMFD
        self._inflight: tuple[vp.InflightReply, int] | None = None
        self._wanted_features = wanted
        try:
            self._negotiate(wanted, packed)
            if self._handlers:
                self.channel = ChannelServer(frontend, self._handlers)
            self.share_memory()
            if inflight:
                self._keep_inflight(num_queues, queue_size)
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
        # For `Migration`, which switches it on: LOG_ALL is the front-end's, not the guest's.
        self.can_log: bool = bool(offered & VirtioFeature.LOG_ALL)
        if packed and not offered & VirtioFeature.RING_PACKED:
            raise SessionError("the back-end does not offer packed rings")
        if self._iova and not offered & VirtioFeature.ACCESS_PLATFORM:
            raise SessionError("the back-end does not offer addresses behind an IOMMU")
        self.features: VirtioFeature = offered & wanted
        if offered & VirtioFeature.PROTOCOL_FEATURES:
            self.protocol_features = vp.ProtocolFeatures(
                frontend.get_protocol_features() & self._wanted
            )
            frontend.set_protocol_features(self.protocol_features)
        if self._user_base != USER_BASE and not (
            self.protocol_features & vp.ProtocolFeatures.GPA_ADDRESSES
        ):
            raise SessionError("the back-end does not offer to do without user addresses")
        frontend.set_owner()
        frontend.set_features(int(self.features))

    def share_memory(self) -> None:
        """Send the memory table, as it was sent at the start."""
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

    def _keep_inflight(self, num_queues: int, queue_size: int) -> None:
        if not self.protocol_features & vp.ProtocolFeatures.INFLIGHT_SHMFD:
            raise SessionError("the back-end does not offer to record requests in flight")
        reply, fd = self.frontend.get_inflight_fd(num_queues, queue_size)
        if fd is None:
            raise SessionError("the back-end gave no memory for requests in flight")
        self._inflight = reply, fd.detach()
        self._hand_over_inflight()

    def _hand_over_inflight(self) -> None:
        if self._inflight is not None:
            reply, fd = self._inflight
            self.frontend.set_inflight_fd(
                reply.mmap_size, reply.mmap_offset, reply.num_queues, reply.queue_size, fd
            )

    def _set_up_ring(self, index: int, size: int) -> None:
        packed = bool(self.features & VirtioFeature.RING_PACKED)
        descriptor, driver, device, total = ring_layout(size, packed)
        place = self.allocate(total, align=_PAGE)
        self.ring_memory.append((place, total))
        distance = self._iova or self._user_base - GUEST_BASE
        base = place + distance
        config = RingConfig(
            size=size,
            descriptor_address=base + descriptor,
            driver_address=base + driver,
            device_address=base + device,
            packed=packed,
            event_idx=bool(self.features & VirtioFeature.EVENT_IDX),
            indirect=bool(self.features & VirtioFeature.INDIRECT_DESC),
            in_order=bool(self.features & VirtioFeature.IN_ORDER),
            iommu=bool(self._iova),
        )
        tables = None
        if config.indirect:
            room = size * _TABLE_LENGTH * 16
            tables = self.allocate(room) + self._iova
            self.ring_memory.append((tables - self._iova, room))
        memory = self.memory
        if self._iova:
            everything = Iotlb()
            user = UserAddress(self._user_base)
            everything.insert(Iova(IOVA_BASE), self._end - GUEST_BASE, user, 3)
            memory = memory.with_iotlb(everything)
        queue = DriverQueue(config, memory, tables=tables, table_length=_TABLE_LENGTH)
        vring = DriverVring(index, queue, config, self._iova, distance)
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
        vring.watch(frontend.fileno())
        frontend.set_vring_kick(index, vring.kick_fd)
        if self.features & VirtioFeature.PROTOCOL_FEATURES:
            frontend.set_vring_enable(index, True)

    # -- another back-end -----------------------------------------------------------------------

    def reconnect(self, frontend: vp.Frontend) -> None:
        """Go on with another back-end over `frontend`, after the present one has died.

        Memory, rings and requests stay as they are. With `inflight` the new back-end is given the
        record of the requests that the old one had taken, and finishes them; without, a split ring
        goes on behind the last used entry and what was in flight is served once more. What the old
        one completed without coming round to signal it is the new one's to signal.

        Raises `SessionError` when the new back-end offers less than was negotiated, or for packed
        rings without `inflight`, whose position only the old back-end knew.
        """
        packed = bool(self.features & VirtioFeature.RING_PACKED)
        if packed and self._inflight is None:
            raise SessionError("where a packed ring stood is lost with the back-end")
        self._attach(frontend)
        self._hand_over_inflight()
        for vring in self.vrings:
            base = None
            if not packed:
                raw = self.memory.read(GuestAddress(vring.device_area + 2), 2)
                base = int.from_bytes(raw, "little")
            self.start_ring(vring.index, base)

    def move(self, frontend: vp.Frontend, memory_fd: int) -> None:
        """Go on with another back-end and with the copy of the memory that `memory_fd` holds.

        The session takes `memory_fd` over. Rings have to be stopped, and are started by the caller.
        What refers to the memory stays valid: the copy is mapped where the original was.
        """
        place = self.memory.host_addresses[0]
        size = self.memory.regions[0].size
        if place is None or os.fstat(memory_fd).st_size < size:
            raise SessionError(f"the copy of the memory has fewer than {size} bytes")
        try:
            # A refused MAP_FIXED may leave a hole in the memory's place: the kernel is asked first.
            mmap.mmap(memory_fd, size).close()
        except (OSError, ValueError) as error:
            raise SessionError(f"the copy cannot be mapped: {error}") from None
        mapped = _libc.mmap(
            place,
            size,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | _MAP_FIXED,
            memory_fd,
            0,
        )
        if mapped != place:
            raise SessionError(f"the copy cannot be mapped: {os.strerror(ctypes.get_errno())}")
        os.close(self._memory_fd)
        self._memory_fd = memory_fd
        self._attach(frontend)
        self._hand_over_inflight()

    def _attach(self, frontend: vp.Frontend) -> None:
        """Hang up, and negotiate the same over a new connection."""
        self._hang_up()
        features, protocol_features = self.features, self.protocol_features
        self.frontend = frontend
        self._negotiate(self._wanted_features, bool(features & VirtioFeature.RING_PACKED))
        if (self.features, self.protocol_features) != (features, protocol_features):
            raise SessionError("the new back-end does not offer what was negotiated with the old")
        if self._handlers:
            self.channel = ChannelServer(frontend, self._handlers)
        self.share_memory()

    def _hang_up(self) -> None:
        for vring in self.vrings:
            vring.watch(-1)
        self.frontend.close()
        if self.channel is not None:
            self.channel.join()
            self.channel = None

    def _say_goodbye(self) -> None:
        """Let the back-end see the end, and wait for it to close its side, too."""
        fd = self.frontend.fileno()
        if fd < 0:
            return
        with socket.socket(fileno=os.dup(fd)) as connection:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            poller = select.poll()
            poller.register(connection, 0)  # only that the other end is closed
            poller.poll(GOODBYE * 1000)

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

    def _answer_miss(self, message: vp.Message) -> bool:
        assert isinstance(message, vp.BackendIotlbMsg)
        if message.type is not vp.IotlbType.MISS:
            return False
        self.missed.append(message.iova)
        page = message.iova // _PAGE * _PAGE
        if not IOVA_BASE <= page < IOVA_BASE + self._end - GUEST_BASE:
            return False
        access = self.granted.get(page, vp.IotlbAccess.READ_WRITE)
        self.frontend.iotlb_update(page, _PAGE, page - IOVA_BASE + self._user_base, access)
        return True

    def invalidate(self, address: int, length: int) -> None:
        """Take IOTLB entries of guest addresses away; returns when no request rests on them."""
        self.frontend.iotlb_invalidate(address + self._iova, length)

    def close(self) -> None:
        """Hang up and release the memory.

        Returns once the back-end has let go of the connection, or after `GOODBYE` seconds.
        """
        self._say_goodbye()
        self._hang_up()
        for vring in self.vrings:
            vring.close()
        self.vrings = []
        if self._inflight is not None:
            os.close(self._inflight[1])
            self._inflight = None
        fd, self._memory_fd = self._memory_fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> DriverSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
