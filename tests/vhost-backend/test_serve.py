"""Several devices in one process, and a device in somebody's event loop."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from guest_memory import GuestAddress
from vhost_backend import (
    AsyncDaemon,
    BlockDevice,
    DeviceBackend,
    Listener,
    ListenError,
    QueueInfo,
    Request,
    VhostUserDaemon,
    VirtioDevice,
    serve_all,
    serve_async,
)
from vhost_backend.daemon.serve import _Bell, _Serving, _wait_for_all
from vhost_backend.devices.blk import F_FLUSH
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import BlockWorkload, DriverSession, Migration
from virtqueue import EngineName


class Echo(VirtioDevice):
    device_id = 40

    def __init__(self, prefix: bytes = b"") -> None:
        self.prefix = prefix
        self.closed = False

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(self.prefix + request.read())

    def close(self) -> None:
        self.closed = True


class Patient(Echo):
    async def handle(self, queue: QueueInfo, request: Request) -> None:  # type: ignore[override]
        text = request.read()
        await asyncio.sleep(0.02 if text == b"slow" else 0)
        request.write(text)


def exchange(session: DriverSession, data: bytes, room: int = 0) -> bytes:
    room = room or len(data)
    source, target = session.allocate(len(data)), session.allocate(room)
    session.memory.write(source, data)
    vring = session.vrings[0]
    vring.submit([(source, len(data))], [(target, room)])
    vring.kick()
    ((_, written),) = vring.completions()
    return session.memory.read(target, written)


# -- several devices ------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path[:0] = {path!r}
from vhost_backend import BlockDevice, serve_all
serve_all([(BlockDevice(image), socket) for image, socket in {pairs!r}],
          ready=lambda: print("ready", flush=True))
"""


@contextlib.contextmanager
def two_disks(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    pairs = []
    for name in ("one", "two"):
        with open(folder / f"{name}.img", "wb") as file:
            file.truncate(1 << 20)
        pairs.append((str(folder / f"{name}.img"), str(folder / f"{name}.sock")))
    program = PROGRAM.format(path=sys.path, pairs=pairs)
    # A file takes all that a hostile front-end has logged; a pipe would fill up.
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process, [path for _, path in pairs]
        finally:
            process.kill()


def torment(path: str, until: threading.Event) -> None:
    """A front-end that breaks every rule it knows of."""
    number = 0
    while not until.is_set():
        number += 1
        with (
            contextlib.suppress(vp.ProtocolError, OSError),
            DriverSession.connect(path, timeout=60, packed=number % 2 == 0) as session,
        ):
            vring = session.vrings[0]
            session.memory.write(GuestAddress(vring.descriptor_area), os.urandom(64))
            session.memory.write(GuestAddress(vring.driver_area), os.urandom(8))
            os.eventfd_write(vring.kick_fd, 1)
            session.frontend.get_features()
            session.frontend.send_raw(os.urandom(40))
            session.frontend.get_features()


def test_two_front_ends_at_once_one_of_them_hostile(tmp_path: Path) -> None:
    with two_disks(tmp_path) as (process, (good, bad)):
        until = threading.Event()
        hostile = threading.Thread(target=torment, args=(bad, until))
        hostile.start()
        try:
            with DriverSession.connect(good, features=DRIVER_FEATURES) as session:
                work = BlockWorkload(session, blocks=128)
                work.run(1500)
                work.verify()
        finally:
            until.set()
            hostile.join()
        # The other device works as well, once somebody uses it as it is meant to be.
        with DriverSession.connect(bad, features=DRIVER_FEATURES) as session:
            BlockWorkload(session, blocks=128).verify()
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not any(os.path.exists(path) for path in (good, bad))


def test_both_devices_are_served_at_the_same_time(tmp_path: Path) -> None:
    with (
        two_disks(tmp_path) as (_, paths),
        DriverSession.connect(paths[0], features=F_FLUSH) as first,
        DriverSession.connect(paths[1], features=F_FLUSH, packed=True) as second,
    ):
        works = [BlockWorkload(session, blocks=64) for session in (first, second)]
        for _ in range(20):
            for work in works:
                work.submit()
            for work in works:
                work.drain()
        for work in works:
            work.verify()


def test_when_one_path_cannot_be_listened_on_none_is_served(tmp_path: Path) -> None:
    devices = [Echo(), Echo()]
    with pytest.raises(ListenError):
        serve_all([(devices[0], tmp_path / "a.sock"), (devices[1], tmp_path / "no" / "b.sock")])
    assert not (tmp_path / "a.sock").exists()
    assert all(device.closed for device in devices)


def test_the_end_does_not_hang_when_a_thread_takes_long_to_end(tmp_path: Path) -> None:
    """It has rung already, and a busy machine lets it go on much later."""

    class Ended(VhostUserDaemon):
        def serve_forever(self, where: object) -> None:
            """As a daemon that was told to end."""

    class SlowBell(_Bell):
        def ring(self) -> None:
            super().ring()
            time.sleep(0.5)

    bell = SlowBell([])
    with Ended("test", DeviceBackend.of(Echo())) as daemon, Listener(tmp_path / "s") as listener:
        serving = [_Serving(daemon, listener, bell)]
        serving[0].start()
        waiting = threading.Thread(target=_wait_for_all, args=(serving, bell), daemon=True)
        waiting.start()
        waiting.join(60)
        assert not waiting.is_alive()
    bell.close()


def test_nothing_to_serve_ends_at_once() -> None:
    serve_all([])


# -- in an event loop -----------------------------------------------------------------------------


def in_a_loop(
    device: VirtioDevice, path: Path, use: Callable[[str], Any], **options: Any
) -> tuple[Any, int]:
    """Serve in a loop of this thread while `use` runs on another; its result, and the threads."""

    async def main() -> tuple[Any, int]:
        ready = asyncio.Event()
        before = threading.active_count()
        task = asyncio.create_task(serve_async(device, path, ready=ready.set, **options))
        await ready.wait()
        added = threading.active_count() - before
        try:
            return await asyncio.to_thread(use, str(path)), added
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return asyncio.run(main())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [Echo, Patient])
def test_a_device_in_the_callers_loop(
    tmp_path: Path, engine: EngineName, packed: bool, make: type[Echo]
) -> None:
    device = make()

    def use(path: str) -> None:
        for _ in range(2):
            with DriverSession.connect(path, packed=packed) as session:
                for number in range(50):
                    assert exchange(session, bytes([number]) * 64) == bytes([number]) * 64
                base = session.stop_ring(0)
                session.start_ring(0, base)
                assert exchange(session, b"again") == b"again"
                session.frontend.set_vring_kick(0, None)  # polled from here on
                assert exchange(session, b"polled") == b"polled"

    assert in_a_loop(device, tmp_path / "s", use, engine=engine) == (None, 0)
    assert device.closed
    assert not (tmp_path / "s").exists()


def test_requests_complete_out_of_order_in_the_callers_loop(tmp_path: Path) -> None:
    def use(path: str) -> list[int]:
        with DriverSession.connect(path) as session:
            vring = session.vrings[0]
            ids = []
            for text in (b"slow", b"fast"):
                source, target = session.allocate(4), session.allocate(4)
                session.memory.write(source, text)
                ids.append(vring.submit([(source, 4)], [(target, 4)]))
            vring.kick()
            done: list[int] = []
            while len(done) < 2:
                done += [identity for identity, _ in vring.completions()]
            return [ids.index(identity) for identity in done]

    assert in_a_loop(Patient(), tmp_path / "s", use)[0] == [1, 0]


def test_a_disk_in_the_callers_loop_under_load_iommu_and_migration(
    tmp_path: Path, image: Path
) -> None:
    def use(path: str) -> None:
        with DriverSession.connect(path, features=DRIVER_FEATURES, memory_size=4 << 20) as session:
            work = BlockWorkload(session, blocks=64)
            work.run(200)
            with Migration(session) as migration:
                work.run(50)
                migration.copy()
            work.verify()
        with DriverSession.connect(path, features=DRIVER_FEATURES, iommu=True) as session:
            again = BlockWorkload(session, blocks=16, first=512, depth=4)
            again.run(50)
            again.verify()

    in_a_loop(BlockDevice(image), tmp_path / "s", use)


def test_a_drain_is_waited_for_without_stopping_the_loop(tmp_path: Path) -> None:
    taken = threading.Event()

    class Held(Echo):
        async def handle(self, queue: QueueInfo, request: Request) -> None:  # type: ignore[override]
            taken.set()
            await asyncio.sleep(0.3)
            request.write(b"done")

    def use(path: str) -> bytes:
        with DriverSession.connect(path) as session:
            vring = session.vrings[0]
            target = session.allocate(4)
            vring.submit([(session.allocate(4), 4)], [(target, 4)])
            vring.kick()
            assert taken.wait(60)
            assert session.stop_ring(0) == 1
            return session.memory.read(target, 4)

    assert in_a_loop(Held(), tmp_path / "s", use)[0] == b"done"


def test_bad_front_ends_do_not_end_the_loops_daemon(tmp_path: Path) -> None:
    def use(path: str) -> bytes:
        for data in (b"", b"\1\0\0\0", os.urandom(64), b"\1\0\0\0\1\0\0\0\1\0\0\0x"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                with contextlib.suppress(OSError):
                    client.sendall(data)
        with DriverSession.connect(path) as session:
            return exchange(session, b"fine")

    assert in_a_loop(Echo(), tmp_path / "s", use)[0] == b"fine"


def test_many_devices_share_one_loop_and_state_moves(tmp_path: Path) -> None:
    class Counter(Echo):
        count = 0

        def handle(self, queue: QueueInfo, request: Request) -> None:
            self.count += 1
            super().handle(queue, request)

        def save_state(self) -> bytes:
            return self.count.to_bytes(8, "little")

        def load_state(self, version: int, state: bytes) -> None:
            self.count = int.from_bytes(state, "little")

    source, target = Counter(), Counter()

    def use() -> None:
        with DriverSession.connect(tmp_path / "source", memory_size=4 << 20) as session:
            for number in range(5):
                exchange(session, bytes([number]))
            with Migration(session) as migration:
                migration.finish(vp.Frontend.connect(str(tmp_path / "target"), timeout=60))
            assert exchange(session, b"there") == b"there"

    async def main() -> None:
        ready = [asyncio.Event(), asyncio.Event()]
        tasks = [
            asyncio.create_task(serve_async(device, tmp_path / name, ready=event.set))
            for device, name, event in zip(
                (source, target), ("source", "target"), ready, strict=True
            )
        ]
        for event in ready:
            await event.wait()
        await asyncio.to_thread(use)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert (source.count, target.count) == (5, 6)


def test_one_connection_over_a_socket_pair() -> None:
    async def main() -> Awaitable[bytes] | bytes:
        ours, theirs = socket.socketpair()

        def use() -> bytes:
            with DriverSession(vp.Frontend(theirs, timeout=60)) as session:
                return exchange(session, b"pair")

        async with AsyncDaemon("test", DeviceBackend.of(Echo())) as daemon:
            serving = asyncio.create_task(daemon.serve_connection(ours))
            answer = await asyncio.to_thread(use)
            await serving
            return answer

    assert asyncio.run(main()) == b"pair"


@pytest.mark.parametrize("early", [False, True])
def test_a_worker_that_fails_ends_the_connection_that_is_served(early: bool) -> None:
    """Its queues would stand still, and the front-end wait for ever."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncDaemon("test", DeviceBackend.of(Echo())) as daemon:
                worker: Any = daemon.get_epoll_handlers()[0]
                if early:
                    worker._lost(RuntimeError("asked for"))
                serving = asyncio.create_task(daemon.serve_connection(ours))
                while not early and daemon._connection is None:
                    await asyncio.sleep(0)
                if not early:
                    worker._lost(RuntimeError("asked for"))
                with pytest.raises(RuntimeError, match="asked for"):
                    await asyncio.wait_for(serving, 60)
            assert ours.fileno() < 0
            theirs.settimeout(60)
            assert theirs.recv(1) == b""

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["threads", "loop"])
def test_a_front_end_that_reads_no_answers_does_not_keep_the_daemon(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhost_backend.daemon.conversation.ANSWER_PATIENCE", 0.1)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(60)

        def flood() -> None:
            with contextlib.suppress(OSError):  # a reset: the back-end has had enough
                while True:
                    theirs.sendall(struct.pack("=III", 1, 1, 0) * 100)  # GET_FEATURES

        async def in_loop() -> None:
            async with AsyncDaemon("test", DeviceBackend.of(Echo())) as daemon:
                await daemon.serve_connection(ours)

        def serve() -> None:
            if kind == "loop":
                asyncio.run(in_loop())
                return
            with VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon:
                daemon.start_connection(ours)
                flooding.join(60)

        flooding = threading.Thread(target=flood, daemon=True)
        serving = threading.Thread(target=serve, daemon=True)
        flooding.start()
        serving.start()
        for thread in (flooding, serving):
            thread.join(90)
            assert not thread.is_alive()


def test_asyncio_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, vhost_backend; sys.exit('asyncio' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
