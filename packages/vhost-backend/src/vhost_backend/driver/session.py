"""One driver's session with a back-end: memory, negotiation, rings."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
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

from ..features import VirtioFeature
from .channel import ChannelServer
from .options import DEFAULT, SessionOptions
from .vring import GUEST_BASE, USER_BASE, DriverVring, SessionError

IOVA_BASE = 0x20_0000_0000

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

#: Seconds that `DriverSession.close` waits for the back-end to close its end.
GOODBYE = 1.0

_PAGE = 4096
# Descriptors in an indirect table.
_TABLE_LENGTH = 16


class DriverSession:
    """A driver attached to a back-end.

    Args:
        frontend: the connection; the session takes it over.
        options: how it negotiates, and what it sets up.
        changes: single options by name, such as `packed=True`, which go before those of `options`.
    """

    def __init__(
        self,
        frontend: vp.Frontend,
        options: SessionOptions = DEFAULT,
        **changes: Any,
    ) -> None:
        options = options.but(**changes)
        self.options: SessionOptions = options
        self.frontend: vp.Frontend = frontend
        self.channel: ChannelServer | None = None
        #: IOVAs that the back-end has asked for.
        self.missed: list[int] = []
        #: By the IOVA of a page: the access to grant when it is asked for, if not all.
        self.granted: dict[int, vp.IotlbAccess] = {}
        self._wanted = _USUAL_FEATURES | options.protocol_features
        self._handlers = dict(options.handlers or {})
        self._iova = IOVA_BASE - GUEST_BASE if options.iommu else 0
        self.vrings: list[DriverVring] = []
        #: (guest address, bytes) of what rings take up, indirect tables included.
        self.ring_memory: list[tuple[int, int]] = []
        self.protocol_features: vp.ProtocolFeatures = vp.ProtocolFeatures(0)
        self._memory_fd = (
            allocate_memfd(options.memory_size) if options.memory_fd is None else options.memory_fd
        )
        gpa = bool(options.protocol_features & vp.ProtocolFeatures.GPA_ADDRESSES)
        self._user_base = GUEST_BASE if gpa else USER_BASE
        region = Region(GuestAddress(GUEST_BASE), options.memory_size, UserAddress(self._user_base))
        self.memory: GuestMemory = GuestMemory.map([(region, self._memory_fd)])
        self._next = GUEST_BASE
        self._end = GUEST_BASE + options.memory_size
        wanted = VirtioFeature(options.features) | VirtioFeature.VERSION_1
        wanted |= VirtioFeature.PROTOCOL_FEATURES
        if options.packed:
            wanted |= VirtioFeature.RING_PACKED
        if options.event_idx:
            wanted |= VirtioFeature.EVENT_IDX
        if options.indirect:
            wanted |= VirtioFeature.INDIRECT_DESC
        if options.iommu:
            wanted |= VirtioFeature.ACCESS_PLATFORM
            self._wanted |= vp.ProtocolFeatures.BACKEND_REQ
            self._handlers[vp.BackendIotlbMsg] = self._answer_miss
        if self._handlers:
            self._wanted |= vp.ProtocolFeatures.BACKEND_REQ
        if options.inflight:
            self._wanted |= vp.ProtocolFeatures.INFLIGHT_SHMFD
        self._inflight: tuple[vp.InflightReply, int] | None = None
        self._wanted_features = wanted
        try:
            self._negotiate(wanted, options.packed)
            if self._handlers:
                self.channel = ChannelServer(frontend, self._handlers)
                self.channel.start()
            self.share_memory()
            if options.inflight:
                self._keep_inflight(options.num_queues, options.queue_size)
            for index in range(options.num_queues):
                self._set_up_ring(index, options.queue_size)
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
            self.channel.start()
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
