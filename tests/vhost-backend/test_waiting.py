"""Requests that wait for news: stopping their ring is at once, and loses none of them."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vhost_protocol as vp
from guest_memory import GuestAddress
from vhost_backend import (
    AsyncDaemon,
    DeviceBackend,
    Listener,
    QueueInfo,
    Recall,
    Request,
    VhostUserDaemon,
    VirtioDevice,
)
from vhost_backend.driver import DriverSession, Migration
from vhost_backend.testing import attached, served, serving
from virtqueue import EngineName

pytestmark = pytest.mark.usefixtures("every_flavour")

PATIENCE = 60.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class News(VirtioDevice):
    """Answers a request, which names itself, when news comes for it. `busy` ones cannot wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pending: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = {}
        self.busy: set[int] = set()
        self.fates: list[tuple[int, Recall]] = []
        self.stops = 0

    async def handle(self, queue: QueueInfo, request: Request) -> None:
        name = int.from_bytes(request.read(4), "little")
        loop = asyncio.get_running_loop()
        news = loop.create_future()
        with self.lock:
            self.pending[name] = loop, news
        try:
            if name in self.busy:
                await news
            else:
                async with request.waiting():
                    await news
        finally:
            with self.lock:
                del self.pending[name]
        request.write(name.to_bytes(4, "little"))

    def recalled(self, queue: QueueInfo, request: Request, recall: Recall) -> None:
        self.fates.append((int.from_bytes(request.header[:4], "little"), recall))

    def stopped(self) -> None:
        self.stops += 1

    def tell(self, name: int) -> None:
        """News for that request."""
        with self.lock:
            loop, news = self.pending[name]

        def set_result() -> None:
            if not news.done():
                news.set_result(None)

        loop.call_soon_threadsafe(set_result)

    def names(self) -> set[int]:
        """The requests that it has."""
        with self.lock:
            return set(self.pending)

    def wait_for(self, names: set[int]) -> None:
        until(lambda: self.names() == names, f"the device has not {names}")


class Buffers:
    """Requests of a driver by name, and how each one ended."""

    def __init__(self, session: DriverSession, queue: int = 0) -> None:
        self.session, self.queue = session, queue
        self.names: dict[int, int] = {}
        self.targets: dict[int, GuestAddress] = {}
        self.done: dict[int, int] = {}

    def submit(self, *names: int) -> None:
        vring = self.session.vrings[self.queue]
        for name in names:
            source, target = self.session.allocate(4), self.session.allocate(4)
            self.session.memory.write(source, name.to_bytes(4, "little"))
            self.names[vring.submit([(source, 4)], [(target, 4)])] = name
            self.targets[name] = target
        vring.kick()

    def collect(self) -> None:
        for identity, written in self.session.vrings[self.queue].queue.collect():
            name = self.names.pop(identity)
            assert name not in self.done, f"{name} completed twice"
            self.done[name] = written
            if written:
                data = self.session.memory.read(self.targets[name], 4)
                assert int.from_bytes(data, "little") == name

    def wait_for(self, *names: int) -> None:
        def all_done() -> bool:
            self.collect()
            return set(names) <= set(self.done)

        until(all_done, f"{names} have not all completed")


@pytest.mark.parametrize("packed", [False, True])
def test_buffers_that_wait_are_there_after_a_stop(engine: EngineName, packed: bool) -> None:
    device = News()
    with attached(device, engine=engine, packed=packed, timeout=PATIENCE) as session:
        buffers = Buffers(session)
        buffers.submit(*range(4))
        device.wait_for({0, 1, 2, 3})
        base = session.stop_ring(0)
        assert base == (0x8000_8000 if packed else 0)
        assert not device.names()
        assert sorted(device.fates) == [(name, Recall.GIVEN_BACK) for name in range(4)]
        session.start_ring(0, base)
        device.wait_for({0, 1, 2, 3})
        for name in (2, 0, 3, 1):
            device.tell(name)
            buffers.wait_for(name)
        assert buffers.done == dict.fromkeys(range(4), 4)


def get_base(session: DriverSession) -> int:
    return session.stop_ring(0)


def skip_drain(session: DriverSession) -> int:
    return session.frontend.get_vring_base_skip_drain(0)


def reset_and_get_base(session: DriverSession) -> int:
    """As QEMU 7.2 does when its guest pauses."""
    session.frontend.reset_device()
    return session.stop_ring(0)


STOPS = (
    vp.ProtocolFeatures.INFLIGHT_SHMFD
    | vp.ProtocolFeatures.GET_VRING_BASE_INFLIGHT
    | vp.ProtocolFeatures.GET_VRING_BASE_SKIP_DRAIN
)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stop", [get_base, skip_drain, reset_and_get_base])
def test_what_cannot_be_given_back_is_recorded_or_completes_empty(
    engine: EngineName, stop: Callable[[DriverSession], int], packed: bool, recorded: bool
) -> None:
    device = News()
    with attached(
        device,
        engine=engine,
        packed=packed,
        inflight=recorded,
        protocol_features=STOPS,
        timeout=PATIENCE,
    ) as session:
        buffers = Buffers(session)
        buffers.submit(0, 1, 2, 3)
        device.wait_for({0, 1, 2, 3})
        device.tell(1)
        buffers.wait_for(1)
        base = stop(session)
        rest = Recall.KEPT if recorded else Recall.EMPTY
        expected = {0: rest, 2: Recall.GIVEN_BACK, 3: Recall.GIVEN_BACK}
        assert dict(device.fates) == expected
        again = {name for name, fate in device.fates if fate is not Recall.EMPTY}
        buffers.collect()
        assert buffers.done.get(0) == (None if recorded else 0)
        if stop is reset_and_get_base and recorded:
            # A reset forgets the record; the front-end hands it over again.
            session._hand_over_inflight()
        session.start_ring(0, base)
        device.wait_for(again)
        for name in again:
            device.tell(name)
        buffers.wait_for(0, 1, 2, 3)


def test_the_driver_sees_no_status_but_an_errors_in_what_completes_empty(
    engine: EngineName,
) -> None:
    class Status(News):
        status_byte = True
        error_status = 9

    device = Status()
    with attached(device, engine=engine, timeout=PATIENCE) as session:
        vring = session.vrings[0]
        targets = []
        for name in range(2):
            source, target = session.allocate(4), session.allocate(5)
            session.memory.write(source, name.to_bytes(4, "little"))
            vring.submit([(source, 4)], [(target, 5)])
            targets.append(target)
        vring.kick()
        device.wait_for({0, 1})
        device.tell(1)
        assert [written for _, written in vring.completions(PATIENCE)] == [5]
        session.stop_ring(0)
        assert device.fates == [(0, Recall.EMPTY)]
        assert [written for _, written in vring.queue.collect()] == [1]
        assert session.memory.read(targets[0], 5)[4] == 9


def test_a_request_that_has_begun_is_not_given_back(engine: EngineName) -> None:
    class Begun(News):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            request.write(b"x")
            await super().handle(queue, request)

    device = Begun()
    with attached(device, engine=engine, timeout=PATIENCE) as session:
        buffers = Buffers(session)
        buffers.submit(0)
        device.wait_for({0})
        assert session.stop_ring(0) == 1
        assert device.fates == [(0, Recall.EMPTY)]
        assert [written for _, written in session.vrings[0].queue.collect()] == [0]


def test_a_coroutine_may_complete_its_request_when_it_is_called_back(engine: EngineName) -> None:
    class Polite(News):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await super().handle(queue, request)
                return
            request.write(b"bye!")

    device = Polite()
    with attached(device, engine=engine, timeout=PATIENCE) as session:
        Buffers(session).submit(0)
        device.wait_for({0})
        assert session.stop_ring(0) == 1
        assert not device.fates
        assert [written for _, written in session.vrings[0].queue.collect()] == [4]


def test_a_coroutine_that_comes_to_wait_while_its_ring_stops_is_called_back(
    engine: EngineName,
) -> None:
    first, go_on = threading.Event(), threading.Event()

    class Late(News):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            first.set()
            await asyncio.to_thread(go_on.wait, PATIENCE)
            await super().handle(queue, request)

    device = Late()
    with attached(device, engine=engine, timeout=PATIENCE) as session:
        Buffers(session).submit(0)
        assert first.wait(PATIENCE)
        bases: list[int] = []
        stopping = threading.Thread(target=lambda: bases.append(session.stop_ring(0)))
        stopping.start()
        stopping.join(0.1)
        assert not bases
        go_on.set()
        stopping.join(PATIENCE)
        assert bases == [0]
        assert device.fates == [(0, Recall.GIVEN_BACK)]


def test_whole_queues_that_wait(engine: EngineName) -> None:
    class Marked(VirtioDevice):
        num_queues = 2
        waiting_queues = frozenset((0,))

        def __init__(self) -> None:
            self.taken: list[int] = []
            self.go_on = threading.Event()

        async def handle(self, queue: QueueInfo, request: Request) -> None:
            self.taken.append(queue.index)
            while not self.go_on.is_set():
                await asyncio.sleep(0.001)

    device = Marked()
    with attached(device, engine=engine, num_queues=2, timeout=PATIENCE) as session:
        for index in range(2):
            Buffers(session, index).submit(0)
        until(lambda: sorted(device.taken) == [0, 1], "both queues have a request")
        assert session.stop_ring(0) == 0
        bases: list[int] = []
        stopping = threading.Thread(target=lambda: bases.append(session.stop_ring(1)))
        stopping.start()
        stopping.join(0.1)
        assert not bases  # that one is finished
        device.go_on.set()
        stopping.join(PATIENCE)
        assert bases == [1]


@pytest.mark.parametrize("recorded", [False, True])
def test_after_a_hang_up_the_next_front_end_has_the_requests(
    tmp_path: Path, engine: EngineName, recorded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    device = News()
    with (
        Listener(tmp_path / "s") as listener,
        VhostUserDaemon("test", DeviceBackend.of(device), engine=engine) as daemon,
        serving(daemon, listener),
    ):
        with DriverSession.connect(tmp_path / "s", timeout=PATIENCE, inflight=recorded) as session:
            buffers = Buffers(session)
            buffers.submit(0, 1, 2)
            device.wait_for({0, 1, 2})
            device.tell(1)
            buffers.wait_for(1)
            session._hang_up()
            device.wait_for(set())
            until(lambda: len(device.fates) == 2, "the device is not told")
            assert not session.vrings[0].queue.collect()
            if recorded:
                session.reconnect(vp.Frontend.connect(str(tmp_path / "s"), timeout=PATIENCE))
                device.wait_for({0, 2})
                device.tell(0)
                device.tell(2)
                buffers.wait_for(0, 1, 2)
        until(lambda: device.stops == 1 + recorded, "the device is not told of its rings' end")
    assert not [record for record in caplog.records if record.exc_info]


def test_a_daemon_ends_though_requests_wait(
    engine: EngineName, caplog: pytest.LogCaptureFixture
) -> None:
    device = News()
    with attached(device, engine=engine, timeout=PATIENCE) as session:
        Buffers(session).submit(0, 1)
        device.wait_for({0, 1})
    assert not device.names()
    assert not [record for record in caplog.records if record.exc_info]


def test_a_ring_moves_with_what_waits(engine: EngineName) -> None:
    device = News()
    with attached(device, engine=engine, timeout=PATIENCE) as session:
        buffers = Buffers(session)
        buffers.submit(0, 1)
        device.wait_for({0, 1})
        config, (place, length) = session.vrings[0].config, session.ring_memory[0]
        copy = session.allocate(length, 4096)
        session.memory.write(copy, session.memory.read(GuestAddress(place), length))
        distance = copy - place
        session.frontend.set_vring_addr(
            0,
            descriptor=config.descriptor_address + distance,
            used=config.device_address + distance,
            available=config.driver_address + distance,
        )
        device.wait_for({0, 1})
        assert sorted(device.fates) == [(0, Recall.GIVEN_BACK), (1, Recall.GIVEN_BACK)]
        assert session.stop_ring(0) == 0


def test_an_iotlb_invalidation_does_not_wait_for_news(engine: EngineName) -> None:
    device = News()
    with attached(device, engine=engine, iommu=True, timeout=PATIENCE) as session:
        buffers = Buffers(session)
        buffers.submit(0, 1)
        device.wait_for({0, 1})
        unused = session.allocate(4096, align=4096)
        session.invalidate(unused, 4096)
        device.wait_for({0, 1})
        assert sorted(device.fates) == [(0, Recall.GIVEN_BACK), (1, Recall.GIVEN_BACK)]
        for name in (1, 0):
            device.tell(name)
        buffers.wait_for(0, 1)


def test_a_move_to_another_back_end_takes_the_waiting_requests_along(engine: EngineName) -> None:
    source, target = News(), News()
    with (
        attached(source, engine=engine, memory_size=4 << 20, timeout=PATIENCE) as session,
        contextlib.ExitStack() as stack,
    ):
        buffers = Buffers(session)
        buffers.submit(0, 1, 2)
        source.wait_for({0, 1, 2})
        path = stack.enter_context(served(target, engine=engine))
        with Migration(session) as migration:
            migration.copy()
            migration.finish(vp.Frontend.connect(path, timeout=PATIENCE))
        target.wait_for({0, 1, 2})
        assert not source.names()
        for name in (2, 1, 0):
            target.tell(name)
        buffers.wait_for(0, 1, 2)


def test_the_loops_daemon_calls_back_what_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = News()
    path = tmp_path / "s"

    def use() -> None:
        with DriverSession.connect(path, timeout=PATIENCE) as session:
            buffers = Buffers(session)
            buffers.submit(0, 1)
            device.wait_for({0, 1})
            assert session.stop_ring(0) == 0
            session.start_ring(0, 0)
            device.wait_for({0, 1})
            session.frontend.reset_device()
            assert not device.names()
        with DriverSession.connect(path, timeout=PATIENCE) as session:
            Buffers(session).submit(2)
            device.wait_for({2})
        with DriverSession.connect(path, timeout=PATIENCE) as session:
            Buffers(session).submit(3)
            device.wait_for({3})
            done.set()
            assert ended.wait(PATIENCE)

    done, ended = threading.Event(), threading.Event()

    async def main() -> None:
        with Listener(path) as listener:
            async with AsyncDaemon("test", DeviceBackend.of(device)) as daemon:
                task = asyncio.create_task(daemon.serve_forever(listener))
                using = asyncio.create_task(asyncio.to_thread(use))
                await asyncio.to_thread(done.wait, PATIENCE)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                ended.set()
                await using

    asyncio.run(main())
    assert [name for name, _ in device.fates[-2:]] == [2, 3]
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("recorded", [False, True], ids=["bare", "recorded"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_completions_stops_and_starts_in_any_order_lose_nothing(
    tmp_path: Path, engine: EngineName, packed: bool, recorded: bool, seed: int
) -> None:
    """Every request completes exactly once; it completes empty only where nothing else can be."""
    chance = random.Random(seed)
    device = News()
    with (
        Listener(tmp_path / "s") as listener,
        VhostUserDaemon("test", DeviceBackend.of(device), engine=engine) as daemon,
        serving(daemon, listener),
        DriverSession.connect(
            tmp_path / "s",
            timeout=PATIENCE,
            packed=packed,
            inflight=recorded,
            queue_size=32,
            protocol_features=STOPS,
        ) as session,
    ):
        run_model(session, device, chance, str(tmp_path / "s"), recorded)


def run_model(
    session: DriverSession,
    device: News,
    chance: random.Random,
    path: str,
    recorded: bool,
) -> None:
    buffers = Buffers(session)
    out: set[int] = set()
    count = 0
    for _ in range(25):
        step = chance.random()
        if step < 0.45 and len(out) < 12:
            names = range(count, count + chance.randint(1, 4))
            count = names.stop
            device.busy.update(name for name in names if chance.random() < 0.3)
            buffers.submit(*names)
            out.update(names)
        elif step < 0.75 and out:
            for name in chance.sample(sorted(out), chance.randint(1, len(out))):
                device.tell(name)
                out.remove(name)
                buffers.wait_for(name)
        elif step < 0.95 or not recorded:
            # A split ring without a record cannot go on where completions overtook others.
            restart(session, device, chance, out)
        else:
            finish_busy(device, out)
            buffers.wait_for(*(set(buffers.targets) - out))
            session.reconnect(vp.Frontend.connect(path, timeout=PATIENCE))
        buffers.collect()
        empty = {name for name in out if name in buffers.done}
        if recorded:
            assert not empty
        out -= empty
        device.wait_for(out)
    finish_busy(device, out)
    for name in sorted(out):
        device.tell(name)
    buffers.wait_for(*range(count))
    assert set(buffers.done.values()) <= ({4} if recorded else {0, 4})


def finish_busy(device: News, out: set[int]) -> None:
    for name in sorted(out & device.busy):
        device.tell(name)
        out.discard(name)


def restart(session: DriverSession, device: News, chance: random.Random, out: set[int]) -> None:
    """Stop the ring while some requests cannot wait; these end while the stop waits for them."""
    stop = chance.choice([get_base, skip_drain])
    bases: list[int] = []
    stopping = threading.Thread(target=lambda: bases.append(stop(session)))
    busy = bool(out & device.busy)
    stopping.start()
    if busy:
        stopping.join(0.02)
        assert not bases, "the stop did not wait"
    finish_busy(device, out)
    stopping.join(PATIENCE)
    assert bases, "the ring was not stopped"
    assert not device.names()
    session.start_ring(0, bases[0])


class Relay(VirtioDevice):
    """What comes on queue 1 goes out on queue 0, whichever comes first: a network card in short."""

    num_queues = 2

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.taken = threading.Event()
        self.loops: set[asyncio.AbstractEventLoop] = set()

    async def handle(self, queue: QueueInfo, request: Request) -> None:
        self.loops.add(asyncio.get_running_loop())
        if queue.index == 1:
            self.frames.put_nowait(request.read())
            return
        self.taken.set()
        async with request.waiting():
            frame = await self.frames.get()
        request.write(frame)


def test_coroutines_of_different_queues_share_a_loop() -> None:
    device = Relay()
    with attached(device, num_queues=2) as session:
        receive, transmit = session.vrings
        room, frame = session.allocate(8), session.allocate(8)
        receive.submit([], [(room, 8)])
        receive.kick()
        assert device.taken.wait(PATIENCE)  # it waits before there is anything
        session.memory.write(frame, b"a frame.")
        transmit.submit([(frame, 8)], [])
        transmit.kick()
        ((_, written),) = receive.completions(timeout=PATIENCE)
        assert written == 8
        assert session.memory.read(room, 8) == b"a frame."
        # With two of them nobody wakes the one that waits, but by accident.
        assert len(device.loops) == 1


def test_a_device_of_coroutines_chooses_its_workers() -> None:
    class Apart(Relay):
        def queues_per_thread(self) -> list[int]:
            return [0b10, 0b01]

    assert DeviceBackend.of(Relay()).queues_per_thread() == [0b11]
    assert DeviceBackend.of(Apart()).queues_per_thread() == [0b10, 0b01]
