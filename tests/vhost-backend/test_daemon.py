"""The methods of a daemon mean what the reference's do: start, wait, serve; and serve_forever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import vhost_protocol as vp
from vhost_backend import (
    AsyncDaemon,
    BackendUsageError,
    BlockDevice,
    DeviceBackend,
    Listener,
    ListenError,
    QueueInfo,
    Request,
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioDevice,
    Vring,
    WakeFd,
    serve_async,
)
from vhost_backend.adapter.coroutines import AsyncDeviceBackend
from vhost_backend.control import unshared
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import DriverSession, SessionError

PATIENCE = 60.0
WRONG = struct.pack("<III", 9999, 1, 0)


class Echo(VirtioDevice):
    device_id = 40

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())


def make() -> VhostUserDaemon:
    return VhostUserDaemon("test", DeviceBackend.of(Echo()))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def answered(session: DriverSession) -> bool:
    vring = session.vrings[0]
    vring.submit([], [(session.allocate(4), 4)])
    vring.kick()
    return len(vring.completions(PATIENCE)) == 1


@contextlib.contextmanager
def user(path: Path, use: Callable[[DriverSession], object] = answered) -> Iterator[None]:
    """A driver that connects as soon as there is somebody, on another thread."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            until(path.exists, "there is no socket")
            with DriverSession.connect(path, timeout=PATIENCE) as session:
                use(session)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


def break_a_rule(session: DriverSession) -> None:
    session.frontend.send_raw(WRONG)
    with contextlib.suppress(vp.ProtocolError, OSError):
        session.frontend.get_features()


def test_start_takes_one_front_end_and_wait_is_for_its_end(tmp_path: Path) -> None:
    with make() as daemon, Listener(tmp_path / "s") as listener:
        for _ in range(3):
            with user(tmp_path / "s"):
                daemon.start(listener)
                daemon.wait()
            assert not daemon.connected
            daemon.wait()


def test_start_returns_with_a_front_end_that_is_served(tmp_path: Path) -> None:
    with make() as daemon:
        with Listener(tmp_path / "s") as listener, socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "s"))
            daemon.start(listener)
            theirs = sock.dup()
        # The listener may be closed, as only one front-end is taken.
        with DriverSession(vp.Frontend(theirs, timeout=PATIENCE)) as session:
            assert answered(session)
            with pytest.raises(BackendUsageError, match="already"):
                daemon.start_client(tmp_path / "other")
        daemon.wait()


def test_wait_raises_once_what_ended_the_connection(tmp_path: Path) -> None:
    with make() as daemon, Listener(tmp_path / "s") as listener:
        with user(tmp_path / "s", break_a_rule):
            daemon.start(listener)
            with pytest.raises(vp.RemoteProtocolError, match="0x270f"):
                daemon.wait()
        daemon.wait()
        # The next one is served as if nothing had been.
        with user(tmp_path / "s"):
            daemon.start(listener)
            daemon.wait()


def test_wait_before_start_is_a_mistake() -> None:
    with make() as daemon, pytest.raises(BackendUsageError, match="was not started"):
        daemon.wait()


def test_shutdown_ends_a_start_that_waits(tmp_path: Path) -> None:
    with make() as daemon, Listener(tmp_path / "s") as listener:
        threading.Timer(0.05, daemon.shutdown).start()
        daemon.start(listener)
        daemon.wait()


class Raw(VhostUserBackendBase):
    """Two workers, with exit events of its own."""

    def __init__(self) -> None:
        self.exits = [WakeFd(), WakeFd()]

    def num_queues(self) -> int:
        return 2

    def queues_per_thread(self) -> Sequence[int]:
        return [1, 2]

    def exit_event(self, thread_index: int) -> WakeFd:
        return self.exits[thread_index]

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        return False


def raised(event: WakeFd) -> bool:
    return bool(select.select([event.fd], [], [], 0)[0])


def test_serve_takes_one_front_end_and_ends_the_workers(tmp_path: Path) -> None:
    backend = Raw()
    daemon = VhostUserDaemon("test", backend)

    def look(session: DriverSession) -> None:
        assert not any(map(raised, backend.exits))

    with user(tmp_path / "s", look):
        daemon.serve(tmp_path / "s")
    assert all(map(raised, backend.exits))
    assert not (tmp_path / "s").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]
    with pytest.raises(BackendUsageError, match="closed"):
        daemon.serve(tmp_path / "s")
    for event in backend.exits:
        event.close()


def test_serve_raises_what_ended_the_connection(tmp_path: Path) -> None:
    with user(tmp_path / "s", break_a_rule), pytest.raises(vp.RemoteProtocolError):
        make().serve(tmp_path / "s")
    with pytest.raises(ListenError):
        make().serve(tmp_path / "missing" / "s")


def test_serve_forever_takes_one_after_another_until_shutdown(tmp_path: Path) -> None:
    daemon = make()

    def use() -> None:
        until((tmp_path / "s").exists, "there is no socket")
        for use in (answered, break_a_rule, answered):
            with DriverSession.connect(tmp_path / "s", timeout=PATIENCE) as session:
                use(session)
        daemon.shutdown()

    thread = threading.Thread(target=use)
    thread.start()
    daemon.serve_forever(tmp_path / "s")
    thread.join(PATIENCE)
    assert not (tmp_path / "s").exists()
    daemon.close()


PROGRAM = """
import sys
from vhost_backend import DeviceBackend, VhostUserDaemon, VirtioDevice
class Echo(VirtioDevice):
    device_id = 40
    def handle(self, queue, request): request.write(request.read())
with VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon:
    try:
        daemon.serve_forever(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(3)
"""


@pytest.mark.parametrize("attached", [False, True])
def test_ctrl_c_ends_serve_forever_on_the_main_thread(tmp_path: Path, attached: bool) -> None:
    path = tmp_path / "s"
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)]) as process:
        try:
            until(path.exists, "there is no socket")
            with contextlib.ExitStack() as stack:
                if attached:
                    assert answered(
                        stack.enter_context(DriverSession.connect(path, timeout=PATIENCE))
                    )
                process.send_signal(signal.SIGINT)
                assert process.wait(PATIENCE) == 3
        finally:
            process.kill()
    assert not path.exists()


def test_no_threads_before_there_is_something_to_do(tmp_path: Path) -> None:
    before = threading.enumerate()
    daemon = make()
    assert threading.enumerate() == before
    daemon.close()


def test_who_serves_cannot_wait_for_its_own_end(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    class Closes(Echo):
        def started(self) -> None:
            try:
                daemon.close()
            except BackendUsageError as error:
                errors.append(error)

    with VhostUserDaemon("test", DeviceBackend.of(Closes())) as daemon:
        ours, theirs = socket.socketpair()
        daemon.start_connection(ours)
        with DriverSession(vp.Frontend(theirs, timeout=PATIENCE)) as session:
            assert answered(session)
    assert len(errors) == 1


def test_close_right_after_start_finds_the_thread_that_has_not_run_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_run = threading.Event()
    work = VhostUserDaemon._work

    def late(self: VhostUserDaemon, *args: object) -> None:
        assert may_run.wait(PATIENCE)
        work(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(VhostUserDaemon, "_work", late)

    def shutdown() -> None:
        may_run.set()
        VhostUserDaemon.shutdown(daemon)

    daemon = make()
    ours, theirs = socket.socketpair()
    with theirs:
        daemon.start_connection(ours)
        monkeypatch.setattr(daemon, "shutdown", shutdown)
        daemon.close()
    daemon.wait()


def test_a_thread_that_cannot_start_leaves_the_daemon_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "test-control":
            raise RuntimeError("can't start new thread")
        start(thread)

    with make() as daemon:
        ours, theirs = socket.socketpair()
        with monkeypatch.context() as patch, theirs:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match="new thread"):
                daemon.start_connection(ours)
            assert ours.fileno() < 0
            with pytest.raises(BackendUsageError, match="not started"):
                daemon.wait()
        ours, theirs = socket.socketpair()
        daemon.start_connection(ours)
        with DriverSession(vp.Frontend(theirs, timeout=PATIENCE)) as session:
            assert answered(session)
        daemon.wait()


def test_serve_that_cannot_begin_ends_nothing(tmp_path: Path) -> None:
    with make() as daemon:
        with pytest.raises(ListenError):
            daemon.serve(tmp_path / "missing" / "s")
        ours, theirs = socket.socketpair()
        daemon.start_connection(ours)
        with DriverSession(vp.Frontend(theirs, timeout=PATIENCE)) as session:
            with pytest.raises(BackendUsageError, match="already"):
                daemon.serve(tmp_path / "s")
            assert answered(session)
        daemon.wait()


def test_a_worker_cannot_wait_for_its_own_end() -> None:
    errors: list[BaseException] = []

    class Closes(Echo):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            for wait in (daemon.close, daemon.wait):
                try:
                    wait()
                except BackendUsageError as error:
                    errors.append(error)

    with VhostUserDaemon("test", DeviceBackend.of(Closes())) as daemon:
        ours, theirs = socket.socketpair()
        daemon.start_connection(ours)
        with DriverSession(vp.Frontend(theirs, timeout=PATIENCE)) as session:
            assert answered(session)
    assert len(errors) == 2


class Later(Raw):
    """Completes what it has taken when a descriptor beside the queues says so."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        with vrings[0].get_mut() as state:
            if device_event == 0:
                # A queue is looked at more often than it is kicked.
                self.taken += [chain.head for chain in state.available()]
            else:
                for head in self.taken:
                    state.add_used(head, 0)
                state.signal_used_queue()
        return False


def test_an_interrupted_serve_lets_workers_end_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Later()
    daemon = VhostUserDaemon("test", backend)
    done, interrupt = WakeFd(), threading.Event()
    daemon.get_epoll_handlers()[0].register_listener(done.fd, select.EPOLLIN | select.EPOLLET, 9)

    def work(session: DriverSession) -> None:
        vring = session.vrings[0]
        vring.submit([], [(session.allocate(4), 4)])
        vring.kick()
        until(lambda: backend.taken, "nothing was taken")
        interrupt.set()
        until(lambda: daemon._stopping, "the daemon does not end")
        done.wake()
        assert len(vring.completions(PATIENCE)) == 1

    def interrupted() -> None:
        assert interrupt.wait(PATIENCE)
        raise KeyboardInterrupt

    monkeypatch.setattr(daemon, "wait", interrupted)
    with user(tmp_path / "s", work), pytest.raises(KeyboardInterrupt):
        daemon.serve(tmp_path / "s")
    for event in (done, *backend.exits):
        event.close()


def test_start_says_that_nobody_can_connect(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with make() as daemon, Listener(tmp_path / "s") as closed:
        closed.close()
        with pytest.raises(BackendUsageError, match="listener is closed"):
            daemon.start(closed)
        with Listener.from_fd(ours.detach()) as connected:
            daemon.start(connected)
            daemon.wait()
            with pytest.raises(BackendUsageError, match="listener is closed"):
                daemon.start(connected)
        daemon.shutdown()
        daemon.start(closed)  # the daemon ends, whatever the listener does


def test_shutdown_ends_a_start_that_another_daemon_was_faster_than(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are told of one connection that waits; the other one has it."""
    with make() as daemon, Listener(tmp_path / "s") as listener:
        wait_readable, told = daemon._wait_readable, threading.Event()

        def too_late(fd: int) -> bool:
            if told.is_set():
                return wait_readable(fd)
            told.set()
            return True

        monkeypatch.setattr(daemon, "_wait_readable", too_late)
        thread = threading.Thread(target=daemon.start, args=(listener,), daemon=True)
        thread.start()
        assert told.wait(PATIENCE)
        daemon.shutdown()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_signal_ends_serve_forever_also_with_a_front_end(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    """Ctrl-C, or a handler that calls sys.exit, on the thread that serves."""
    main = threading.get_ident()
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers run on the main thread")

    def end(number: int, frame: object) -> None:
        raise kind

    def use(session: DriverSession) -> None:
        assert answered(session)
        signal.pthread_kill(main, signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, end)
    try:
        with make() as daemon, user(tmp_path / "s", use), pytest.raises(kind):
            daemon.serve_forever(tmp_path / "s")
    finally:
        signal.signal(signal.SIGUSR2, before)


# -- the same in an event loop -------------------------------------------------------------------


def in_loop(use: Callable[[AsyncDaemon], object], device: VirtioDevice | None = None) -> None:
    async def main() -> None:
        async with AsyncDaemon("test", DeviceBackend.of(device or Echo())) as daemon:
            result = use(daemon)
            if asyncio.iscoroutine(result):
                await result

    asyncio.run(main())


def test_in_a_loop_serve_takes_one_front_end(tmp_path: Path) -> None:
    with user(tmp_path / "s"):
        in_loop(lambda daemon: daemon.serve(tmp_path / "s"))
    assert not (tmp_path / "s").exists()
    with user(tmp_path / "s", break_a_rule), pytest.raises(vp.RemoteProtocolError):
        in_loop(lambda daemon: daemon.serve(tmp_path / "s"))


def test_in_a_loop_another_front_end_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(daemon: AsyncDaemon) -> None:
        task = asyncio.create_task(daemon.serve_forever(tmp_path / "s"))
        await asyncio.to_thread(use)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def use() -> None:
        until((tmp_path / "s").exists, "there is no socket")
        with DriverSession.connect(tmp_path / "s", timeout=PATIENCE) as session:
            assert answered(session)
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(str(tmp_path / "s"))
                until(lambda: "another front-end has connected" in caplog.text, "not a word")
            assert answered(session)
        # It has gone, so that the next one's turn comes.
        with DriverSession.connect(tmp_path / "s", timeout=PATIENCE) as session:
            assert answered(session)

    in_loop(serve)
    assert caplog.text.count("another front-end has connected") == 1


def test_in_a_loop_memory_that_is_not_shared_is_told_of(
    tmp_path: Path, image: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unshared, "DELAY", 0.2)

    async def serve(daemon: AsyncDaemon) -> None:
        task = asyncio.create_task(daemon.serve_forever(tmp_path / "s"))
        await asyncio.to_thread(use)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def use() -> None:
        until((tmp_path / "s").exists, "there is no socket")
        with DriverSession.connect(tmp_path / "s", timeout=PATIENCE, features=DRIVER_FEATURES):
            until(lambda: "its memory is not shared" in caplog.text, "not a word")

    with contextlib.closing(BlockDevice(image)) as device, caplog.at_level(logging.WARNING):
        in_loop(serve, device)


class EchoInLoop(VirtioDevice):
    device_id = 40

    async def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())


def served_without_a_kick(session: DriverSession) -> bool:
    """Whether a worker finds a request by itself: it looks on after one that was kicked."""
    assert answered(session)
    vring = session.vrings[0]
    vring.submit([], [(session.allocate(4), 4)])
    wanted = vring.queue.publish()
    try:
        return len(vring.completions(0.5)) == 1
    except SessionError:
        assert wanted
        os.eventfd_write(vring.kick_fd, 1)
        assert len(vring.completions(PATIENCE)) == 1
        return False


def looks_on(session: DriverSession) -> None:
    # A worker looks for a second at the most, and this thread may sleep as long on a busy machine.
    until(lambda: served_without_a_kick(session), "no worker looks on")


def test_busy_poll_with_coroutines_on_a_thread(tmp_path: Path) -> None:
    device = DeviceBackend.of(EchoInLoop())
    with VhostUserDaemon("test", device, busy_poll=0.99) as daemon, user(tmp_path / "s", looks_on):
        daemon.serve(tmp_path / "s")


def test_busy_poll_in_a_loop_leaves_other_tasks_their_turns(tmp_path: Path) -> None:
    turns = 0

    async def main() -> None:
        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        device = DeviceBackend.of(Echo())
        async with AsyncDaemon("test", device, busy_poll=0.99) as daemon:
            counting = asyncio.create_task(count())
            await daemon.serve(tmp_path / "s")
            counting.cancel()

    with user(tmp_path / "s", looks_on):
        asyncio.run(main())
    assert turns > 10


def test_no_look_without_busy_poll(tmp_path: Path) -> None:
    def use(session: DriverSession) -> None:
        assert not any(served_without_a_kick(session) for _ in range(3))

    with user(tmp_path / "s", use):
        in_loop(lambda daemon: daemon.serve(tmp_path / "s"))


def test_in_a_loop_the_processors_are_the_threads_until_the_end(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    cpu = min(before)

    async def main() -> None:
        def ready() -> None:
            assert os.sched_getaffinity(0) == {cpu}
            asyncio.get_running_loop().call_soon(serving.cancel)

        serving = asyncio.create_task(
            serve_async(EchoInLoop(), tmp_path / "s", cpus=[cpu], ready=ready)
        )
        await asyncio.gather(serving, return_exceptions=True)
        assert os.sched_getaffinity(0) == before
        with pytest.raises(BackendUsageError, match="4095"):
            await serve_async(EchoInLoop(), tmp_path / "s", cpus=[4095])

    asyncio.run(main())


def test_in_a_loop_the_counters_are_served_to_prometheus(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")

    def scrape() -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(tmp_path / "m"))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()

    async def main() -> None:
        ready = asyncio.Event()
        serving = asyncio.create_task(
            serve_async(EchoInLoop(), tmp_path / "s", metrics=f"unix:{tmp_path}/m", ready=ready.set)
        )
        await ready.wait()
        text = await asyncio.to_thread(scrape)
        assert 'device="EchoInLoop"' in text
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(main())
    assert not (tmp_path / "m").exists()


def test_in_a_loop_one_task_serves_until_the_daemon_is_closed(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncDaemon("test", DeviceBackend.of(Echo())) as daemon:
            first, second = socket.socketpair(), socket.socketpair()
            serving = asyncio.create_task(daemon.serve_connection(first[0]))
            await asyncio.sleep(0)
            for attempt in (daemon.serve_connection(second[0]), daemon.serve(tmp_path / "s")):
                with pytest.raises(BackendUsageError, match="already"):
                    await attempt
            assert second[1].recv(1) == b""

            def use() -> None:
                with DriverSession(vp.Frontend(first[1], timeout=PATIENCE)) as session:
                    assert answered(session)

            await asyncio.to_thread(use)
            await serving
            second[1].close()
        with pytest.raises(BackendUsageError, match="closed"):
            await daemon.serve(tmp_path / "s")
        with pytest.raises(BackendUsageError, match="closed"):
            await daemon.__aenter__()

    asyncio.run(main())


def test_in_a_loop_serve_that_cannot_listen_ends_nothing(tmp_path: Path) -> None:
    async def use(daemon: AsyncDaemon) -> None:
        with pytest.raises(ListenError):
            await daemon.serve(tmp_path / "missing" / "s")
        await daemon.serve(tmp_path / "s")

    with user(tmp_path / "s"):
        in_loop(use)


def test_in_a_loop_a_failed_worker_leaves_the_task_uncancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(daemon: AsyncDaemon) -> None:
        def fail(timeout: float | None) -> float | None:
            raise OSError("the worker cannot go on")

        task = asyncio.current_task()
        assert task is not None
        worker = daemon.get_epoll_handlers()[0]
        monkeypatch.setattr(worker, "_round", fail)
        asyncio.get_running_loop().call_soon(worker.wake)
        with pytest.raises(OSError, match="cannot go on"):
            await daemon.serve_forever(tmp_path / "s")
        assert not task.cancelling()
        with pytest.raises(ExceptionGroup):
            await grouped()

    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(refuse())
            await asyncio.sleep(PATIENCE)

    async def refuse() -> None:
        raise ValueError

    in_loop(use)


def test_in_a_loop_a_cancellation_counts_though_a_worker_fails(tmp_path: Path) -> None:
    async def use(daemon: AsyncDaemon) -> None:
        serving = asyncio.create_task(daemon.serve_forever(tmp_path / "s"))
        await asyncio.sleep(0)
        serving.cancel()
        daemon._worker_failed(OSError("the worker cannot go on"))
        with pytest.raises(asyncio.CancelledError):
            await serving

    in_loop(use)


def test_a_device_forgets_a_loop_with_its_daemon(tmp_path: Path) -> None:
    """It may be served in one loop after another, and none is to stay because of it."""
    backend = DeviceBackend.of(EchoInLoop())
    assert isinstance(backend, AsyncDeviceBackend)

    async def main() -> None:
        async with AsyncDaemon("test", backend) as daemon:
            await daemon.serve(tmp_path / "s")

    for _ in range(2):
        with user(tmp_path / "s"):
            asyncio.run(main())
        assert not backend.hosts
    with VhostUserDaemon("test", backend) as daemon, user(tmp_path / "s"):
        daemon.serve(tmp_path / "s")
    assert not backend.hosts
