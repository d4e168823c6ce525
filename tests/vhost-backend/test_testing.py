"""The public harness: what a user's own tests rest on."""

import asyncio
import mmap
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from guest_memory import GuestAddress
from vhost_backend import BlockDevice, QueueInfo, Request, VirtioDevice
from vhost_backend.devices.blk import T_OUT
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import (
    BLOCK,
    BlockDriver,
    BlockWorkload,
    DeviceErrors,
    DeviceProcess,
    DriverSession,
    Migration,
    MissingError,
    SessionError,
    WrongData,
    attached,
    expect_errors,
    served,
)
from vhost_backend.testing.pytest_plugin import (
    Attach,
    StartProcess,
    attach,
    device_process,
)
from virtqueue import EngineName

__all__ = ["attach", "device_process"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "lifecycle.md"


class Echo(VirtioDevice):
    device_id = 40

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())


def exchange(session: DriverSession, data: bytes) -> bytes:
    source, target = session.allocate(len(data)), session.allocate(len(data))
    session.memory.write(source, data)
    vring = session.vrings[0]
    vring.submit([(source, len(data))], [(target, len(data))])
    vring.kick()
    vring.completions()
    return session.memory.read(target, len(data))


def test_the_documents_example(tmp_path: Path) -> None:
    (code,) = re.findall(
        r"<!-- example: harness -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.S
    )
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test(tmp_path)


def test_the_fixtures(attach: Attach, device_process: StartProcess, image: Path) -> None:
    assert exchange(attach(Echo(), packed=True), b"one") == b"one"
    process = device_process(lambda: BlockDevice(image))
    with process.connect(features=DRIVER_FEATURES) as session:
        assert BlockDriver(session).read(0, 512) == bytes(512)
    process.terminate()
    assert process.pid is None


@pytest.mark.parametrize("packed", [False, True])
def test_requests_complete_out_of_order(attach: Attach, engine: EngineName, packed: bool) -> None:
    class Backwards(VirtioDevice):
        """Holds requests until four are there, and answers the last one first."""

        def __init__(self) -> None:
            self.waiting: list[asyncio.Future[None]] = []

        async def handle(self, queue: QueueInfo, request: Request) -> None:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            if len(self.waiting) == 4:
                self.waiting.pop().set_result(None)
            await turn
            request.write(request.read())
            if self.waiting:
                self.waiting.pop().set_result(None)

    session = attach(Backwards(), engine=engine, packed=packed)
    vring = session.vrings[0]
    ids, targets = [], []
    for number in range(4):
        source, target = session.allocate(1), session.allocate(1)
        session.memory.write(source, bytes([number + 1]))
        ids.append(vring.submit([(source, 1)], [(target, 1)]))
        targets.append(target)
    vring.kick()
    order: list[int] = []
    while len(order) < 4:
        order += [identity for identity, _ in vring.completions()]
    assert order == ids[::-1]
    assert [session.memory.read(target, 1) for target in targets] == [b"\1", b"\2", b"\3", b"\4"]


# -- breaking rules -------------------------------------------------------------------------------


def test_raw_bytes_end_the_connection_and_not_the_device() -> None:
    with served(Echo()) as path:
        with DriverSession.connect(path) as session:
            session.frontend.send_raw(b"\xff" * 12)
            with pytest.raises((vp.ConnectionClosed, OSError)):
                session.frontend.get_features()
        with DriverSession.connect(path) as session:
            assert exchange(session, b"next") == b"next"


@pytest.mark.parametrize("packed", [False, True])
def test_a_hostile_ring_breaks_alone(attach: Attach, engine: EngineName, packed: bool) -> None:
    class Two(Echo):
        num_queues = 2

    session = attach(Two(), engine=engine, packed=packed, num_queues=2)
    bad = session.vrings[1]
    error = os.eventfd(0, os.EFD_NONBLOCK)
    session.frontend.set_vring_err(1, error)
    bad.submit([(session.allocate(8), 8)], [])
    # The descriptor points out of memory.
    session.memory.write(GuestAddress(bad.descriptor_area), b"\xee" * 8)
    bad.kick()
    deadline = time.monotonic() + 60
    while True:
        try:
            os.eventfd_read(error)
            break
        except BlockingIOError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    os.close(error)
    assert exchange(session, b"the other goes on") == b"the other goes on"


def test_ring_areas_are_guest_addresses(attach: Attach) -> None:
    for packed in (False, True):
        session = attach(Echo(), packed=packed)
        exchange(session, b"x")
        vring = session.vrings[0]
        if packed:
            assert any(session.memory.read(GuestAddress(vring.descriptor_area), 16))
        else:
            for area in (vring.driver_area, vring.device_area):
                assert session.memory.load(GuestAddress(area + 2), 2) == 1


# -- kill and restart -----------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_lost_when_the_device_is_killed(
    device_process: StartProcess, image: Path, engine: EngineName, packed: bool
) -> None:
    process = device_process(lambda: BlockDevice(image), engine=engine)
    with process.connect(features=DRIVER_FEATURES, packed=packed, inflight=True) as session:
        work = BlockWorkload(session, blocks=64, indirect=True)
        for _ in range(5):
            work.run(20)
            work.submit()
            process.kill_and_reconnect(session)
        work.verify()
    assert process.starts == 6
    data = image.read_bytes()
    work.verify_image(lambda offset, length: data[offset : offset + length])


def test_requests_in_flight_are_served_once_more_in_their_order(
    device_process: StartProcess, tmp_path: Path
) -> None:
    """What the killed process had taken and not completed is given to the next one first."""
    log = tmp_path / "log"

    class Stuck(VirtioDevice):
        """The first process never completes anything, the second one everything."""

        async def handle(self, queue: QueueInfo, request: Request) -> None:
            data = request.read()
            with open(log, "ab") as file:
                file.write(data)
            if log.stat().st_size <= 4:
                await asyncio.sleep(60)
            request.write(data)

    process = device_process(Stuck, drain_warning=0.1)
    with process.connect(inflight=True) as session:
        vring = session.vrings[0]
        ids = []
        for number in range(4):
            source, target = session.allocate(1), session.allocate(1)
            session.memory.write(source, b"abcd"[number : number + 1])
            ids.append(vring.submit([(source, 1)], [(target, 1)]))
        vring.kick()
        deadline = time.monotonic() + 60
        while not log.exists() or log.stat().st_size < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill_and_reconnect(session)
        done: list[int] = []
        while len(done) < 4:
            done += [identity for identity, _ in vring.completions()]
        assert sorted(done) == sorted(ids)
    assert log.read_bytes() == b"abcdabcd"


def test_a_split_ring_goes_on_without_a_record_but_serves_again(
    device_process: StartProcess, image: Path
) -> None:
    process = device_process(lambda: BlockDevice(image))
    with process.connect(features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        driver.write(0, b"a" * 512)
        process.kill_and_reconnect(session)
        assert driver.read(0, 512) == b"a" * 512


def test_a_packed_ring_cannot_go_on_without_a_record(
    device_process: StartProcess, image: Path
) -> None:
    process = device_process(lambda: BlockDevice(image))
    with process.connect(packed=True) as session:
        process.restart()
        with pytest.raises(SessionError, match="packed ring"), process.frontend() as frontend:
            session.reconnect(frontend)


def test_a_process_is_killed_once(device_process: StartProcess) -> None:
    process = device_process(Echo)
    with pytest.raises(SessionError, match="runs already"):
        process.start()
    process.kill()
    with pytest.raises(SessionError, match="does not run"):
        process.kill()
    process.start()
    with process.connect() as session:
        assert exchange(session, b"again") == b"again"


def test_who_waits_for_a_device_that_was_killed_learns_it_at_once(
    device_process: StartProcess,
) -> None:
    process = device_process(Echo)
    with process.connect() as session:
        vring = session.vrings[0]
        vring.submit([(session.allocate(8), 8)], [(session.allocate(8), 8)])
        process.kill()  # before the kick
        vring.kick()
        with pytest.raises(SessionError, match="the back-end has hung up"):
            vring.completions(60)
        process.start()
        session.reconnect(process.frontend())
        assert len(vring.completions()) == 1


def test_a_device_that_cannot_be_made_ends_its_process(
    device_process: StartProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = device_process(lambda: BlockDevice(tmp_path / "missing"), timeout=2.0)
    with pytest.raises((vp.ProtocolError, OSError)):
        process.frontend().get_features()
    with pytest.raises(SessionError, match="status"):
        process.terminate()
    assert "missing" in capfd.readouterr().err


# -- the workload ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lost", "torn", "elsewhere"])
def test_the_workload_notices(attach: Attach, image: Path, fault: str) -> None:
    class Faulty(BlockDevice):
        """Has one write in ten go wrong."""

        rng = random.Random(1)

        def handle_batch(self, queue: QueueInfo, batch: Any) -> None:
            super().handle_batch(queue, batch)
            for chain in batch:
                header = chain.read(16)
                if int.from_bytes(header[:4], "little") != T_OUT or self.rng.random() > 0.1:
                    continue
                offset = int.from_bytes(header[8:], "little") * 512
                wrong = {
                    "lost": (offset, bytes(BLOCK)),
                    "torn": (offset + 2048, bytes(2048)),
                    "elsewhere": (offset, chain.read().replace(b"\1", b"\2")),
                }[fault]
                os.pwrite(self._store.fd, wrong[1], wrong[0])

    work = BlockWorkload(attach(Faulty(image), features=DRIVER_FEATURES), blocks=32)

    def use() -> None:
        for _ in range(20):
            work.run(50)
            work.verify()

    with pytest.raises(WrongData):
        use()


# -- migrate --------------------------------------------------------------------------------------


class Counter(Echo):
    """Counts its requests; the count is its state."""

    def __init__(self) -> None:
        self.count = 0

    def handle(self, queue: QueueInfo, request: Request) -> None:
        self.count += 1
        super().handle(queue, request)

    def save_state(self) -> bytes:
        return self.count.to_bytes(8, "little")

    def load_state(self, version: int, state: bytes) -> None:
        self.count = int.from_bytes(state, "little")


@pytest.mark.parametrize("packed", [False, True])
def test_a_session_moves_with_its_memory_and_the_devices_state(
    engine: EngineName, packed: bool
) -> None:
    source, target = Counter(), Counter()
    with (
        served(target, engine=engine) as path,
        attached(source, engine=engine, packed=packed, memory_size=4 << 20) as session,
    ):
        for number in range(200):
            exchange(session, bytes([number]) * 16)
        with Migration(session) as migration:
            for number in range(3):
                exchange(session, bytes([number]) * 5000)
                assert migration.copy() >= 2
            assert exchange(session, b"the last before") == b"the last before"
            migration.finish(vp.Frontend.connect(path, timeout=60))
        assert target.count == source.count == 204
        for number in range(200):
            assert exchange(session, bytes([number]) * 32) == bytes([number]) * 32
        assert (source.count, target.count) == (204, 404)


@pytest.mark.parametrize("iommu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_disk_moves_under_load(
    image: Path, engine: EngineName, packed: bool, iommu: bool
) -> None:
    """The copy is complete though reads and writes go on: every answer lands in memory once."""
    with (
        served(BlockDevice(image), engine=engine) as path,
        attached(
            BlockDevice(image),
            engine=engine,
            packed=packed,
            iommu=iommu,
            features=DRIVER_FEATURES,
            memory_size=4 << 20,
        ) as session,
    ):
        work = BlockWorkload(session, blocks=64, indirect=True)
        work.run(100)
        with Migration(session) as migration:
            for _ in range(3):
                work.run(50)
                work.submit()
                migration.copy()
            work.submit()
            migration.finish(vp.Frontend.connect(path, timeout=60))
        work.run(100)
        work.verify()


def test_what_is_not_logged_is_not_moved(attach: Attach) -> None:
    """The harness does not copy behind the log's back: a page that was forgotten shows."""
    source, target = Counter(), Counter()
    with served(target) as path:
        session = attach(source, memory_size=4 << 20)
        place = session.allocate(4096, align=4096)
        with Migration(session) as migration:
            # As a device would that writes past its log: through a mapping of its own.
            with mmap.mmap(session._memory_fd, 4 << 20) as memory:
                offset = place - 0x1_0000_0000
                memory[offset : offset + 5] = b"stray"
            migration.finish(vp.Frontend.connect(path, timeout=60))
        assert session.memory.read(place, 5) == bytes(5)


def test_a_migration_that_is_given_up_leaves_everything_as_it_was(attach: Attach) -> None:
    session = attach(Counter())
    with Migration(session) as migration:
        exchange(session, b"meanwhile")
        migration.copy()
    assert exchange(session, b"after") == b"after"


def test_nothing_is_left_behind(image: Path) -> None:
    def once() -> None:
        with (
            DeviceProcess(lambda: BlockDevice(image)) as process,
            process.connect(features=DRIVER_FEATURES, inflight=True) as session,
        ):
            BlockDriver(session).write(0, bytes(512))
            process.kill_and_reconnect(session)
        with attached(Echo()) as session, Migration(session) as migration:
            migration.copy()

    once()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        once()
    # Threads of tests before this one may have ended meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= before[0]
    assert threading.active_count() <= before[1]


class Wrong(Echo):
    def handle(self, queue: QueueInfo, request: Request) -> None:
        if request.readable_length != 7:
            pytest.fail("the driver should send 7 bytes")


def test_a_test_fails_whose_device_has_logged_an_error() -> None:
    message = "Wrong failed a request of queue 0\n(.|\n)*the driver should send 7 bytes"
    with pytest.raises(DeviceErrors, match=message) as failed, attached(Wrong()) as session:
        exchange(session, b"12345678")
    assert len(failed.value.errors) == 1
    with (
        pytest.raises(DeviceErrors, match=message),
        served(Wrong()) as path,
        DriverSession.connect(path) as session,
    ):
        exchange(session, b"12345678")
    # What the test raises itself is not hidden.
    with pytest.raises(KeyError) as raised, attached(Wrong()) as session:
        raise KeyError(exchange(session, b"12345678"))
    (note,) = raised.value.__notes__
    assert re.search(message, note)


def test_a_test_may_expect_errors() -> None:
    with expect_errors("send 7 bytes"), attached(Wrong()) as session:
        exchange(session, b"12345678")
    with attached(Wrong()) as session:
        with expect_errors("send 7 bytes") as errors:
            exchange(session, b"12345678")
        assert len(errors) == 1
    with (
        pytest.raises(MissingError, match="another"),
        attached(Wrong()) as session,
        expect_errors("another"),
        expect_errors("send 7"),
    ):
        exchange(session, b"12345678")
    with pytest.raises(MissingError, match="'send 7'"), expect_errors("send 7"):
        pass


def test_errors_in_a_devices_process_fail_the_test() -> None:
    with (
        pytest.raises(DeviceErrors, match="in the device's process: Wrong failed a request"),
        DeviceProcess(Wrong) as process,
        process.connect() as session,
    ):
        exchange(session, b"12345678")
    with expect_errors("send 7 bytes") as errors, DeviceProcess(Wrong) as process:
        for _ in range(2):
            with process.connect() as session:
                exchange(session, b"12345678")
            process.restart()
        assert len(errors) == 2


def test_the_fixtures_fail_the_test_itself(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        """
import pytest
from vhost_backend import VirtioDevice
from vhost_backend.testing import expect_errors
pytest_plugins = ["vhost_backend.testing.pytest_plugin"]

class Wrong(VirtioDevice):
    device_id = 42
    def handle(self, queue, request):
        pytest.fail("the driver should send 7 bytes")

class Late(VirtioDevice):
    device_id = 42
    def handle(self, queue, request): pass
    def stopped(self): raise ValueError("too late")

def use(session):
    session.vrings[0].submit([(session.allocate(8), 8)], [])
    session.vrings[0].kick()
    session.vrings[0].completions(timeout=60)

def test_wrong(attach): use(attach(Wrong()))
def test_late(attach): use(attach(Late()))
def test_expected(attach):
    with expect_errors("7 bytes"): use(attach(Wrong()))
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    # What is logged when the device is taken down is an error of the test's end.
    assert "1 failed, 2 passed, 1 error" in result.stdout, result.stdout
    assert "DeviceErrors" in result.stdout
    assert "the driver should send 7 bytes" in result.stdout
    assert "too late" in result.stdout


def test_a_devices_process_takes_any_free_descriptors() -> None:
    """Here the lowest is the one that errors are sent on."""
    program = """
import os

os.closerange(3, 64)
held = os.open(os.devnull, os.O_RDONLY)
assert held == 3

from vhost_backend import VirtioDevice
from vhost_backend.testing import DeviceProcess, expect_errors, process

class Failing(VirtioDevice):
    def handle(self, queue, request):
        raise ValueError("asked for")

class Lowest(process.ChildErrors):
    def __init__(self):
        os.close(held)
        super().__init__()
        assert self.fd == 3

process.ChildErrors = Lowest
with DeviceProcess(Failing) as device, expect_errors("asked for"):
    with device.connect() as session:
        source, target = session.allocate(8), session.allocate(8)
        vring = session.vrings[0]
        vring.submit([(source, 8)], [(target, 8)])
        vring.kick()
        vring.completions(60)
    device.terminate()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
