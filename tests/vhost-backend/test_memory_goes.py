"""A guest's memory is unmapped when its front-end has gone and its last request has ended.

Whatever the way in which the connection ends, and without a collection: what is mapped until the
garbage collector comes is mapped for as long as an idle daemon allocates nothing.
"""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from guest_memory import (
    GuestMemoryError,
    Mapper,
    MappingFailed,
    Region,
    SharedMapping,
    allocate_memfd,
)
from vhost_backend import (
    AsyncDaemon,
    BlockDevice,
    DeviceBackend,
    QueueInfo,
    Refused,
    Request,
    VhostUserDaemon,
    VirtioDevice,
    VringMutex,
    VringRwLock,
)
from vhost_backend.driver import DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.driver.vring import GUEST_BASE, USER_BASE, DriverVring
from virtqueue import Batch, EngineName, SigbusGuard

SIZE = 4 << 20
DEADLINE = 60.0


class Work(VirtioDevice):
    """Answers, raises, or waits until it may go on; and keeps the memory that it was told of."""

    version = 1

    def __init__(self) -> None:
        self.fails = False
        self.holds = False
        self.taken = threading.Event()
        self.go_on = threading.Event()
        self.memory: Any = None

    def update_memory(self, memory: Any) -> None:
        self.memory = memory

    def save_state(self) -> bytes:
        return bytes(1 << 20)

    def load_state(self, version: int, payload: bytes) -> None:
        pass


class Plain(Work):
    def handle(self, queue: QueueInfo, request: Request) -> None:
        if self.fails:
            raise ValueError("asked for")
        if self.holds:
            self.taken.set()
            self.go_on.wait(DEADLINE)
        request.write(request.read())


class Batched(Work):
    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        for chain in batch:
            if self.fails:
                raise ValueError("asked for")
            if self.holds:
                self.taken.set()
                self.go_on.wait(DEADLINE)
            chain.write(chain.read())


class Async(Work):
    async def handle(self, queue: QueueInfo, request: Request) -> None:
        if self.fails:
            raise ValueError("asked for")
        if self.holds:
            self.taken.set()
            while not self.go_on.is_set():
                await asyncio.sleep(0.005)
        request.write(request.read())


def mappings(fd: int) -> int:
    """How many mappings of that file this process has."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        count += fields[3] == device and int(fields[4]) == status.st_ino
    return count


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Threaded:
    def __init__(self, vring: Any) -> None:
        self.vring = vring

    def __call__(
        self, device: VirtioDevice, sock: socket.socket, **options: Any
    ) -> Callable[[], None]:
        daemon = VhostUserDaemon("test", DeviceBackend.of(device), vring=self.vring, **options)
        daemon.start_connection(sock)
        return daemon.close


def in_loop(device: VirtioDevice, sock: socket.socket, **options: Any) -> Callable[[], None]:
    """Run the daemon in a loop on a thread; it outlives its connection until it is closed."""
    started = threading.Event()
    parts: list[Any] = []

    async def main() -> None:
        end = asyncio.Event()
        parts.extend((asyncio.get_running_loop(), end))
        daemon = AsyncDaemon("test", DeviceBackend.of(device), **options)
        started.set()
        serving = asyncio.create_task(daemon.serve_connection(sock))
        del sock_of[:]
        await end.wait()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, vp.RemoteProtocolError, Refused):
            await serving
        daemon.close()

    sock_of = [sock]
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(DEADLINE)

    def close() -> None:
        with contextlib.suppress(RuntimeError):
            parts[0].call_soon_threadsafe(parts[1].set)
        thread.join()

    return close


DAEMONS: dict[str, Any] = {
    "mutex": Threaded(VringMutex),
    "rwlock": Threaded(VringRwLock),
    "loop": in_loop,
}
DEVICES: dict[str, Any] = {"plain": Plain, "batch": Batched, "async": Async}


class Rig:
    """A device, its daemon and a driver, and a look at what is mapped of the driver's memory."""

    def __init__(
        self, daemon: str, device: VirtioDevice, engine: EngineName, **options: Any
    ) -> None:
        self.device: Any = device
        ours, theirs = socket.socketpair()
        mapper = options.pop("mapper", None)
        self.close_daemon = DAEMONS[daemon](device, ours, engine=engine, mapper=mapper)
        self.session_type = options.pop("session", DriverSession)
        self.fd: int = options.pop("memory_fd", -1)
        if self.fd < 0:
            self.fd = allocate_memfd(SIZE)
        #: Other files that only the back-end maps.
        self.others: list[int] = []
        self.session: DriverSession = self.session_type(
            vp.Frontend(theirs, timeout=DEADLINE),
            memory_size=SIZE,
            memory_fd=os.dup(self.fd),
            protocol_features=vp.ProtocolFeatures.CONFIGURE_MEM_SLOTS
            | vp.ProtocolFeatures.INFLIGHT_SHMFD,
            **options,
        )

    @property
    def vring(self) -> DriverVring:
        return self.session.vrings[0]

    def submit(self) -> None:
        source, target = self.session.allocate(64, 4096), self.session.allocate(64, 4096)
        self.vring.submit([(source, 64)], [(target, 64)])
        self.vring.kick()

    def work(self) -> None:
        """Have a request served."""
        self.submit()
        assert self.vring.completions(DEADLINE)

    def hang_up(self) -> None:
        self.session.close()

    @property
    def mapped(self) -> int:
        """Mappings that are not the driver's own, which is one."""
        return mappings(self.fd) - 1 + sum(mappings(fd) for fd in self.others)


# Each takes a rig with a connection, and leaves none.


def clean(rig: Rig) -> None:
    rig.work()
    rig.hang_up()


def without_any_request(rig: Rig) -> None:
    rig.hang_up()


def stopped_before(rig: Rig) -> None:
    rig.work()
    rig.session.stop_ring(0)
    rig.hang_up()


def reset_before(rig: Rig) -> None:
    rig.work()
    rig.session.frontend.reset_device()
    rig.hang_up()


def inside_a_message(rig: Rig) -> None:
    rig.work()
    rig.session.frontend.send_raw(bytes(5))
    rig.hang_up()


def after_a_refused_message(rig: Rig) -> None:
    rig.work()
    with pytest.raises(vp.RequestFailed):
        rig.session.frontend.set_vring_num(0, 3)
    region = vp.MemoryRegion(0, 2 * SIZE, 1 << 32, 0)  # larger than its file
    with pytest.raises(vp.RequestFailed):
        rig.session.frontend.add_mem_reg(region, rig.fd)
    rig.work()
    rig.hang_up()


def by_a_refusal(rig: Rig) -> None:
    """A message that is refused, and can only be answered by hanging up."""
    rig.work()
    with pytest.raises((vp.ProtocolError, OSError)):
        rig.session.frontend.get_vring_base(99)
    rig.hang_up()


def by_a_protocol_error(rig: Rig) -> None:
    rig.work()
    rig.session.frontend.send_raw(b"\xff" * 12)
    with pytest.raises((vp.ProtocolError, OSError)):
        rig.session.frontend.get_features()
    rig.hang_up()


def with_a_broken_ring(rig: Rig) -> None:
    rig.work()
    error = os.eventfd(0, os.EFD_NONBLOCK)
    rig.session.frontend.set_vring_err(0, error)
    rig.vring.submit([(1 << 50, 16)], [])  # an address that is none
    rig.vring.kick()
    wait_until(lambda: signalled(error), "the ring was not reported")
    os.close(error)
    rig.hang_up()


def with_a_ring_outside_of_memory(rig: Rig) -> None:
    rig.work()
    error = os.eventfd(0, os.EFD_NONBLOCK)
    frontend = rig.session.frontend
    frontend.set_vring_err(0, error)
    rig.session.stop_ring(0)
    frontend.set_vring_addr(0, descriptor=1 << 50, used=2 << 50, available=3 << 50)
    frontend.set_vring_kick(0, rig.vring.kick_fd)
    wait_until(lambda: signalled(error), "the ring was not reported")
    os.close(error)
    rig.hang_up()


def signalled(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd) > 0
    return False


def with_a_request_in_flight(rig: Rig) -> None:
    rig.device.holds = True
    rig.submit()
    assert rig.device.taken.wait(DEADLINE)
    rig.hang_up()
    assert rig.mapped, "a request keeps what it works on"
    rig.device.go_on.set()


def with_a_handler_that_raised(rig: Rig) -> None:
    rig.device.fails = True
    rig.work()
    rig.hang_up()


def with_memory_replaced(rig: Rig) -> None:
    rig.work()
    other = allocate_memfd(SIZE)
    region = vp.MemoryRegion(GUEST_BASE, SIZE, USER_BASE, 0)
    rig.session.frontend.set_mem_table([region], [other])
    wait_until(lambda: mappings(rig.fd) == 1, "the replaced memory stays mapped")
    rig.others.append(other)
    rig.hang_up()


def with_a_region_removed(rig: Rig) -> None:
    rig.work()
    other = allocate_memfd(1 << 20)
    region = vp.MemoryRegion(1 << 40, 1 << 20, 1 << 40, 0)
    frontend = rig.session.frontend
    frontend.add_mem_reg(region, other)
    rig.work()
    assert mappings(other) == 1
    frontend.rem_mem_reg(region)
    wait_until(lambda: not mappings(other), "the removed region stays mapped")
    frontend.add_mem_reg(region, other)
    rig.others.append(other)
    rig.hang_up()


def while_state_is_saved(rig: Rig) -> None:
    rig.work()
    rig.session.stop_ring(0)
    reader, writer = os.pipe()
    rig.session.frontend.set_device_state_fd(vp.TransferDirection.SAVE, writer)
    os.close(writer)
    rig.hang_up()
    os.close(reader)


def after_state_was_refused(rig: Rig) -> None:
    rig.work()
    rig.session.stop_ring(0)
    reader, writer = os.pipe()
    os.write(writer, b"this is no state")
    rig.session.frontend.set_device_state_fd(vp.TransferDirection.LOAD, reader)
    os.close(reader)
    os.close(writer)
    with pytest.raises(vp.RequestFailed):
        rig.session.frontend.check_device_state()
    rig.hang_up()


def with_log_and_records(rig: Rig) -> None:
    """A dirty log, one that replaced it, and records of requests in flight."""
    frontend = rig.session.frontend
    for _ in range(2):
        log = allocate_memfd(1 << 20)
        frontend.set_log_base(1 << 20, 0, log)
        rig.others.append(log)
        rig.work()
    base = rig.session.stop_ring(0)
    reply, fd = frontend.get_inflight_fd(1, 128)
    assert fd is not None
    own = fd.detach()
    frontend.set_inflight_fd(
        reply.mmap_size, reply.mmap_offset, reply.num_queues, reply.queue_size, own
    )
    rig.others.append(own)
    rig.session.start_ring(0, base)
    rig.work()
    rig.hang_up()


def by_the_daemon(rig: Rig) -> None:
    rig.work()
    rig.close_daemon()
    rig.hang_up()


ENDS = [
    clean,
    without_any_request,
    stopped_before,
    reset_before,
    inside_a_message,
    after_a_refused_message,
    by_a_refusal,
    by_a_protocol_error,
    with_a_broken_ring,
    with_a_ring_outside_of_memory,
    with_a_request_in_flight,
    with_a_handler_that_raised,
    with_memory_replaced,
    with_a_region_removed,
    while_state_is_saved,
    after_state_was_refused,
    with_log_and_records,
    by_the_daemon,
]


@pytest.fixture(autouse=True)
def no_gc(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    # What pytest catches of the log has tracebacks, and they have frames.
    caplog.set_level(logging.CRITICAL + 1)
    caplog.handler.setLevel(logging.CRITICAL + 1)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@contextlib.contextmanager
def rigged(daemon: str, device: VirtioDevice, engine: EngineName, **options: Any) -> Iterator[Rig]:
    """A rig, and what has to hold in the end: the device's memory has gone, the daemon lives on."""
    rig = Rig(daemon, device, engine, **options)
    try:
        yield rig
        wait_until(lambda: not rig.mapped, f"{rig.mapped} mappings are left")
    finally:
        if isinstance(device, Work):
            device.go_on.set()
        rig.session.close()
        rig.close_daemon()
        for fd in (rig.fd, *rig.others):
            os.close(fd)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("daemon", DAEMONS)
def test_memory_goes(
    daemon: str, device: str, end: Callable[[Rig], None], engine: EngineName
) -> None:
    with rigged(daemon, DEVICES[device](), engine) as rig:
        end(rig)


@pytest.mark.parametrize("daemon", DAEMONS)
@pytest.mark.parametrize("packed", [False, True])
def test_memory_goes_after_a_disk(
    daemon: str, packed: bool, engine: EngineName, image: Path
) -> None:
    """Requests that C serves, and a flush that fails."""
    device = BlockDevice(image)
    if packed and engine == "python":
        packed = False
    with rigged(daemon, device, engine, features=DRIVER_FEATURES, packed=packed) as rig:
        session = rig.session
        header, data, status = session.allocate(16), session.allocate(512), session.allocate(1)
        for kind, sector in ((0, 0), (1, 1), (4, 0), (0, 1 << 40), (99, 0)):
            session.memory.write(header, kind.to_bytes(8, "little") + sector.to_bytes(8, "little"))
            readable, writable = [(header, 16)], [(status, 1)]
            (writable if kind == 0 else readable).insert(0 if kind == 0 else 1, (data, 512))
            rig.vring.submit(readable, writable)
            rig.vring.kick()
            assert rig.vring.completions(DEADLINE)
        rig.hang_up()
    device.close()


class Silent(DriverSession):
    """A front-end that answers misses of the IOTLB until it is told not to."""

    answers = True

    def _answer_miss(self, message: vp.Message) -> bool:
        if not self.answers:
            assert isinstance(message, vp.BackendIotlbMsg)
            self.missed.append(message.iova)
            return True
        return super()._answer_miss(message)


class Mute(Silent):
    """It does not even say where the ring is."""

    answers = False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("daemon", DAEMONS)
@pytest.mark.parametrize("answer", ["answered", "pending", "timed out", "ring pending", "denied"])
def test_memory_goes_behind_an_iommu(
    answer: str, daemon: str, device: str, engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_type = Mute if answer == "ring pending" else Silent
    with rigged(daemon, DEVICES[device](), engine, iommu=True, session=session_type) as rig:
        session: Any = rig.session
        if answer == "ring pending":
            rig.vring.kick()
            wait_until(lambda: bool(session.missed), "the ring was not asked for")
        else:
            rig.work()
            error = os.eventfd(0, os.EFD_NONBLOCK)
            session.frontend.set_vring_err(0, error)
            if answer == "timed out":
                # Not before: what a busy driver answers late would be given up as well.
                monkeypatch.setattr("vhost_backend.control.iommu.MISS_TIMEOUT", 0.05)
            if answer in ("pending", "timed out"):
                session.answers = False
                asked = len(session.missed)
                rig.submit()
                wait_until(lambda: len(session.missed) > asked, "the buffer was not asked for")
            if answer == "denied":
                page = session.allocate(64, 4096)
                iova = page - GUEST_BASE + 0x20_0000_0000
                session.granted[iova] = vp.IotlbAccess.READ
                rig.vring.submit([], [(page, 64)])
                rig.vring.kick()
            if answer in ("denied", "timed out"):
                wait_until(lambda: signalled(error), "the ring was not reported")
            os.close(error)
        rig.hang_up()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("daemon", DAEMONS)
def test_memory_goes_that_was_truncated(daemon: str, device: str, engine: EngineName) -> None:
    if not SigbusGuard.available():
        pytest.skip("this installation has no C engine")
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    with rigged(daemon, DEVICES[device](), engine, memory_fd=fd) as rig:
        rig.work()
        rig.vring.queue.publish()
        os.ftruncate(fd, 0)
        os.eventfd_write(rig.vring.kick_fd, 1)
        # The back-end hangs up.
        wait_until(lambda: hung_up(rig.session.frontend), "the connection goes on")
        rig.hang_up()


def hung_up(frontend: vp.Frontend) -> bool:
    try:
        frontend.get_features()
    except (vp.ProtocolError, OSError):
        return True
    return False


class PinnedMapping:
    """A region that is mapped while it is pinned."""

    host_address = None
    page_size = 4096
    poisoned = False

    def __init__(self, mapper: "PinningMapper", region: Region, fd: int) -> None:
        self._mapper = mapper
        self._region = region
        self._fd = os.dup(fd)
        self.size = region.size

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        if address <= self._mapper.bad < address + length:
            raise MappingFailed(22, "pin")
        mapping = SharedMapping(self._fd, length, address - self._region.guest_address)
        return mapping.address, mapping

    def unpin(self, token: SharedMapping) -> None:
        token.close()

    def close(self) -> None:
        os.close(self._fd)


class PinningMapper:
    bad = -1

    def map(self, region: Region, fd: int | None) -> PinnedMapping:
        if fd is None:
            raise GuestMemoryError("no file")
        return PinnedMapping(self, region, fd)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("daemon", DAEMONS)
@pytest.mark.parametrize(
    "end", [clean, with_a_request_in_flight, with_a_handler_that_raised, with_a_broken_ring]
)
def test_memory_goes_that_is_mapped_on_demand(
    daemon: str, device: str, end: Callable[[Rig], None], engine: EngineName
) -> None:
    mapper: Mapper = PinningMapper()
    with rigged(daemon, DEVICES[device](), engine, mapper=mapper) as rig:
        end(rig)


@pytest.mark.parametrize("daemon", DAEMONS)
def test_memory_goes_whose_page_cannot_be_mapped(daemon: str, engine: EngineName) -> None:
    mapper = PinningMapper()
    with rigged(daemon, Plain(), engine, mapper=mapper) as rig:
        rig.work()
        mapper.bad = rig.session.allocate(64, 4096)
        rig.vring.submit([(mapper.bad, 64)], [(rig.session.allocate(64, 4096), 64)])
        rig.vring.kick()
        assert rig.vring.completions(DEADLINE)
        rig.hang_up()
