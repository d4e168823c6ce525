"""A whole back-end on Xen: the daemon with a block device, over its socket, as a front-end sees it.

The front-end sends what one on Xen sends (XEN_MMAP, regions with flags and a domain, the device
files); the driver's side of the ring is in a guest's own frames.
"""

import ctypes
import os
import random
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import vhost_protocol as vp
from guest_memory import GuestAddress, GuestMemory, Region
from vhost_backend import BlockDevice, DeviceBackend, VhostUserDaemon, VirtioFeature
from vhost_xen import XenMapper
from virtqueue import DriverQueue, EngineName, RingConfig, available_engines

from .areas import Area, GuestGranter, drivers_memory, guest_granter, memory_at, regions_of
from .foreign import region as frames
from .libxen import PAGE, guest
from .maps import mapped, nothing_left
from .report import check

HEADER = struct.Struct("<IIQ")
IN, OUT = 0, 1
SECTOR = 512
DISK = 256 << 10
SIZE = 32


class Disk:
    """A driver with one ring, one request at a time."""

    def __init__(
        self, frontend: vp.Frontend, memory: GuestMemory, parts: list[int], buffer: int
    ) -> None:
        self._memory = memory
        self._buffer = buffer
        descriptor, available, used = parts
        self._queue = DriverQueue(RingConfig(SIZE, descriptor, available, used), memory)
        self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        frontend.set_vring_num(0, SIZE)
        frontend.set_vring_base(0, 0)
        frontend.set_vring_addr(0, descriptor=descriptor, used=used, available=available)
        frontend.set_vring_call(0, self._call)
        frontend.set_vring_kick(0, self._kick)
        frontend.set_vring_enable(0, True)

    def request(self, kind: int, sector: int, data: bytes, place: int) -> tuple[int, bytes]:
        """Write or read sectors, with data at `place` in the buffers: (status, data)."""
        header, status = self._buffer, self._buffer + PAGE - 1
        start = self._buffer + place
        self._memory.write(GuestAddress(header), HEADER.pack(kind, 0, sector))
        self._memory.write(GuestAddress(status), b"\xff")
        piece = [(start, len(data))]
        if kind == OUT:
            self._memory.write(GuestAddress(start), data)
        self._queue.add(
            [(header, 16), *(piece if kind == OUT else [])],
            [*(piece if kind == IN else []), (status, 1)],
        )
        if self._queue.publish():
            os.eventfd_write(self._kick, 1)
        while not self._queue.collect():
            if self._queue.enable_notification():
                continue
            ready, _, _ = select.select([self._call], [], [], 30)
            assert ready, "no completion"
            os.eventfd_read(self._call)
        return self._memory.read(GuestAddress(status), 1)[0], self._memory.read(
            GuestAddress(start), len(data)
        )

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self._kick)
        os.close(self._call)


@contextmanager
def attached(engine: EngineName, xen: bool = True) -> Iterator[vp.Frontend]:
    """A daemon with a disk, and a front-end that is connected to it."""
    image = f"/tmp/disk-{engine}"
    with open(image, "wb") as file:
        file.truncate(DISK)
    with ExitStack() as stack:
        stack.callback(os.unlink, image)
        device = BlockDevice(image)
        stack.callback(device.close)
        mapper = XenMapper() if xen else None
        daemon = VhostUserDaemon("disk", DeviceBackend.of(device), engine=engine, mapper=mapper)
        stack.callback(daemon.close)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        daemon.start_connection(theirs)
        stack.callback(daemon.shutdown)
        frontend = vp.Frontend(ours, timeout=60)
        stack.callback(frontend.close)
        offered = frontend.get_features()
        assert offered & VirtioFeature.PROTOCOL_FEATURES
        features = frontend.get_protocol_features()
        assert bool(features & vp.ProtocolFeatures.XEN_MMAP) == xen
        assert not (xen and features & vp.ProtocolFeatures.PAGEFAULT)
        wanted = vp.ProtocolFeatures.REPLY_ACK | vp.ProtocolFeatures.XEN_MMAP
        frontend.set_protocol_features(features & wanted)
        frontend.set_owner()
        frontend.set_features(int(VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES))
        yield frontend


def message(region: Region) -> vp.MemoryRegion:
    """A region as the front-end sends it."""
    return vp.MemoryRegion(*region[:4], vp.XenMapFlags(region.flags), region.domid)


def exercise(disk: Disk, pages: int, seed: int) -> None:
    """Write all over the disk, read it back."""
    rng = random.Random(seed)
    content = bytearray(DISK)
    for turn in range(24):
        length = SECTOR * rng.randint(1, 12)
        sector = rng.randrange(DISK // SECTOR - 12)
        place = PAGE + rng.randrange((pages - 1) * PAGE - length)
        at = sector * SECTOR
        if turn % 2:
            status, data = disk.request(IN, sector, bytes(length), place)
            assert data == content[at : at + length]
        else:
            content[at : at + length] = rng.randbytes(length)
            status, _ = disk.request(OUT, sector, bytes(content[at : at + length]), place)
        assert status == 0


def _ring_and_buffers(granter: GuestGranter) -> tuple[list[Area], Area]:
    areas = [granter.area(1) for _ in range(3)]
    buffers = granter.area(12)
    for area in (*areas, buffers):
        ctypes.memset(area.host, 0, area.pages * PAGE)
    return areas, buffers


@check
def without_the_mapper() -> None:
    """XEN_MMAP is not offered then."""
    with attached("python", xen=False):
        pass


@check
def grants() -> None:
    """The ring in three grants at once, buffers in grants on demand."""
    for engine in available_engines():
        with guest_granter() as granter:
            areas, buffers = _ring_and_buffers(granter)
            table = [message(region) for region in regions_of(areas, [buffers], granter.domid)]
            with nothing_left():
                fd = os.open("/dev/xen/gntdev", os.O_RDWR | os.O_CLOEXEC)
                with attached(engine) as frontend:
                    frontend.set_mem_table(table, [fd] * len(table))
                    memory = drivers_memory([*areas, buffers])
                    parts = [int(area.user_address) for area in areas]
                    disk = Disk(frontend, memory, parts, buffers.guest_address)
                    exercise(disk, buffers.pages, 3)
                    busy = guest().busy(granter.granted)
                    assert set(busy) >= {area.reference for area in areas}
                    frontend.get_vring_base(0)
                    disk.close()
                    del disk, memory
                os.close(fd)


@check
def foreign() -> None:
    """Ring and buffers in one foreign mapping."""
    first, pages = 3500, 16
    for engine in available_engines():
        with guest_granter() as granter:
            host = granter.base + first * PAGE
            ctypes.memset(host, 0, pages * PAGE)
            region = frames(first, pages * PAGE, granter.domid)
            with nothing_left():
                fd = os.open("/dev/xen/privcmd", os.O_RDWR | os.O_CLOEXEC)
                with attached(engine) as frontend:
                    frontend.set_mem_table([message(region)], [fd])
                    memory = memory_at({region: host})
                    parts = [int(region.user_address) + page * PAGE for page in range(3)]
                    disk = Disk(frontend, memory, parts, region.guest_address + 3 * PAGE)
                    exercise(disk, pages - 3, 4)
                    frontend.get_vring_base(0)
                    disk.close()
                    del disk, memory
                os.close(fd)


@check
def a_request_that_cannot_be_granted() -> None:
    """It fails; the next one does not, and the daemon goes on."""
    for engine in available_engines():
        with guest_granter() as granter:
            areas, buffers = _ring_and_buffers(granter)
            granter.revoke(buffers.reference + 5)
            table = [message(region) for region in regions_of(areas, [buffers], granter.domid)]
            with nothing_left():
                fd = os.open("/dev/xen/gntdev", os.O_RDWR | os.O_CLOEXEC)
                with attached(engine) as frontend:
                    frontend.set_mem_table(table, [fd] * len(table))
                    memory = drivers_memory([*areas, buffers])
                    parts = [int(area.user_address) for area in areas]
                    disk = Disk(frontend, memory, parts, buffers.guest_address)
                    for place, status in ((4, 0), (5, 1), (6, 0)):
                        assert disk.request(OUT, 1, bytes(SECTOR), place * PAGE)[0] == status
                    frontend.get_vring_base(0)
                    disk.close()
                    del disk, memory
                os.close(fd)
    assert not mapped("/dev/xen/gntdev")
