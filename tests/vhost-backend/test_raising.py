"""Whatever a device raises fails one request, is logged with its name, and ends nothing."""

import asyncio
import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vhost_backend import (
    BlockDevice,
    DeviceBackend,
    Listener,
    QueueInfo,
    Request,
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioDevice,
    VirtioFeature,
    Vring,
    VringMutex,
    VringRwLock,
    VringState,
    serve_async,
)
from vhost_backend.adapter.ring_worker import QueueWorker
from vhost_backend.devices.blk import S_IOERR, T_GET_ID
from vhost_backend.driver.block import DRIVER_FEATURES, BlockError
from vhost_backend.epoll_handler import MOST_FAILURES
from vhost_backend.errors import BackendUsageError
from vhost_backend.features import RING_FEATURES
from vhost_backend.testing import (
    BlockDriver,
    DriverSession,
    attached,
    expect_errors,
    served,
    serving,
)
from virtqueue import DONE, Batch, Chain, CHandler, EngineName

pytestmark = pytest.mark.usefixtures("every_flavour")

ESCAPES = [
    ValueError("wrong"),
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    pytest.fail.Exception("wrong"),
]


def named(error: BaseException) -> str:
    return type(error).__name__


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def answers(session: DriverSession, count: int, size: int = 8) -> list[tuple[int, int]]:
    """Completions of `count` requests that only have room for an answer, in their order."""
    vring = session.vrings[0]
    heads = [vring.submit([], [(session.allocate(size), size)]) for _ in range(count)]
    vring.kick()
    done: dict[int, int] = {}
    while len(done) < count:
        done.update(vring.completions(60))
    return [(position, done[head]) for position, head in enumerate(heads)]


class Raising(VirtioDevice):
    """Raises for the second request."""

    device_id = 42

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.served = 0

    def handle(self, queue: QueueInfo, request: Request) -> None:
        self.served += 1
        if self.served == 2:
            raise self.error
        request.write(b"ok")


class RaisingLater(Raising):
    async def handle(self, queue: QueueInfo, request: Request) -> None:  # type: ignore[override]
        super().handle(queue, request)


class RaisingBatch(Raising):
    def handle(self, queue: QueueInfo, request: Request) -> None:
        raise AssertionError

    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        self.served += 1
        if self.served == 1:
            raise self.error
        for chain in batch:
            chain.write(b"ok")
            DONE.pack_into(batch.done, chain.index * 8, chain.head, 0, 0, 2)


@pytest.mark.parametrize("error", ESCAPES, ids=named)
@pytest.mark.parametrize("kind", [Raising, RaisingLater])
def test_a_handler_fails_its_request_only(
    engine: EngineName, kind: type[Raising], error: BaseException
) -> None:
    with (
        expect_errors(rf"{kind.__name__} failed a request of queue 0\n(.|\n)*{named(error)}"),
        served(kind(error), engine=engine) as path,
    ):
        for expected in ([(0, 2), (1, 0), (2, 2)], [(0, 2), (1, 2), (2, 2)]):
            with DriverSession.connect(path) as session:
                assert answers(session, 3) == expected


@pytest.mark.parametrize("error", ESCAPES, ids=named)
def test_a_batch_handler_fails_its_batch_only(engine: EngineName, error: BaseException) -> None:
    with (
        expect_errors(f"RaisingBatch failed a request of queue 0\n(.|\n)*{named(error)}"),
        attached(RaisingBatch(error), engine=engine) as session,
    ):
        assert answers(session, 1) == [(0, 0)]
        assert answers(session, 3) == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("error", ESCAPES, ids=named)
def test_what_a_handler_in_c_leaves_may_raise_anything(image: Path, error: BaseException) -> None:
    class Disk(BlockDevice):
        python_types = frozenset((T_GET_ID,))

        def request(self, kind: int, offset: int, chain: Chain) -> tuple[int, int]:
            if kind == T_GET_ID:
                raise error
            return super().request(kind, offset, chain)

    with (
        expect_errors("disk.img failed a request"),
        attached(Disk(image), features=DRIVER_FEATURES) as session,
    ):
        driver = BlockDriver(session)
        for _ in range(2):
            with pytest.raises(BlockError) as refused:
                driver.get_id()
            assert refused.value.status == S_IOERR
            assert driver.read(0, 512) == bytes(512)


@pytest.mark.parametrize("error", ESCAPES, ids=named)
def test_a_handler_in_c_that_cannot_be_made(error: BaseException) -> None:
    class Hopeless(Raising):
        def batch_handler(self, queue: int) -> CHandler | None:
            raise error

    device = Hopeless(error)
    device.served = 2
    with expect_errors("Hopeless.batch_handler failed"), attached(device) as session:
        assert answers(session, 2) == [(0, 2), (1, 2)]


@pytest.mark.parametrize("status_byte", [False, True])
def test_more_written_than_there_is_room_for(engine: EngineName, status_byte: bool) -> None:
    class Greedy(VirtioDevice):
        device_id = 42
        served = 0

        def handle(self, queue: QueueInfo, request: Request) -> None:
            self.served += 1
            request.written = 9 if self.served == 2 else 2

    Greedy.status_byte = status_byte
    room = 8 - status_byte
    with (
        expect_errors(f"request.written is 9, but there is room for {room} bytes") as errors,
        attached(Greedy(), engine=engine) as session,
    ):
        done = answers(session, 4)
        assert done == [(n, 2 * (n != 1) + status_byte) for n in range(4)]
        assert answers(session, 1) == [(0, 2 + status_byte)]
        assert len(errors) == 1


def test_more_written_than_there_is_room_for_by_a_coroutine(engine: EngineName) -> None:
    class Greedy(VirtioDevice):
        device_id = 42
        served = 0

        async def handle(self, queue: QueueInfo, request: Request) -> None:
            self.served += 1
            request.written = 9 if self.served == 2 else 2

    with (
        expect_errors("Greedy failed(.|\n)*request.written is 9, but there is room for 8 bytes"),
        attached(Greedy(), engine=engine) as session,
    ):
        assert answers(session, 4) == [(0, 2), (1, 0), (2, 2), (3, 2)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((9, 0, 0, 9), r"done\[1\] names chain \d+ instead of"),
        ((None, 0, 0, 9), r"done\[1\] says 9 bytes written, but there is room for 8"),
    ],
)
@pytest.mark.parametrize("in_order", [False, True])
def test_a_batch_that_is_filled_in_wrongly_fails_there_only(
    engine: EngineName, entry: tuple[int | None, int, int, int], message: str, in_order: bool
) -> None:
    class Wrong(VirtioDevice):
        device_id = 42
        served = 0

        def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
            for chain in batch:
                self.served += 1
                head, *rest = entry
                if self.served == 2:
                    values = [chain.head if head is None else chain.head + head, *rest]
                else:
                    values = [chain.head, 0, 0, 2]
                DONE.pack_into(batch.done, chain.index * 8, *values)

    features = VirtioFeature.VERSION_1 | (VirtioFeature.IN_ORDER if in_order else 0)
    with (
        expect_errors(message) as errors,
        attached(Wrong(), engine=engine, features=features) as session,
    ):
        assert answers(session, 4) == [(0, 2), (1, 0), (2, 2), (3, 2)]
        assert answers(session, 1) == [(0, 2)]
        assert len(errors) == 1


# -- back-ends that take by themselves ----------------------------------------------------------


class Taking(VhostUserBackendBase):
    """Takes all there is; raises at the chain that is too short, as a packet without a header."""

    def __init__(self, take: str) -> None:
        self.take = take

    def num_queues(self) -> int:
        return 1

    def features(self) -> int:
        return int(RING_FEATURES)

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        with vrings[0].get_mut() as state:
            batch = getattr(state, self.take)(64)
            for chain in batch or ():
                if chain.writable_length < 12:
                    sys.exit("a packet without a header")
                state.add_used(chain, 12)
            state.signal_used_queue()
        return bool(batch)


@pytest.mark.parametrize("take", ["take", "cycle"])
@pytest.mark.parametrize("packed", [False, True])
def test_chains_of_a_back_end_that_raises_go_back(
    engine: EngineName, take: str, packed: bool
) -> None:
    with (
        expect_errors("the back-end failed on queue 0"),
        served(Taking(take), engine=engine) as path,
    ):
        for _ in range(2):
            with DriverSession.connect(path, packed=packed) as session:
                vring = session.vrings[0]
                lengths = (16, 16, 4, 16, 16)
                heads = [vring.submit([], [(session.allocate(n), n)]) for n in lengths]
                vring.kick()
                done: dict[int, int] = {}
                while len(done) < 5:
                    done.update(vring.completions(60))
                assert [done[head] for head in heads] == [12, 12, 0, 0, 0]
                assert answers(session, 2, 16) == [(0, 12), (1, 12)]
                session.stop_ring(0)


# -- hooks --------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[DriverSession], object]] = {
    "acked_features": lambda session: None,
    "started": lambda session: None,
    "update_memory": lambda session: None,
    "get_config": lambda session: session.frontend.get_config(0, 4),
    "set_config": lambda session: session.frontend.set_config(0, b"abcd"),
    "reset": lambda session: session.frontend.reset_device(),
    "stopped": lambda session: session.stop_ring(0),
}


@pytest.mark.parametrize("error", ESCAPES, ids=named)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_costs_no_other_front_end(hook: str, error: BaseException) -> None:
    fails = [True]

    def raising(self: VirtioDevice, *arguments: object) -> Any:
        if fails:
            raise error
        return getattr(VirtioDevice, hook)(self, *arguments)

    kind = type("Hooked", (Raising,), {hook: raising, "config": b"abcd"})
    device = kind(error)
    device.served = 2
    with expect_errors(named(error)), served(device) as path:
        # Only a device that fails to stop costs its front-end nothing.
        costs = hook != "stopped" or not isinstance(error, Exception)
        with (
            contextlib.suppress(*[Exception] * costs),
            DriverSession.connect(path, timeout=60) as session,
        ):
            HOOKS[hook](session)
        fails.clear()
        with DriverSession.connect(path, timeout=60) as session:
            assert answers(session, 2) == [(0, 2), (1, 2)]
            session.stop_ring(0)


def test_a_device_that_does_not_stop_is_stopped_all_the_same() -> None:
    class Stubborn(Raising):
        def stopped(self) -> None:
            raise OSError("no")

    device = Stubborn(ValueError())
    device.served = 2
    with expect_errors("Stubborn: the device has failed to stop"), attached(device) as session:
        assert answers(session, 2) == [(0, 2), (1, 2)]
        assert session.stop_ring(0) == 2


# -- listeners ----------------------------------------------------------------------------------


def test_a_listener_calls_its_callback_on_any_daemon(tmp_path: Path) -> None:
    for make in (lambda: DeviceBackend.of(Raising(ValueError())), lambda: Taking("take")):
        seen: list[int] = []
        fd = os.eventfd(1)
        with VhostUserDaemon("test", make()) as daemon:
            (worker,) = daemon.get_epoll_handlers()

            def read(events: int, fd: int = fd, seen: list[int] = seen) -> None:
                os.eventfd_read(fd)
                seen.append(events)

            worker.register_listener(fd, select.EPOLLIN, callback=read)
            until(lambda seen=seen: seen, "nobody was called")  # type: ignore[misc]
            os.eventfd_write(fd, 1)
            until(lambda seen=seen: len(seen) == 2, "called once only")  # type: ignore[misc]
            worker.unregister_listener(fd)
        assert seen == [select.EPOLLIN] * 2
        os.close(fd)


@pytest.mark.parametrize("kind", [Raising, RaisingLater])
def test_a_listener_calls_its_device(kind: type[Raising]) -> None:
    class Listening(kind):  # type: ignore[misc, valid-type]
        def handle_event(self, data: int, events: int) -> None:
            os.eventfd_read(fd)
            seen.append((data, events, threading.current_thread().name))

    seen: list[tuple[int, int, str]] = []
    fd = os.eventfd(1)
    with VhostUserDaemon("test", DeviceBackend.of(Listening(ValueError()))) as daemon:
        (worker,) = daemon.get_epoll_handlers()
        worker.register_listener(fd, select.EPOLLIN, 9)
        until(lambda: seen, "nobody was called")
        worker.unregister_listener(fd)
    assert seen == [(9, select.EPOLLIN, "test-0")]
    os.close(fd)


def test_a_listener_without_an_owner_is_refused() -> None:
    fd = os.eventfd(0)
    with VhostUserDaemon("test", DeviceBackend.of(Raising(ValueError()))) as daemon:
        (worker,) = daemon.get_epoll_handlers()
        with pytest.raises(BackendUsageError, match=r"Raising has no handle_event"):
            worker.register_listener(fd, select.EPOLLIN, 9)
        with pytest.raises(BackendUsageError, match="data 0 could be a queue's index"):
            worker.register_listener(fd, select.EPOLLIN, 0)
        with pytest.raises(BackendUsageError, match="data None"):
            worker.register_listener(fd, select.EPOLLIN)
        callback: Any = 5
        with pytest.raises(BackendUsageError, match="callback is 5"):
            worker.register_listener(fd, select.EPOLLIN, callback=callback)
    os.close(fd)


@pytest.mark.parametrize("error", ESCAPES, ids=named)
def test_a_listener_that_only_fails_does_not_keep_its_worker(error: BaseException) -> None:
    """What it does not read stays ready: the worker would call it and do nothing else."""
    calls: list[int] = []

    def fail(events: int) -> None:
        calls.append(events)
        raise error

    fd = os.eventfd(1)
    device = Raising(error)
    device.served = 2
    with expect_errors() as errors, VhostUserDaemon("test", DeviceBackend.of(device)) as daemon:
        (worker,) = daemon.get_epoll_handlers()
        worker.register_listener(fd, select.EPOLLIN, callback=fail)
        until(lambda: any("not watched any more" in text for text in errors), "it goes on")
        assert len(calls) == MOST_FAILURES
        assert not worker._listeners, "the worker serves its queue the long way for ever"
        worker.unregister_listener(fd)
        with pytest.raises(BackendUsageError, match="not a listener"):
            worker.unregister_listener(fd)
        # Registered anew it has its chance again.
        worker.register_listener(fd, select.EPOLLIN, callback=lambda _: os.eventfd_read(fd))
        until(lambda: not select.select([fd], [], [], 0)[0], "it is not watched again")
    os.close(fd)


def test_a_listeners_descriptor_that_is_closed_too_early_ends_no_worker() -> None:
    fd = os.eventfd(0)
    device = Raising(ValueError())
    with (
        expect_errors(f"descriptor {fd} was closed before it was unregistered") as errors,
        VhostUserDaemon("test", DeviceBackend.of(device), vring=VringMutex) as daemon,
    ):
        (worker,) = daemon.get_epoll_handlers()
        assert isinstance(worker, QueueWorker)
        worker.register_listener(fd, select.EPOLLIN, callback=lambda events: None)
        os.close(fd)
        worker._show_again()  # what the worker does after it has served its queue from C
        assert len(errors) == 1
        worker.unregister_listener(fd)


class CancelsItself(VirtioDevice):
    """Cancels the task of its second request, and keeps the third."""

    def __init__(self) -> None:
        self.seen = 0
        self.kept: list[asyncio.Task[Any]] = []

    async def handle(self, queue: QueueInfo, request: Request) -> None:
        self.seen += 1
        task = asyncio.current_task()
        assert task is not None
        if self.seen == 2:
            task.cancel()
            await asyncio.sleep(0)
        if self.seen == 3:
            self.kept.append(task)
            await asyncio.sleep(3600)
        if self.seen == 4:
            self.kept.pop().cancel()
        request.write(b"ok")


def test_a_device_that_cancels_its_own_coroutine_fails_that_request() -> None:
    with expect_errors("CancelsItself") as errors, attached(CancelsItself()) as session:
        assert answers(session, 4) == [(0, 2), (1, 0), (2, 0), (3, 2)]
    assert len(errors) == 2


def test_in_a_loop_a_device_that_cancels_its_own_coroutine_fails_that_request(
    tmp_path: Path,
) -> None:
    def use() -> None:
        with DriverSession.connect(tmp_path / "s", timeout=60) as session:
            assert answers(session, 4) == [(0, 2), (1, 0), (2, 0), (3, 2)]

    with expect_errors("CancelsItself") as errors:
        in_loop(CancelsItself(), tmp_path / "s", use)
    assert len(errors) == 2


# -- workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Raising, RaisingLater])
def test_a_worker_that_cannot_go_on_ends_its_daemon(tmp_path: Path, kind: type[Raising]) -> None:
    with (
        expect_errors("worker test-0 has ended") as errors,
        VhostUserDaemon("test", DeviceBackend.of(kind(ValueError()))) as daemon,
    ):
        (worker,) = daemon.get_epoll_handlers()

        def fail(timeout: float | None) -> float | None:
            raise SystemExit("no more")

        worker._round = fail  # type: ignore[method-assign]
        worker.wake()
        with pytest.raises(SystemExit, match="no more"):
            daemon.serve_forever(tmp_path / "socket")
        assert errors


def in_loop(device: VirtioDevice, path: Path, use: Callable[[], object]) -> None:
    """Serve `device` in a loop of this thread's until `use`, on another, has ended."""

    async def main() -> None:
        ready = asyncio.Event()
        task = asyncio.create_task(serve_async(device, path, ready=ready.set))
        await ready.wait()
        user = asyncio.create_task(asyncio.to_thread(use))
        await asyncio.wait({task, user}, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await user

    asyncio.run(main())


@pytest.mark.parametrize("kind", [Raising, RaisingLater])
@pytest.mark.parametrize("error", [asyncio.CancelledError(), pytest.fail.Exception("x")], ids=named)
def test_in_a_loop_a_handler_fails_its_request_only(
    tmp_path: Path, kind: type[Raising], error: BaseException
) -> None:
    def use() -> None:
        with DriverSession.connect(tmp_path / "socket", timeout=60) as session:
            assert answers(session, 3) == [(0, 2), (1, 0), (2, 2)]

    with expect_errors(f"{kind.__name__} failed a request"):
        in_loop(kind(error), tmp_path / "socket", use)


@pytest.mark.parametrize("kind", [Raising, RaisingLater])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=named)
def test_in_a_loop_a_handler_may_end_the_daemon(
    tmp_path: Path, kind: type[Raising], error: BaseException
) -> None:
    """The request is failed, the daemon ends, and the device is closed."""
    closed: list[bool] = []
    done: list[tuple[int, int]] = []

    class Closing(kind):  # type: ignore[misc, valid-type]
        def close(self) -> None:
            closed.append(True)

    def use() -> None:
        with DriverSession.connect(tmp_path / "socket", timeout=60) as session:
            done.extend(answers(session, 3))

    with expect_errors("Closing failed a request"), pytest.raises(type(error)):
        in_loop(Closing(error), tmp_path / "socket", use)
    assert closed == [True]
    until(lambda: done, "the requests were not completed")
    assert done == [(0, 2), (1, 0), (2, 2)]


# -- the reference's own loop, and vrings that a thread has already -----------------------------


class Reference(VhostUserBackendBase):
    """The loop of the reference's documentation."""

    event_idx = False

    def num_queues(self) -> int:
        return 1

    def features(self) -> int:
        return int(VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX)

    def set_event_idx(self, enabled: bool) -> None:
        self.event_idx = enabled

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        vring = vrings[0]
        with vring.get_mut() as state:
            batch = state.take(64)
            for chain in batch or ():
                state.add_used(chain, 0)
        if not self.event_idx or vring.needs_notification():
            vring.signal_used_queue()
        return bool(batch)


class Inside(Reference):
    """The same with the operations of the vring while its state is held."""

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        vring = vrings[0]
        with vring.get_mut() as state:
            batch = state.take(64)
            for chain in batch or ():
                vring.add_used(chain, 0)
            with vring.get_ref() as again:
                assert again is state
            if not self.event_idx or vring.needs_notification():
                vring.signal_used_queue()
        return bool(batch)


class SignalOnly(Reference):
    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        with vrings[0].get_mut() as state:
            batch = state.take(64)
            for chain in batch or ():
                state.add_used(chain, 0)
            state.signal_used_queue()
        return bool(batch)


@pytest.mark.parametrize("kind", [Reference, Inside, SignalOnly])
@pytest.mark.parametrize("flavour", [VringMutex, VringRwLock])
@pytest.mark.parametrize("event_idx", [False, True])
def test_the_references_loop_signals(
    tmp_path: Path,
    engine: EngineName,
    kind: type[Reference],
    flavour: type[VringMutex] | type[VringRwLock],
    event_idx: bool,
) -> None:
    features = VirtioFeature.VERSION_1 | (VirtioFeature.EVENT_IDX if event_idx else 0)
    with (
        Listener(tmp_path / "socket") as listener,
        VhostUserDaemon("test", kind(), engine=engine, vring=flavour) as daemon,
        serving(daemon, listener),
        DriverSession.connect(tmp_path / "socket", features=features) as session,
    ):
        vring = session.vrings[0]
        buffer = session.allocate(8)
        for _ in range(50):
            vring.submit([(buffer, 8)], [])
            vring.kick()
            # Raises when completions came without the signal that was asked for.
            assert len(vring.completions(60)) == 1


def test_a_signal_that_is_owed_is_not_lost_with_the_ring() -> None:
    """Between `needs_notification` and `signal_used_queue` the ring may be stopped."""
    taken = threading.Event()
    go_on = threading.Event()

    class Slow(Reference):
        def handle_event(
            self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
        ) -> bool:
            with vrings[0].get_mut() as state:
                chains = list(state.take(64) or ())
                for chain in chains:
                    state.add_used(chain, 0)
            if vrings[0].needs_notification():
                taken.set()
                assert go_on.wait(60)
                vrings[0].signal_used_queue()
            return False

    with attached(Slow()) as session:
        vring = session.vrings[0]
        vring.submit([(session.allocate(8), 8)], [])
        vring.kick()
        assert taken.wait(60)
        session.stop_ring(0)
        signalled = select.select([vring.call_fd], [], [], 0)[0]
        go_on.set()
        assert signalled


def test_changing_a_vring_that_the_thread_reads_raises_at_once() -> None:
    vring = VringRwLock(VringState(3))
    with (
        vring.get_ref(),
        vring.get_ref(),
        pytest.raises(BackendUsageError, match="this thread reads vring 3"),
    ):
        vring.set_enabled(True)
    vring.set_enabled(True)
    with vring.get_mut() as state, vring.get_mut(), vring.get_ref():
        assert state.enabled


def test_a_reader_that_comes_again_does_not_wait_for_a_writer_that_waits_for_it() -> None:
    vring = VringRwLock(VringState())
    writer = threading.Thread(target=vring.set_enabled, args=(True,), daemon=True)
    with vring.get_ref():
        writer.start()
        until(lambda: vring._writers_waiting, "no writer waits")
        with vring.get_ref() as state:
            assert not state.enabled
    writer.join(60)
    assert not writer.is_alive()
    assert state.enabled
