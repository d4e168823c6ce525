"""A worker that serves its one queue from C, and everybody else who wants the ring meanwhile."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_memory import GuestAddress, allocate_memfd
from vhost_backend import (
    BackendUsageError,
    BlockDevice,
    DeviceBackend,
    QueueInfo,
    Request,
    VhostUserDaemon,
    VirtioDevice,
    VirtioFeature,
    report,
)
from vhost_backend.adapter.ring_worker import QueueWorker
from vhost_backend.control.dirty_log import Logging
from vhost_backend.devices.blk import S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.fds import eventfd
from vhost_backend.fds.listener import Listener
from vhost_backend.testing import attached, expect_errors, served, serving
from vhost_backend.vring import ring_lease
from vhost_backend.vring.locks import VringMutex
from vhost_backend.vring.ring_lease import RingLease
from vhost_backend.vring.state import VringState
from vhost_protocol import ProtocolFeatures
from virtqueue import Batch, Chain, CHandler, EngineName, available_engines
from virtqueue.layout import QueueBlock

pytestmark = pytest.mark.skipif(
    "c" not in available_engines(), reason="this installation has no C engine"
)


class Echo(VirtioDevice):
    device_id = 40

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())


class Daemon:
    """A daemon that tests look into, and a session with it."""

    def __init__(self, device: VirtioDevice, path: Path, **options: object) -> None:
        self.listener = Listener(str(path / "device.sock"))
        self.daemon = VhostUserDaemon("test", DeviceBackend.of(device), **options)  # type: ignore[arg-type]
        self._serving = serving(self.daemon, self.listener)
        self._serving.__enter__()
        self.path = str(path / "device.sock")

    @property
    def worker(self) -> QueueWorker:
        worker = self.daemon.get_epoll_handlers()[0]
        assert isinstance(worker, QueueWorker)
        return worker

    def served_from_c(self) -> bool:
        """Whether the first queue is claimed by its worker now, in C."""
        return self.lease.server is not None

    @property
    def lease(self) -> RingLease:
        vring = self.daemon.vrings[0]
        assert isinstance(vring, VringMutex)
        return vring.lease

    def close(self) -> None:
        self._serving.__exit__(None, None, None)
        self.listener.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(Echo(), tmp_path)
    yield made
    made.close()


def until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def exchange(session: DriverSession, data: bytes) -> bytes:
    source, target = session.allocate(len(data)), session.allocate(len(data))
    session.memory.write(source, data)
    vring = session.vrings[0]
    vring.submit([(source, len(data))], [(target, len(data))])
    vring.kick()
    assert vring.completions(60)
    answer: bytes = session.memory.read(target, len(data))
    return answer


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_way_of_a_device_with_one_queue_a_worker(daemon: Daemon, packed: bool) -> None:
    with DriverSession.connect(daemon.path, packed=packed) as session:
        for number in range(20):
            assert exchange(session, b"%04d" % number) == b"%04d" % number
        until(daemon.served_from_c, "the worker does not serve from C")
        (entry,) = report([daemon.daemon])
        assert entry.counters["requests"] == 20
        assert entry.counters["bytes"] == 160


def test_whoever_wants_the_ring_has_it_while_the_worker_sleeps(daemon: Daemon) -> None:
    with DriverSession.connect(daemon.path) as session:
        exchange(session, b"before")
        until(daemon.served_from_c, "the worker does not serve from C")
        for _ in range(200):
            with daemon.daemon.vrings[0].get_mut() as state:
                assert state.started
        assert exchange(session, b"after!") == b"after!"


def test_whoever_wants_the_ring_has_it_under_load(daemon: Daemon) -> None:
    """A visitor comes between two batches of a queue that is never empty."""
    with DriverSession.connect(daemon.path, queue_size=256) as session:
        vring = session.vrings[0]
        source, target = session.allocate(4), session.allocate(4)
        stop = threading.Event()
        counted: list[int] = []

        def visit() -> None:
            while not stop.is_set():
                with daemon.daemon.vrings[0].get_ref() as state:
                    counted.append(state.in_flight)

        thread = threading.Thread(target=visit)
        thread.start()
        try:
            done = sent = 0
            while done < 20_000:
                while sent - done < 64:
                    vring.submit([(source, 4)], [(target, 4)])
                    sent += 1
                vring.kick()
                done += len(vring.completions(60))
        finally:
            stop.set()
            thread.join()
        assert len(counted) > 20


def test_no_kick_is_lost_between_the_two_ways(daemon: Daemon) -> None:
    """What makes the worker go the long way comes and goes; C may have taken the kick before."""
    with DriverSession.connect(daemon.path) as session:
        stop = threading.Event()

        def change() -> None:
            while not stop.is_set():
                for progress in (lambda: None, None):
                    with daemon.daemon.vrings[0].get_mut() as state:
                        state.events.on_progress = progress

        vring = session.vrings[0]
        source, target = session.allocate(4), session.allocate(4)
        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(2000):
                vring.submit([(source, 4)], [(target, 4)])
                vring.kick()
                assert vring.completions(60)
        finally:
            stop.set()
            thread.join()


def test_an_edge_of_a_listener_that_c_saw_is_not_lost(daemon: Daemon) -> None:
    """It is ready when it is registered, and the worker sleeps in C: nobody else sees the edge."""
    seen = threading.Event()
    fd = os.eventfd(1)
    with DriverSession.connect(daemon.path) as session:
        for _ in range(5):
            seen.clear()
            assert exchange(session, b"between") == b"between"
            until(daemon.served_from_c, "the worker does not serve from C")
            daemon.worker.register_listener(
                fd, select.EPOLLIN | select.EPOLLET, callback=lambda events: seen.set()
            )
            assert seen.wait(60)
            daemon.worker.unregister_listener(fd)
    os.close(fd)


def test_memory_may_change_under_load(daemon: Daemon) -> None:
    with DriverSession.connect(daemon.path) as session:
        vring = session.vrings[0]
        source, target = session.allocate(4), session.allocate(4)
        session.memory.write(source, b"data")
        for _ in range(300):
            for _ in range(8):
                vring.submit([(source, 4)], [(target, 4)])
            vring.kick()
            session.share_memory()
            done = 0
            while done < 8:
                done += len(vring.completions(60))
            assert session.memory.read(target, 4) == b"data"
            session.memory.write(target, b"\0\0\0\0")


def test_logging_is_switched_on_under_it(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is a descriptor to signal beside the call's, which C does not do."""
    switch = Logging.features_changed

    def switch_late(self: Logging) -> None:
        until(daemon.served_from_c, "the worker does not serve from C")
        time.sleep(0.05)  # and sleeps there
        switch(self)

    event = os.eventfd(0, os.EFD_NONBLOCK)
    log, features = allocate_memfd(1 << 20), ProtocolFeatures.LOG_SHMFD
    with DriverSession.connect(daemon.path, protocol_features=features) as session:
        exchange(session, b"before")
        session.frontend.set_log_base(1 << 20, 0, log)
        session.frontend.set_log_fd(event)
        monkeypatch.setattr(Logging, "features_changed", switch_late)
        session.frontend.set_features(int(session.features | VirtioFeature.LOG_ALL))
        session.frontend.get_features()  # that one has been worked on
        exchange(session, b"logged")
        poller = select.poll()
        poller.register(event, select.POLLIN)
        assert poller.poll(60_000), "the log's descriptor was not signalled"
    os.close(event)
    os.close(log)


def test_a_ring_is_stopped_and_started_under_it(daemon: Daemon) -> None:
    with DriverSession.connect(daemon.path) as session:
        for number in range(50):
            assert exchange(session, b"%04d" % number) == b"%04d" % number
            base = session.frontend.get_vring_base(0)
            assert base == number + 1
            until(lambda: not daemon.served_from_c(), "a stopped ring is served")
            session.start_ring(0, base)


def test_a_device_that_fails_keeps_its_worker(tmp_path: Path) -> None:
    class Broken(VirtioDevice):
        device_id = 2
        status_byte = True

        def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
            raise RuntimeError("not today")

    with expect_errors(), attached(Broken()) as session:
        vring = session.vrings[0]
        for _ in range(3):
            status = session.allocate(1)
            session.memory.write(status, b"\xff")
            vring.submit([(session.allocate(16), 16)], [(status, 1)])
            vring.kick()
            assert vring.completions(60)
            assert session.memory.read(status, 1) == b"\1"


def test_a_device_that_fails_to_fail_completes_nothing_as_a_success(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(VirtioDevice):
        device_id = 2
        status_byte = True

        def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
            raise RuntimeError("not today")

        def failed(self, queue: QueueInfo, error: BaseException) -> int:
            raise ValueError("nor tomorrow")

    with expect_errors(), attached(Broken()) as session:
        vring = session.vrings[0]
        status = session.allocate(1)
        vring.submit([(session.allocate(16), 16)], [(status, 1)])
        vring.kick()
        assert vring.completions(60)
        assert session.memory.read(status, 1) == b"\1"
    assert "Broken.failed has failed itself" in caplog.text


# --- handlers in C ---

HANDLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Slow(VirtioDevice):
    """Its handler in C (called through ctypes, as one would be) waits like a disk that hangs."""

    device_id = 40

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

        def work(context: int, queue: int) -> int:
            self.begun.set()
            self.go_on.wait(60)
            return 0

        self._function = HANDLER(work)

    def batch_handler(self, queue: int) -> CHandler | None:
        return CHandler(ctypes.cast(self._function, ctypes.c_void_p).value or 0)


def test_a_handler_in_c_that_hangs_holds_up_nobody(
    tmp_path: Path,
) -> None:
    """Messages are answered, the next front-end's too; its ring goes on when the handler does."""
    device = Slow()
    made = Daemon(device, tmp_path, drain_warning=10.0)
    try:
        with DriverSession.connect(made.path) as session:
            vring = session.vrings[0]
            vring.submit([(session.allocate(4), 4)], [(session.allocate(4), 4)])
            vring.kick()
            assert device.begun.wait(60)
            session.share_memory()
            session.frontend.get_features()
            (entry,) = report([made.daemon])
            assert entry.in_flight == 1
        with DriverSession.connect(made.path) as session:
            vring = session.vrings[0]
            vring.submit([(session.allocate(4), 4)], [(session.allocate(4), 4)])
            vring.kick()
            assert session.frontend.get_features()
            device.go_on.set()
            assert len(vring.completions(60)) == 1
    finally:
        device.go_on.set()
        made.close()


def test_the_default_serves_only_what_a_handler_in_c_left(tmp_path: Path) -> None:
    class Half(Slow):
        """Its handler in C leaves every other request."""

        def __init__(self) -> None:
            def work(context: int, queue: int) -> int:
                block = QueueBlock.from_address(queue)
                for position in range(1, block.count, 2):
                    ctypes.c_uint8.from_address(block.done + 8 * position + 3).value |= 8
                return int(block.count) // 2

            self._function = HANDLER(work)

        def handle(self, queue: QueueInfo, request: Request) -> None:
            request.write(b"left")

    with attached(Half()) as session:
        vring = session.vrings[0]
        targets = [session.allocate(4) for _ in range(6)]
        for target in targets:
            vring.submit([(session.allocate(4), 4)], [(target, 4)])
        vring.kick()
        done = 0
        while done < 6:
            done += len(vring.completions(60))
        assert [session.memory.read(target, 4) for target in targets] == [bytes(4), b"left"] * 3


def test_a_device_whose_handler_in_c_cannot_be_made_is_served_in_python(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Hopeless(Echo):
        asked = 0

        def batch_handler(self, queue: int) -> CHandler | None:
            self.asked += 1
            raise RuntimeError("not today")

    device = Hopeless()
    made = Daemon(device, tmp_path)
    try:
        with DriverSession.connect(made.path) as session:
            assert exchange(session, b"anyway") == b"anyway"
            assert device.asked == 1
            assert "Hopeless.batch_handler failed" in caplog.text
    finally:
        made.close()


def test_a_batch_is_completed_after_a_visit(tmp_path: Path) -> None:
    """Who came while a handler in C worked may have changed anything: the long way completes."""
    device = Slow()
    made = Daemon(device, tmp_path)
    try:
        with DriverSession.connect(made.path) as session:
            vring = session.vrings[0]
            vring.submit([(session.allocate(4), 4)], [(session.allocate(4), 4)])
            vring.kick()
            assert device.begun.wait(60)
            for _ in range(3):
                session.share_memory()
            assert not vring.queue.collect()
            device.go_on.set()
            assert len(vring.completions(60)) == 1
    finally:
        device.go_on.set()
        made.close()


def hold(worker: QueueWorker, name: str, action: object) -> None:
    """Have the worker do `action` once, right after its next call of a method."""
    method, pending = getattr(worker, name), [action]

    def held(*arguments: object) -> object:
        result = method(*arguments)
        while pending:
            pending.pop()()  # type: ignore[operator]
        return result

    setattr(worker, name, held)


def submit(session: DriverSession) -> None:
    session.vrings[0].submit([(session.allocate(4), 4)], [(session.allocate(4), 4)])
    session.vrings[0].queue.publish()


def test_nothing_is_completed_while_an_early_visitor_has_the_ring(tmp_path: Path) -> None:
    """A visitor that comes while the worker prepares to serve from C goes first."""
    device = Slow()
    made = Daemon(device, tmp_path)
    lease = made.lease
    inside, leave = threading.Event(), threading.Event()

    def visit() -> None:
        with lease:
            inside.set()
            leave.wait(60)

    visitor = threading.Thread(target=visit)
    try:
        with DriverSession.connect(made.path) as session:
            until(made.served_from_c, "the worker does not serve from C")

            def come_early() -> None:
                assert not lease.wanted
                visitor.start()
                until(lambda: lease.wanted, "nobody came")
                submit(session)

            hold(made.worker, "_adopt", come_early)
            made.worker.wake()
            assert inside.wait(60)
            device.go_on.set()
            time.sleep(0.05)
            assert not session.vrings[0].queue.collect()
            leave.set()
            assert len(session.vrings[0].completions(60)) == 1
    finally:
        leave.set()
        device.go_on.set()
        visitor.join(60)
        made.close()


def test_a_queue_that_was_borrowed_is_not_borrowed_while_its_batch_is_completed(
    tmp_path: Path,
) -> None:
    device = Slow()
    made = Daemon(device, tmp_path)
    lease = made.lease
    inside = threading.Event()
    seen: list[bool] = []

    def visit() -> None:
        with lease:
            inside.set()

    visitor = threading.Thread(target=visit)
    finish = lease.state.finish

    def finish_later(taken: int) -> None:
        visitor.start()
        seen.append(inside.wait(0.1))
        finish(taken)

    try:
        with DriverSession.connect(made.path) as session:
            borrowed = False
            while not borrowed:  # a request may also go the long way, which lends nothing
                device.begun.clear()
                device.go_on.clear()
                submit(session)
                eventfd.signal(session.vrings[0].kick_fd)
                assert device.begun.wait(60)
                with lease as state:
                    borrowed = lease._lender is not None
                    if borrowed:
                        state.finish = finish_later  # type: ignore[method-assign]
                device.go_on.set()
                assert len(session.vrings[0].completions(60)) == 1
            assert inside.wait(60)
            assert seen == [False]
            visitor.join(60)
    finally:
        device.go_on.set()
        made.close()


# --- descriptors of a hostile front-end ---


def test_a_full_and_blocking_call_descriptor_holds_up_its_own_ring_only(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_lease, "CALL_BACK_PATIENCE", 0.05)
    with DriverSession.connect(daemon.path) as session:
        exchange(session, b"before")
        vring = session.vrings[0]
        os.set_blocking(vring.call_fd, True)
        os.eventfd_write(vring.call_fd, (1 << 64) - 2)
        assert not vring.queue.enable_notification()
        vring.submit([(session.allocate(4), 4)], [(session.allocate(4), 4)])
        vring.kick()
        until(vring.queue.collect, "nothing completed")
        assert session.frontend.get_vring_base(0) == 2
    with DriverSession.connect(daemon.path) as session:
        assert exchange(session, b"the next") == b"the next"


def test_a_signal_that_a_visitor_read_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits long for a worker reads its call eventfd; the long way may be next."""

    class Stuck:
        def interrupt(self) -> None: ...
        def own(self) -> None: ...
        def borrow(self) -> bool:
            return False

    monkeypatch.setattr(ring_lease, "CALL_BACK_PATIENCE", 0)
    call = os.eventfd(1, os.EFD_NONBLOCK)
    state = VringState()
    state.set_call(os.dup(call))
    lease = RingLease(state)
    lease.claim()
    assert lease.begin(Stuck())  # type: ignore[arg-type]
    poller = select.poll()
    poller.register(call, select.POLLIN)

    def visit() -> None:
        with lease:
            pass

    visitor = threading.Thread(target=visit)
    visitor.start()
    until(lambda: not poller.poll(0), "nobody read it")
    lease.end()
    visitor.join(60)
    assert os.eventfd_read(call) == 1
    state.reset()
    os.close(call)


# --- polling, processors ---


@pytest.mark.parametrize("together", [False, True])
def test_workers_look_before_they_sleep(tmp_path: Path, together: bool, engine: EngineName) -> None:
    class Pair(Echo):
        num_queues = 2

        def queues_per_thread(self) -> list[int]:
            return [3] if together else [1, 2]

    made = Daemon(Pair(), tmp_path, busy_poll=0.002, engine=engine)
    try:
        with DriverSession.connect(made.path, num_queues=2) as session:
            for number in range(200):
                assert exchange(session, b"%04d" % number) == b"%04d" % number
            kicks = sum(entry.counters["kicks"] for entry in report([made.daemon]))
            if engine == "c" and not together:
                assert kicks < 200  # while C looks, the driver is told not to kick
    finally:
        made.close()


def test_workers_run_on_the_processors_they_are_given(tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    class Where(Echo):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            seen.append(os.sched_getaffinity(0))
            super().handle(queue, request)

    made = Daemon(Where(), tmp_path, cpus=[cpu])
    try:
        with DriverSession.connect(made.path) as session:
            exchange(session, b"here")
        assert seen == [{cpu}]
    finally:
        made.close()
    with pytest.raises(BackendUsageError, match="not allowed on"):
        VhostUserDaemon("test", DeviceBackend.of(Echo()), cpus=[100_000])
    with pytest.raises(BackendUsageError, match="0 to 1 s"):
        VhostUserDaemon("test", DeviceBackend.of(Echo()), busy_poll=1.0)


# --- disks ---


def test_a_subclass_takes_over_a_type_of_request(image: Path) -> None:
    class Refusing(BlockDevice):
        python_types = frozenset({T_OUT})

        def request(self, kind: int, offset: int, chain: Chain) -> tuple[int, int]:
            if kind == T_OUT and offset >= 4096:
                return S_IOERR, 1
            return super().request(kind, offset, chain)

    with attached(Refusing(image), features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        driver.write(0, b"a" * 4096)
        driver.submit(T_OUT, 8, b"b" * 512, tag=T_OUT)
        driver.submit(T_IN, 0, length=512, tag=T_IN)
        driver.kick()
        statuses: dict[object, int] = {}
        while driver.in_flight:
            for completion, _ in driver.collect():
                statuses[completion.tag] = completion.status
        assert statuses == {T_OUT: S_IOERR, T_IN: S_OK}
        assert driver.read(0, 4096) == b"a" * 4096
        assert driver.read(4096, 512) == bytes(512)


def test_a_flush_that_failed_is_not_tried_again(image: Path, tmp_path: Path) -> None:
    """The kernel says once that data was lost: a second fdatasync would report success."""

    class Failing(BlockDevice):
        def batch_handler(self, queue: int) -> CHandler | None:
            good, self._store.fd = self._store.fd, os.eventfd(0)  # that cannot be synced: EINVAL
            try:
                return super().batch_handler(queue)
            finally:
                self.bad, self._store.fd = self._store.fd, good

    device = Failing(image)
    with attached(device, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        driver.submit(T_FLUSH, 0, tag=T_FLUSH)
        driver.kick()
        statuses = []
        while driver.in_flight:
            statuses += [completion.status for completion, _ in driver.collect()]
        assert statuses == [S_IOERR]
        driver.write(0, b"w" * 512)  # what can be tried again is
        assert driver.read(0, 512) == b"w" * 512
    os.close(device.bad)


def test_a_subclass_with_batches_of_its_own_is_asked_for_all(image: Path) -> None:
    class Counting(BlockDevice):
        seen = 0

        def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
            self.seen += len(batch)
            super().handle_batch(queue, batch)

    device = Counting(image)
    with attached(device, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        for sector in range(5):
            driver.write(512 * sector, b"x" * 512)
        assert driver.read(0, 2560) == b"x" * 2560
    assert device.seen == 6


def test_past_the_page_cache(image: Path, engine: EngineName) -> None:
    """Requests that are not aligned for it go through the page cache, and see the same bytes."""
    with (
        served(BlockDevice(image, direct=True), engine=engine) as path,
        DriverSession.connect(path, features=DRIVER_FEATURES) as session,
    ):
        driver = BlockDriver(session, depth=8)
        for block in range(16):
            driver.write(4096 * block, bytes([block]) * 4096)
        driver.flush()
        page = session.allocate(8192)
        page = GuestAddress(page + -page % 4096)
        header, status = session.allocate(16), session.allocate(1)
        vring = session.vrings[0]
        for offset in (0, 512, 100):  # aligned for a page, for a sector, for nothing
            session.memory.write(header, struct.pack("<IIQ", T_IN, 0, 8 * 3))
            session.memory.write(status, b"\xff")
            target = page + offset
            vring.submit([(header, 16)], [(target, 2048), (status, 1)])
            vring.kick()
            assert [written for _, written in vring.completions(60)] == [2049]
            assert session.memory.read(status, 1) == b"\0"
            assert session.memory.read(GuestAddress(target), 2048) == bytes([3]) * 2048
    assert image.read_bytes()[: 16 * 4096] == b"".join(bytes([b]) * 4096 for b in range(16))


@pytest.mark.parametrize("disk", [False, True])
def test_memory_goes_with_its_front_end(
    tmp_path: Path, engine: EngineName, image: Path, disk: bool
) -> None:
    """What serves a queue does not keep memory mapped when there is nothing to serve."""
    device = BlockDevice(image, num_queues=2) if disk else Echo()
    made = Daemon(device, tmp_path, engine=engine)
    seen: list[weakref.ref[object]] = []
    try:
        for _ in range(2):
            with DriverSession.connect(made.path, num_queues=device.num_queues) as session:
                if disk:
                    BlockDriver(session).write(0, b"x" * 512)
                else:
                    exchange(session, b"used")
                seen.append(weakref.ref(made.daemon.memory.current))
                session.share_memory()
                seen.append(weakref.ref(made.daemon.memory.current))
        until(lambda: not any(ref() for ref in seen), "memory of a front-end that has gone")
    finally:
        made.close()
