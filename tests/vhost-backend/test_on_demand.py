"""Memory that is mapped while a request uses it: a stand-in for Xen grants."""

import asyncio
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from guest_memory import GuestMemoryError, MappingFailed, Region, SharedMapping
from vhost_backend import (
    BlockDevice,
    DeviceBackend,
    QueueInfo,
    Request,
    VhostUserDaemon,
    VirtioDevice,
)
from vhost_backend.devices import blk
from vhost_backend.driver import BlockDriver, BlockError, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from virtqueue import EngineName

pytestmark = pytest.mark.usefixtures("every_flavour")

PAGE = 4096


class PinnedMapping:
    """A region without a host address of its own; counts what is pinned."""

    host_address = None
    page_size = PAGE
    poisoned = False

    def __init__(self, mapper: "PinningMapper", region: Region, fd: int) -> None:
        self._mapper = mapper
        self._region = region
        self._fd = os.dup(fd)
        self.size = region.size

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        for bad in self._mapper.bad:
            if address <= bad < address + length:
                raise MappingFailed(22, "pin")
        offset = address - self._region.guest_address
        mapping = SharedMapping(self._fd, length, offset)
        with self._mapper.lock:
            self._mapper.pinned += 1
            self._mapper.pins += 1
        return mapping.address, mapping

    def unpin(self, token: SharedMapping) -> None:
        with self._mapper.lock:
            self._mapper.pinned -= 1
        token.close()

    def close(self) -> None:
        os.close(self._fd)


class PinningMapper:
    """Maps nothing before it is needed."""

    def __init__(self) -> None:
        self.bad: set[int] = set()
        self.pinned = 0
        self.pins = 0
        self.lock = threading.Lock()

    def map(self, region: Region, fd: int | None) -> PinnedMapping:
        if fd is None:
            raise GuestMemoryError("no file")
        return PinnedMapping(self, region, fd)


def attach(
    device: VirtioDevice, mapper: PinningMapper, engine: EngineName, **options: Any
) -> tuple[VhostUserDaemon, DriverSession]:
    ours, theirs = socket.socketpair()
    daemon = VhostUserDaemon("test", DeviceBackend.of(device), mapper=mapper, engine=engine)
    daemon.start_connection(ours)
    return daemon, DriverSession(vp.Frontend(theirs, timeout=60), **options)


@pytest.mark.parametrize("packed", [False, True])
def test_requests_are_mapped_for_as_long_as_they_run(
    image: Path, engine: EngineName, packed: bool
) -> None:
    mapper = PinningMapper()
    daemon, session = attach(
        BlockDevice(image), mapper, engine, features=DRIVER_FEATURES, packed=packed
    )
    with daemon, session:
        driver = BlockDriver(session, depth=8, max_io=8192)
        for number in range(20):
            data = bytes([number + 1]) * 8192
            driver.write(number * 8192, data)
            assert driver.read(number * 8192, 8192) == data
        driver.flush()
        assert mapper.pins > 60
        # What is left is the ring and, at most, the last request.
        assert mapper.pinned <= 8
    assert mapper.pinned == 0


def test_a_request_that_cannot_be_mapped_fails_alone(image: Path, engine: EngineName) -> None:
    mapper = PinningMapper()
    daemon, session = attach(BlockDevice(image), mapper, engine, features=DRIVER_FEATURES)
    with daemon, session:
        driver = BlockDriver(session, depth=2, max_io=PAGE)
        driver.write(0, b"a" * PAGE)
        slot = driver._free[-1]
        mapper.bad = {slot.data}
        driver.submit(blk.T_OUT, 8, b"b" * PAGE, tag="bad")
        driver.submit(blk.T_IN, 0, length=PAGE, tag="good")
        driver.kick()
        done: dict[object, tuple[int, bytes]] = {}
        while len(done) < 2:
            for completion, data in driver.collect():
                done[completion.tag] = (completion.status, data)
        assert done["good"] == (blk.S_OK, b"a" * PAGE)
        assert done["bad"][0] == blk.S_IOERR
        mapper.bad = set()
        assert driver.read(8 * 512, PAGE) == bytes(PAGE)  # nothing was written
    assert mapper.pinned == 0


def test_asynchronous_requests_keep_their_pages(engine: EngineName) -> None:
    class Slow(VirtioDevice):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            await asyncio.sleep(0.05)
            request.write(request.read(4)[::-1])

    mapper = PinningMapper()
    daemon, session = attach(Slow(), mapper, engine)
    with daemon, session:
        vring = session.vrings[0]
        places = [(session.allocate(4, PAGE), session.allocate(4, PAGE)) for _ in range(8)]
        for index, (source, target) in enumerate(places):
            session.memory.write(source, b"abc%d" % index)
            vring.submit([(source, 4)], [(target, 4)])
        vring.kick()
        left = 8
        while left:
            left -= len(vring.completions())
        for index, (_, target) in enumerate(places):
            assert session.memory.read(target, 4) == b"%dcba" % index
    assert mapper.pinned == 0


def test_bad_read_of_status_page_is_an_error_for_one(image: Path) -> None:
    """The status byte lies in a page that cannot be mapped: the guest gets no status, no harm."""
    mapper = PinningMapper()
    daemon, session = attach(BlockDevice(image), mapper, "python", features=DRIVER_FEATURES)
    with daemon, session:
        status = session.allocate(1, PAGE)
        session.allocate(1, PAGE)
        driver = BlockDriver(session, depth=1, max_io=PAGE)
        mapper.bad = {status}
        header = session.allocate(16)
        session.memory.write(header, (4).to_bytes(16, "little"))
        vring = session.vrings[0]
        vring.submit([(header, 16)], [(status, 1)])
        vring.kick()
        vring.completions()
        assert driver.read(0, 512) == bytes(512)
        with pytest.raises(BlockError):
            driver.read(1 << 40, 512)
