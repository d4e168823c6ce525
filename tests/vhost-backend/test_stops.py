"""A stop is answered when nothing of the device can touch guest memory or its medium any more."""

import asyncio
import contextlib
import ctypes
import fcntl
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from held_file import HeldFile

import vhost_protocol as vp
from guest_memory import GuestAddress
from vhost_backend import (
    AsyncDaemon,
    BlockDevice,
    DeviceBackend,
    Listener,
    QueueInfo,
    Request,
    VhostUserDaemon,
    VirtioDevice,
    VirtioFeature,
)
from vhost_backend.devices.blk import T_GET_ID, T_IN, T_OUT
from vhost_backend.driver import DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import serving
from virtqueue import CHandler, EngineName

pytestmark = pytest.mark.usefixtures("every_flavour")

CONTENT, SENTINEL = b"D", b"N"
LENGTH = 4096
PATIENCE = 60.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[HeldFile]:
    """An image whose reads and writes the test holds up."""
    reason = HeldFile.reason_against()
    if reason is not None:
        pytest.skip(reason)
    with HeldFile(tmp_path / "held.img", CONTENT * (1 << 16)) as file:
        yield file
        file.release()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., tuple[VhostUserDaemon, str]]]:
    """Serves a device, whose waits are in the log soon."""
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:

        def serve(device: VirtioDevice, **options: object) -> tuple[VhostUserDaemon, str]:
            listener = stack.enter_context(Listener(path))
            stack.callback(device.close)
            daemon = VhostUserDaemon(
                "test",
                DeviceBackend.of(device),
                drain_warning=0.05,
                **options,  # type: ignore[arg-type]
            )
            stack.enter_context(serving(daemon, listener))
            if isinstance(device, Held):
                stack.callback(device.go_on.set)
            return daemon, path

        yield serve


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Transfer:
    """One read or write of a disk, submitted and kicked."""

    def __init__(self, session: DriverSession, kind: int, queue: int = 0, sector: int = 0) -> None:
        self.session, self.vring = session, session.vrings[queue]
        header, self.status = session.allocate(16), session.allocate(1)
        self.data = session.allocate(LENGTH, align=LENGTH)
        session.memory.write(header, struct.pack("<IIQ", kind, 0, sector))
        session.memory.write(self.data, SENTINEL * LENGTH)
        data = (self.data, LENGTH)
        self.identity = self.vring.submit(
            [(header, 16), data] if kind == T_OUT else [(header, 16)],
            [(self.status, 1)] if kind == T_OUT else [data, (self.status, 1)],
        )
        self.vring.kick()

    @property
    def memory(self) -> bytes:
        return self.session.memory.read(self.data, LENGTH)


def get_base(session: DriverSession) -> None:
    assert session.stop_ring(0) == 1


def get_base_skipping(session: DriverSession) -> None:
    assert session.frontend.get_vring_base_skip_drain(0) == 1


def reset(session: DriverSession) -> None:
    session.frontend.reset_device()


def reset_status(session: DriverSession) -> None:
    session.frontend.set_status(15)
    session.frontend.set_status(0)


FEATURES = (
    vp.ProtocolFeatures.STATUS
    | vp.ProtocolFeatures.INFLIGHT_SHMFD
    | vp.ProtocolFeatures.GET_VRING_BASE_INFLIGHT
    | vp.ProtocolFeatures.GET_VRING_BASE_SKIP_DRAIN
)


@pytest.mark.parametrize("stop", [get_base, get_base_skipping, reset, reset_status])
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("kind", [T_IN, T_OUT], ids=["read", "write"])
def test_a_stop_waits_for_what_storage_holds_up(
    disk: HeldFile,
    served: Callable[..., tuple[VhostUserDaemon, str]],
    engine: EngineName,
    kind: int,
    direct: bool,
    stop: Callable[[DriverSession], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, path = served(BlockDevice(disk.path, num_queues=2, direct=direct), engine=engine)
    with DriverSession.connect(
        path,
        timeout=PATIENCE,
        features=DRIVER_FEATURES,
        num_queues=2,
        protocol_features=FEATURES if stop is not get_base else FEATURES & ~(3 << 20 | 1 << 23),
    ) as session:
        disk.hold()
        transfer = Transfer(session, kind)
        disk.wait_held()
        stopping = threading.Thread(target=stop, args=(session,))
        stopping.start()
        until(
            lambda: "waits for requests" in caplog.text, "the log does not say what is waited for"
        )
        name = "read" if kind == T_IN else "write"
        assert f"1 on vring 0: head 0 ({name} at sector 0 of {disk.path})" in caplog.text
        if stop in (get_base, get_base_skipping):
            # Another queue serves.
            Transfer(session, T_GET_ID, queue=1)
            assert len(session.vrings[1].completions(PATIENCE)) == 1
        assert stopping.is_alive()
        assert transfer.memory == SENTINEL * LENGTH
        disk.release()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
        if kind == T_IN:
            assert transfer.memory == CONTENT * LENGTH
        else:
            assert disk.peek(0, LENGTH) == SENTINEL * LENGTH
        assert session.vrings[0].completions(0) == [
            (transfer.identity, LENGTH + 1 if kind == T_IN else 1)
        ]


def test_messages_behind_a_stop_keep_their_order(
    disk: HeldFile,
    served: Callable[..., tuple[VhostUserDaemon, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, path = served(BlockDevice(disk.path))
    with DriverSession.connect(path, timeout=PATIENCE, features=DRIVER_FEATURES) as session:
        disk.hold()
        Transfer(session, T_IN)
        disk.wait_held()
        stop = struct.pack("<IIIII", vp.FrontendRequest.GET_VRING_BASE, 1, 8, 0, 0)
        ask = struct.pack("<III", vp.FrontendRequest.GET_QUEUE_NUM, 1, 0)
        session.frontend.send_raw(stop + ask * 100)
        until(lambda: "waits for requests" in caplog.text, "nothing waits")
        with socket.fromfd(session.frontend.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            with pytest.raises(BlockingIOError):
                raw.recv(1, socket.MSG_DONTWAIT)
            disk.release()
            raw.setblocking(True)
            answers = [_answer(raw) for _ in range(101)]
    assert answers[0] == vp.FrontendRequest.GET_VRING_BASE
    assert set(answers[1:]) == {vp.FrontendRequest.GET_QUEUE_NUM}


def _answer(raw: socket.socket) -> int:
    request, _, size = struct.unpack("<III", raw.recv(12, socket.MSG_WAITALL))
    raw.recv(size, socket.MSG_WAITALL)
    return int(request)


def _peek(raw: socket.socket) -> int:
    """The next answer's request; acknowledgements are taken by the session's thread."""
    with contextlib.suppress(BlockingIOError):
        header = raw.recv(12, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return int.from_bytes(header[:4], "little")
    return 0


class Held(VirtioDevice):
    """Holds every request of queue 0 until it is let go; those of others pass."""

    num_queues = 2

    def __init__(self) -> None:
        self.taken, self.go_on = threading.Event(), threading.Event()
        self.ended = 0
        self.stops = 0

    def handle(self, queue: QueueInfo, request: Request) -> None:
        if queue.index == 0:
            self.taken.set()
            self.go_on.wait(PATIENCE)
            self.ended += 1
        request.write(b"done")

    def stopped(self) -> None:
        self.stops += 1


def submit(session: DriverSession, queue: int = 0) -> GuestAddress:
    """A request of four bytes each way; where its answer comes."""
    target = session.allocate(4, align=LENGTH)  # a page of its own, for the IOTLB
    session.vrings[queue].submit([(session.allocate(4), 4)], [(target, 4)])
    session.vrings[queue].kick()
    return target


def test_an_iotlb_update_is_taken_while_a_stop_waits(
    served: Callable[..., tuple[VhostUserDaemon, str]],
    engine: EngineName,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As QEMU 5.2 to 7.2 send it: from inside of their wait for the answer."""
    device = Held()
    _, path = served(device, engine=engine)
    with DriverSession.connect(path, timeout=PATIENCE, num_queues=2, iommu=True) as session:
        submit(session)
        assert device.taken.wait(PATIENCE)
        frontend = session.frontend
        stop = struct.pack("<IIIII", vp.FrontendRequest.GET_VRING_BASE, 1, 8, 0, 0)
        frontend.send_raw(stop)
        until(lambda: "waits for requests" in caplog.text, "nothing waits")
        # Queue 1 misses an entry; the session answers that, with an acknowledgement that comes
        # before the answer of the stop.
        with socket.fromfd(frontend.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            missed = len(session.missed)
            target = submit(session, 1)
            assert len(session.vrings[1].completions(PATIENCE)) == 1
            assert session.memory.read(target, 4) == b"done"
            assert len(session.missed) > missed
            device.go_on.set()
            until(lambda: _peek(raw) == vp.FrontendRequest.GET_VRING_BASE, "the stop has no answer")


def test_after_a_hang_up_nothing_is_let_go_of_before_the_request_ends(
    disk: HeldFile,
    served: Callable[..., tuple[VhostUserDaemon, str]],
    engine: EngineName,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = BlockDevice(disk.path)
    _, path = served(device, engine=engine)
    with DriverSession.connect(path, timeout=PATIENCE, features=DRIVER_FEATURES) as session:
        memory = os.fstat(session._memory_fd).st_ino
        disk.hold()
        Transfer(session, T_IN)
        disk.wait_held()
    # Another front-end connects, negotiates and sets its ring up.
    with DriverSession.connect(path, timeout=PATIENCE, features=DRIVER_FEATURES) as session:
        assert "test: vring 0 waits: the device still works for the last front-end" in caplog.text
        transfer = Transfer(session, T_IN, sector=8)
        assert session.frontend.get_features()
        assert mapped(memory)
        assert locked(disk.path)
        assert disk.held() == 1
        disk.release()
        assert len(session.vrings[0].completions(PATIENCE)) == 1
        assert transfer.memory == CONTENT * LENGTH
        until(lambda: not mapped(memory), "the memory of the last front-end stays mapped")
        # Its ring may be stopped while it waits, too.
    until(lambda: not locked(disk.path), "the image stays locked")


def test_a_ring_that_waits_for_the_last_front_end_can_be_stopped_and_left(
    served: Callable[..., tuple[VhostUserDaemon, str]], engine: EngineName
) -> None:
    device = Held()
    _, path = served(device, engine=engine)
    with DriverSession.connect(path, timeout=PATIENCE) as session:
        submit(session)
        assert device.taken.wait(PATIENCE)
    with DriverSession.connect(path, timeout=PATIENCE) as session:
        submit(session)
        assert session.stop_ring(0) == 0
        session.start_ring(0)
        session.frontend.reset_device()
    with DriverSession.connect(path, timeout=PATIENCE, num_queues=2) as session:
        target = submit(session, 1)
        assert not device.stops
        device.go_on.set()
        assert len(session.vrings[1].completions(PATIENCE)) == 1
        assert session.memory.read(target, 4) == b"done"
        assert device.ended == 1
        assert not device.stops  # the device went from one front-end to the other
    until(lambda: device.stops == 1, "the device was not told that its rings have stopped")


def test_a_ring_that_waits_and_that_later_features_forbid_does_not_start(
    served: Callable[..., tuple[VhostUserDaemon, str]],
    engine: EngineName,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """48 descriptors, as packed rings may have; then SET_FEATURES comes without packed rings."""
    device = Held()
    _, path = served(device, engine=engine)
    with DriverSession.connect(path, timeout=PATIENCE) as session:
        submit(session)
        assert device.taken.wait(PATIENCE)
    err = os.eventfd(0)
    with DriverSession.connect(path, timeout=PATIENCE, packed=True, queue_size=48) as session:
        session.frontend.set_vring_err(0, err)
        session.frontend.set_features(session.features & ~VirtioFeature.RING_PACKED)
        device.go_on.set()
        until(lambda: select.select([err], [], [], 0)[0], "the front-end is not told")
        assert "queue 0 cannot start" in caplog.text
        assert session.frontend.get_features()
        # Set up anew it starts.
        session.frontend.set_features(session.features)
        session.start_ring(0)
        submit(session)
        assert len(session.vrings[0].completions(PATIENCE)) == 1
    assert not [record for record in caplog.records if record.exc_info]
    os.close(err)


def test_a_hang_up_is_noticed_while_a_stop_waits(
    served: Callable[..., tuple[VhostUserDaemon, str]], caplog: pytest.LogCaptureFixture
) -> None:
    device = Held()
    _, path = served(device)
    with DriverSession.connect(path, timeout=PATIENCE) as session:
        submit(session)
        assert device.taken.wait(PATIENCE)
        session.frontend.send_raw(
            struct.pack("<IIIII", vp.FrontendRequest.GET_VRING_BASE, 1, 8, 0, 0)
        )
        until(lambda: "waits for requests" in caplog.text, "nothing waits")
    with DriverSession.connect(path, timeout=PATIENCE) as session:
        assert session.frontend.get_queue_num() == 2
        assert not device.ended
        device.go_on.set()
        submit(session)
        assert len(session.vrings[0].completions(PATIENCE)) == 1


HANDLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class HeldInC(Held):
    """Its handler in C waits for a pipe, as one waits for storage, and leaves the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = os.pipe()

        def work(context: int, queue: int) -> int:
            self.taken.set()
            os.read(self.reader, 1)
            return 0

        self._function = HANDLER(work)

    def batch_handler(self, queue: int) -> CHandler | None:
        return CHandler(ctypes.cast(self._function, ctypes.c_void_p).value or 0)


def test_a_handler_in_c_is_waited_for(
    served: Callable[..., tuple[VhostUserDaemon, str]], caplog: pytest.LogCaptureFixture
) -> None:
    device = HeldInC()
    _, path = served(device)
    try:
        with DriverSession.connect(path, timeout=PATIENCE) as session:
            submit(session)
            assert device.taken.wait(PATIENCE)
            stopping = threading.Thread(target=get_base, args=(session,))
            stopping.start()
            until(lambda: "waits for requests" in caplog.text, "nothing waits")
            assert stopping.is_alive()
            os.write(device.writer, b"x")
            stopping.join(PATIENCE)
            assert not stopping.is_alive()
            assert len(session.vrings[0].completions(0)) == 1
    finally:
        os.write(device.writer, b"xx")


def test_the_log_says_again_and_more_and_more_rarely_what_is_waited_for(
    served: Callable[..., tuple[VhostUserDaemon, str]], caplog: pytest.LogCaptureFixture
) -> None:
    device = Held()
    _, path = served(device)
    with DriverSession.connect(path, timeout=PATIENCE) as session:
        submit(session)
        assert device.taken.wait(PATIENCE)
        stopping = threading.Thread(target=get_base, args=(session,))
        stopping.start()
        until(lambda: caplog.text.count("waits for requests") >= 4, "it was said once")
        device.go_on.set()
        stopping.join(PATIENCE)
    said = [record for record in caplog.records if "waits for requests" in record.getMessage()]
    gaps = [later.created - before.created for before, later in itertools.pairwise(said)]
    assert gaps[2] > gaps[0]
    assert "GET_VRING_BASE of vring 0 waited" in caplog.text


@pytest.mark.parametrize("how", ["shutdown", "hang up and shutdown"])
def test_a_daemon_that_is_closed_waits_for_the_device(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = Held()
    daemon = VhostUserDaemon("test", DeviceBackend(device), drain_warning=0.05)
    with (
        Listener(tmp_path / "s") as listener,
        serving(daemon, listener),
        DriverSession.connect(tmp_path / "s", timeout=PATIENCE) as session,
    ):
        target = submit(session)
        assert device.taken.wait(PATIENCE)
        if how == "hang up and shutdown":
            session.close()
        closing = threading.Thread(target=daemon.close)
        closing.start()
        until(lambda: "the end of the daemon waits" in caplog.text, "the log says nothing")
        assert closing.is_alive()
        stops = [device.stops]
        device.go_on.set()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert [*stops, device.stops] == [0, 1]
        if how == "shutdown":
            # Its front-end finds it completed.
            assert session.memory.read(target, 4) == b"done"
            assert len(session.vrings[0].queue.collect()) == 1


@contextlib.contextmanager
def command(disk: HeldFile, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vhost_backend", "blk"),
            *(f"--socket-path={path}", f"--blk-file={disk.path}", *options),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        disk.release()
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_sigterm_waits_for_the_device_and_a_second_one_does_not(
    disk: HeldFile, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    for again in (False, True):
        with command(disk, path) as process:
            until(path.exists, "there is no socket")
            with DriverSession.connect(path, timeout=PATIENCE, features=DRIVER_FEATURES) as session:
                disk.hold()
                transfer = Transfer(session, T_IN)
                disk.wait_held()
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.3)
                assert process.poll() is None
                assert locked(disk.path)
                if again:
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(PATIENCE) == -signal.SIGTERM
                    assert transfer.memory == SENTINEL * LENGTH
                else:
                    disk.release()
                    assert process.wait(PATIENCE) == 0
                    assert transfer.memory == CONTENT * LENGTH
        assert not path.exists()


def test_a_ring_that_breaks_ends_with_what_the_device_works_on(
    served: Callable[..., tuple[VhostUserDaemon, str]],
    engine: EngineName,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A guest that breaks its ring does not get it back while a coroutine uses its memory."""
    taken, go_on = threading.Event(), threading.Event()

    class Slow(VirtioDevice):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            taken.set()
            await asyncio.to_thread(go_on.wait, PATIENCE)
            request.write(b"done")

    _, path = served(Slow(), engine=engine)
    with DriverSession.connect(path, timeout=PATIENCE) as session:
        vring = session.vrings[0]
        target = submit(session)
        assert taken.wait(PATIENCE)
        vring.submit([(1 << 50, 4)], [])
        vring.kick()
        until(lambda: "queue broken" in caplog.text, "the ring is not broken")
        stopping = threading.Thread(target=session.stop_ring, args=(0,))
        stopping.start()
        until(lambda: "waits for requests" in caplog.text, "nothing waits")
        assert stopping.is_alive()
        go_on.set()
        stopping.join(PATIENCE)
        assert session.memory.read(target, 4) == b"done"
        assert len(vring.queue.collect()) == 1
    assert caplog.text.count("queue broken") == 1


def test_the_loops_daemon_waits_for_a_thread_of_a_coroutine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when its task is cancelled; other messages and front-ends are served meanwhile."""
    taken, go_on = threading.Event(), threading.Event()

    class Slow(VirtioDevice):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            taken.set()
            await asyncio.to_thread(go_on.wait, PATIENCE)
            request.write(b"done")

    path = tmp_path / "s"

    def use() -> None:
        with DriverSession.connect(path, timeout=PATIENCE) as session:
            target = submit(session)
            assert taken.wait(PATIENCE)
            stopping = threading.Thread(target=get_base, args=(session,))
            stopping.start()
            until(lambda: "waits for requests" in caplog.text, "nothing waits")
            assert stopping.is_alive()
            go_on.set()
            stopping.join(PATIENCE)
            assert session.memory.read(target, 4) == b"done"
            session.start_ring(0, 1)
            go_on.clear()
            taken.clear()
            submit(session)
            assert taken.wait(PATIENCE)
        with DriverSession.connect(path, timeout=PATIENCE) as session:
            assert "vring 0 waits" in caplog.text
            target = submit(session)
            go_on.set()
            assert len(session.vrings[0].completions(PATIENCE)) == 1
            go_on.clear()
            taken.clear()
            submit(session)
            assert taken.wait(PATIENCE)

    async def main() -> None:
        with Listener(path) as listener:
            async with AsyncDaemon("test", DeviceBackend.of(Slow()), drain_warning=0.05) as daemon:
                task = asyncio.create_task(daemon.serve_forever(listener))
                await asyncio.to_thread(use)
                task.cancel()
                asyncio.get_running_loop().call_later(0.3, go_on.set)
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            assert go_on.is_set()

    asyncio.run(main())


def mapped(inode: int) -> bool:
    """Whether this process maps the file of that inode."""
    with open("/proc/self/maps") as maps:
        return any(line.split()[4] == str(inode) for line in maps)


def locked(path: Path) -> bool:
    """Whether somebody has locked the image."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
