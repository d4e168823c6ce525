"""Devices written the comfortable way: one method, plain, asynchronous or for a batch."""

import asyncio
import logging

import pytest

from vhost_backend import DeviceBackend, QueueInfo, Request, VirtioDevice, VirtioFeature
from vhost_backend.driver import DriverSession
from vhost_backend.testing import attached, expect_errors
from virtqueue import DONE, Batch, ChainCompleted, EngineName

pytestmark = pytest.mark.usefixtures("every_flavour")


class Pieces:
    """Shared memory for `count` requests of one readable and one writable piece."""

    def __init__(self, session: DriverSession, count: int, size: int = 16) -> None:
        self.session = session
        self.size = size
        self.sources = [session.allocate(size) for _ in range(count)]
        self.targets = [session.allocate(size) for _ in range(count)]

    def submit(self, index: int, data: bytes) -> int:
        self.session.memory.write(self.sources[index], data.ljust(self.size, b"\0"))
        return self.session.vrings[0].submit(
            [(self.sources[index], self.size)], [(self.targets[index], self.size)]
        )

    def answer(self, index: int) -> bytes:
        return self.session.memory.read(self.targets[index], self.size).rstrip(b"\0")


def test_a_plain_handler(engine: EngineName) -> None:
    class Upper(VirtioDevice):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            assert request.readable_length == request.writable_length == 16
            assert bytes(request.readable[0][:5]) == b"hello"
            assert request.read(2) == b"he"
            request.write(b"HE" + request.read().rstrip(b"\0").upper())

    with attached(Upper(), engine=engine) as session:
        pieces = Pieces(session, 1)
        identity = pieces.submit(0, b"hello")
        session.vrings[0].kick()
        assert session.vrings[0].completions() == [(identity, 5)]
        assert pieces.answer(0) == b"HELLO"


def test_order_is_promised_by_devices_that_keep_it() -> None:
    class Orderly(VirtioDevice):
        def handle(self, queue: QueueInfo, request: Request) -> None: ...

    class Overtaking(VirtioDevice):
        async def handle(self, queue: QueueInfo, request: Request) -> None: ...

    offered = [DeviceBackend.of(device).features() for device in (Orderly(), Overtaking())]
    assert [bool(features & VirtioFeature.IN_ORDER) for features in offered] == [True, False]


def test_written_may_be_set_after_filling_the_buffer_in_place(engine: EngineName) -> None:
    class InPlace(VirtioDevice):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            request.writable[0][:3] = b"abc"
            request.written = 3

    with attached(InPlace(), engine=engine) as session:
        pieces = Pieces(session, 1)
        identity = pieces.submit(0, b"x")
        session.vrings[0].kick()
        assert session.vrings[0].completions() == [(identity, 3)]
        assert pieces.answer(0) == b"abc"


def test_a_handler_that_raises_fails_its_request_only(
    engine: EngineName, caplog: pytest.LogCaptureFixture
) -> None:
    class Picky(VirtioDevice):
        status_byte = True
        error_status = 7

        def handle(self, queue: QueueInfo, request: Request) -> None:
            if request.read(3) == b"bad":
                raise ValueError("this one is bad")
            request.write(b"fine")

    with expect_errors(), attached(Picky(), engine=engine) as session:
        pieces = Pieces(session, 3)
        sent = [pieces.submit(0, b"good"), pieces.submit(1, b"bad"), pieces.submit(2, b"good")]
        session.vrings[0].kick()
        done: dict[int, int] = {}
        while len(done) < 3:
            done.update(session.vrings[0].completions())
        assert done == {sent[0]: 5, sent[1]: 1, sent[2]: 5}
        last = [session.memory.read(target, 16)[15] for target in pieces.targets]
        assert last == [0, 7, 0]
        assert caplog.text.count("ValueError: this one is bad") == 1


def test_a_storm_of_exceptions_is_logged_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(VirtioDevice):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            raise RuntimeError("always")

    with expect_errors(), attached(Broken()) as session:
        pieces = Pieces(session, 32)
        for _ in range(5):
            for index in range(32):
                pieces.submit(index, b"x")
            session.vrings[0].kick()
            left = 32
            while left:
                left -= len(session.vrings[0].completions())
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert 1 <= len(errors) <= 10


def test_a_batch_handler_that_raises_fails_the_batch(engine: EngineName) -> None:
    class Wrong(VirtioDevice):
        status_byte = True

        def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
            raise RuntimeError("half-way")

    with expect_errors(), attached(Wrong(), engine=engine) as session:
        pieces = Pieces(session, 2)
        for index in range(2):
            pieces.submit(index, b"x")
        session.vrings[0].kick()
        left = 2
        while left:
            left -= len(session.vrings[0].completions())
        assert [session.memory.read(target, 16)[15] for target in pieces.targets] == [1, 1]


def test_a_batch_handler_with_records(engine: EngineName) -> None:
    class Lengths(VirtioDevice):
        def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
            for position, chain in enumerate(batch):
                DONE.pack_into(batch.done, position * 8, chain.head, 0, 0, position)

    with attached(Lengths(), engine=engine) as session:
        pieces = Pieces(session, 4)
        for index in range(4):
            pieces.submit(index, b"x")
        session.vrings[0].kick()
        done: list[tuple[int, int]] = []
        while len(done) < 4:
            done += session.vrings[0].completions()
        assert all(written < 4 for _, written in done)


# -- asynchronous handlers ------------------------------------------------------------------------


class Sleeper(VirtioDevice):
    """Takes as long as the request says; so the later one may be done first."""

    async def handle(self, queue: QueueInfo, request: Request) -> None:
        text = request.read(3).decode()
        await asyncio.sleep(int(text) / 1000)
        request.write(text.encode())


def test_asynchronous_requests_complete_out_of_order(engine: EngineName) -> None:
    with attached(Sleeper(), engine=engine) as session:
        pieces = Pieces(session, 3)
        slow, quick, middle = (
            pieces.submit(0, b"300"), pieces.submit(1, b"001"), pieces.submit(2, b"150"),
        )  # fmt: skip
        session.vrings[0].kick()
        order: list[int] = []
        while len(order) < 3:
            order += [identity for identity, _ in session.vrings[0].completions()]
        assert order == [quick, middle, slow]
        assert [pieces.answer(index) for index in range(3)] == [b"300", b"001", b"150"]


def test_many_asynchronous_requests(engine: EngineName) -> None:
    with attached(Sleeper(), engine=engine) as session:
        pieces = Pieces(session, 32)
        for round_ in range(10):
            sent = {
                pieces.submit(index, b"%03d" % ((index * 7 + round_) % 5)) for index in range(32)
            }
            session.vrings[0].kick()
            while sent:
                for identity, written in session.vrings[0].completions():
                    assert written == 3
                    sent.remove(identity)


def test_an_asynchronous_handler_that_raises(
    engine: EngineName, caplog: pytest.LogCaptureFixture
) -> None:
    class Picky(VirtioDevice):
        status_byte = True

        async def handle(self, queue: QueueInfo, request: Request) -> None:
            await asyncio.sleep(0)
            if request.read(3) == b"bad":
                raise ValueError("this one is bad")

    with expect_errors(), attached(Picky(), engine=engine) as session:
        pieces = Pieces(session, 2)
        for index, data in enumerate((b"bad", b"good")):
            pieces.submit(index, data)
        session.vrings[0].kick()
        left = 2
        while left:
            left -= len(session.vrings[0].completions())
        assert [session.memory.read(target, 16)[15] for target in pieces.targets] == [1, 0]
    assert caplog.text.count("ValueError: this one is bad") == 1


def test_a_ring_drains_its_asynchronous_requests_before_it_stops(engine: EngineName) -> None:
    with attached(Sleeper(), engine=engine) as session:
        pieces = Pieces(session, 1)
        pieces.submit(0, b"200")
        session.vrings[0].kick()
        while not session.frontend.get_queue_num():
            pass
        assert session.frontend.get_vring_base(0) in (0, 1)
        # Either it was not taken at all, or it was finished.
        done = session.vrings[0].queue.collect()
        assert [pieces.answer(0)] == ([b"200"] if done else [b""])


def test_requests_end_with_the_daemon(engine: EngineName) -> None:
    kept: list[Request] = []

    class Keeper(VirtioDevice):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            kept.append(request)
            await asyncio.sleep(0.1)

    with attached(Keeper(), engine=engine) as session:
        pieces = Pieces(session, 1)
        pieces.submit(0, b"x")
        session.vrings[0].kick()
        session.vrings[0].completions()
    with pytest.raises(ChainCompleted):
        kept[0].read()


def test_a_device_is_closed_by_its_with() -> None:
    closed = []

    class Closing(VirtioDevice):
        device_id = 42

        def close(self) -> None:
            closed.append(self)

    with Closing() as device:
        assert not closed
    assert closed == [device]


@pytest.mark.parametrize("status_byte", [False, True])
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_the_room_for_an_answer_has_no_status_byte(status_byte: bool, kind: str) -> None:
    seen: list[tuple[int, list[int]]] = []

    class Measure(VirtioDevice):
        device_id = 40

        def handle(self, queue: QueueInfo, request: Request) -> None:
            pieces = request.writable
            seen.append((request.writable_length, [len(piece) for piece in pieces]))
            for piece in pieces:
                piece[:] = b"x" * len(piece)
            request.written = request.writable_length

    class MeasureLater(Measure):
        async def handle(self, queue: QueueInfo, request: Request) -> None:  # type: ignore[override]
            super().handle(queue, request)

    device = Measure() if kind == "plain" else MeasureLater()
    device.status_byte = status_byte
    with attached(device) as session:
        vring = session.vrings[0]
        first, second = session.allocate(8), session.allocate(8)
        for last in (1, 5):
            session.memory.write(second, b"-" * 8)
            vring.submit([], [(first, 3), (second, last)])
            vring.kick()
            ((_, written),) = vring.completions(60)
            assert written == 3 + last
            assert session.memory.read(first, 3) == b"xxx"
            wanted = b"x" * (last - 1) + b"\0" if status_byte else b"x" * last
            assert session.memory.read(second, last) == wanted
    if status_byte:
        assert seen == [(3, [3]), (7, [3, 4])]
    else:
        assert seen == [(4, [3, 1]), (8, [3, 5])]


@pytest.mark.parametrize("engine", ["c", "python"])
@pytest.mark.parametrize("last", [1, 2, 5])
def test_what_is_written_ends_before_the_status_byte(engine: EngineName, last: int) -> None:
    counts: list[int] = []

    class Talks(VirtioDevice):
        device_id = 40
        status_byte = True

        def handle(self, queue: QueueInfo, request: Request) -> None:
            counts.append(request.write(b"abcd"))
            counts.append(request.write(memoryview(b"efghijkl").cast("H")))
            request.status = 3

    with attached(Talks(), engine=engine) as session:
        vring = session.vrings[0]
        first, second = session.allocate(8), session.allocate(8)
        session.memory.write(second, b"-" * 8)
        vring.submit([], [(first, 3), (second, last)])
        vring.kick()
        ((_, written),) = vring.completions(60)
        room = 3 + last - 1
        assert counts == [min(room, 4), max(room - 4, 0)]
        assert written == room + 1
        assert session.memory.read(first, 3) == b"abc"
        assert session.memory.read(second, last) == b"abcdefgh"[3:room] + b"\x03"


def test_a_name_of_before_is_there_with_a_warning() -> None:
    import vhost_backend

    with pytest.warns(DeprecationWarning, match="Queue is called QueueInfo since 0.2"):
        assert vhost_backend.Queue is QueueInfo
