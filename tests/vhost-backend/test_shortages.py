"""What this machine is short of: nobody's fault, said aloud, and nobody else's trouble."""

import asyncio
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from guest_memory import GuestMemory, MappingFailed
from vhost_backend import (
    AsyncDaemon,
    BlockDevice,
    DeviceBackend,
    Listener,
    QueueInfo,
    Refused,
    Request,
    VhostUserDaemon,
    VirtioDevice,
)
from vhost_backend.device.state_stream import StateTransfer
from vhost_backend.errors import is_shortage
from vhost_backend.testing import (
    BlockDriver,
    DriverSession,
    attached,
    expect_errors,
    served,
    serving,
)


class Echo(VirtioDevice):
    device_id = 40

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())


class Stateful(Echo):
    def save_state(self) -> bytes:
        raise RuntimeError("can't start new thread")


class Short(socket.socket):
    """Has no descriptor left for so many connections."""

    number = errno.EMFILE
    left = 3

    def accept(self) -> tuple[socket.socket, object]:
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return super().accept()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
def test_a_front_end_waits_for_a_descriptor(tmp_path: Path, number: int) -> None:
    with (
        expect_errors(f"a front-end has to wait.*{os.strerror(number)}") as errors,
        Listener(tmp_path / "socket") as listener,
        VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon,
    ):
        listener.socket = Short(fileno=listener.socket.detach())
        listener.socket.number = number
        with (
            serving(daemon, listener),
            DriverSession.connect(tmp_path / "socket", timeout=60) as session,
        ):
            assert session.frontend.get_queue_num() == 1
        assert len(errors) == 3


def test_a_front_end_waits_for_a_descriptor_in_a_loop(tmp_path: Path) -> None:
    def use() -> int:
        with DriverSession.connect(tmp_path / "socket", timeout=60) as session:
            return session.frontend.get_queue_num()

    async def main() -> int:
        with Listener(tmp_path / "socket") as listener:
            listener.socket = Short(fileno=listener.socket.detach())
            async with AsyncDaemon("test", DeviceBackend.of(Echo())) as daemon:
                task = asyncio.create_task(daemon.serve_forever(listener))
                queues = await asyncio.to_thread(use)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return queues

    with expect_errors("a front-end has to wait"):
        assert asyncio.run(main()) == 1


def test_a_daemon_ends_while_its_front_end_waits_for_a_descriptor(tmp_path: Path) -> None:
    with (
        expect_errors("a front-end has to wait") as errors,
        Listener(tmp_path / "socket") as listener,
        VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon,
        socket.socket(socket.AF_UNIX) as client,
    ):
        listener.socket = Short(fileno=listener.socket.detach())
        listener.socket.left = 1 << 30
        client.connect(str(tmp_path / "socket"))
        with serving(daemon, listener):
            until(lambda: errors, "nothing was said")
        # No busy loop: the pauses grow.
        assert (1 << 30) - listener.socket.left < 1000


def test_a_listener_that_cannot_listen_ends_its_daemon_loudly(tmp_path: Path) -> None:
    with (
        Listener(tmp_path / "socket") as listener,
        VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon,
        socket.socket(socket.AF_UNIX) as client,
    ):
        listener.socket = Short(fileno=listener.socket.detach())
        listener.socket.number = errno.EINVAL
        client.connect(str(tmp_path / "socket"))
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            daemon.serve_forever(listener)
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            daemon.start(listener)


@pytest.mark.parametrize("how", ["stop", "hang up"])
def test_a_flush_that_fails_is_an_error_and_lets_go_of_the_image(
    image: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    fails = threading.Event()
    fsync = os.fsync

    def failing(fd: int) -> None:
        if fails.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with expect_errors("Input/output error") as errors, served(BlockDevice(image)) as path:
        with DriverSession.connect(path, timeout=60) as session:
            BlockDriver(session).write(0, b"x" * 512)
            fails.set()
            if how == "stop":
                session.stop_ring(0)
                assert errors
        until(lambda: errors, "nothing was said")
        fails.clear()
        # Another device may have it, and this one serves on.
        with attached(BlockDevice(image)) as other:
            assert BlockDriver(other).read(0, 512) == b"x" * 512
        with DriverSession.connect(path, timeout=60) as session:
            assert BlockDriver(session).read(0, 512) == b"x" * 512


def test_memory_that_cannot_be_mapped_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = GuestMemory.map

    def fail(*arguments: Any, **options: Any) -> GuestMemory:
        if "mapper" in options:  # the device's side; the driver is in this process, too
            raise MappingFailed(errno.ENOMEM)
        return mapped(*arguments, **options)

    with expect_errors(os.strerror(errno.ENOMEM)), served(Echo()) as path:
        with monkeypatch.context() as patch:
            patch.setattr(GuestMemory, "map", fail)
            with pytest.raises((vp.ProtocolError, OSError)):
                DriverSession.connect(path, timeout=20, protocol_features=vp.ProtocolFeatures(0))
        with DriverSession.connect(path, timeout=60) as session:
            assert session.frontend.get_queue_num() == 1


def chained(reason: BaseException) -> Refused:
    error = Refused("SET_MEM_TABLE", "no")
    error.__cause__ = reason
    return error


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (OSError(errno.EMFILE, "x"), logging.ERROR),
        (OSError(errno.ENOSPC, "x"), logging.ERROR),
        (OSError(errno.EIO, "x"), logging.ERROR),
        (MemoryError(), logging.ERROR),
        (RuntimeError("can't start new thread"), logging.ERROR),
        (vp.DescriptorsLost("the kernel dropped descriptors", errno.EMFILE), logging.ERROR),
        (chained(MappingFailed(errno.ENOMEM)), logging.ERROR),
        (chained(MappingFailed(errno.EINVAL)), logging.WARNING),
        (Refused("SET_VRING_NUM", "no"), logging.WARNING),
        (ConnectionResetError(errno.ECONNRESET, "x"), logging.INFO),
        (vp.ConnectionClosed("x"), logging.INFO),
        (ValueError("a mistake"), logging.ERROR),
    ],
    ids=repr,
)
def test_whose_an_error_is(error: Exception, level: int, caplog: pytest.LogCaptureFixture) -> None:
    with VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon, caplog.at_level("DEBUG"):
        daemon._report(error)
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()[:6]) == (level, "test: ")
    # A traceback is for mistakes, which a shortage is none of.
    assert bool(record.exc_info) == (level == logging.ERROR and not is_shortage(error))


def test_the_channel_of_a_state_that_cannot_be_saved_is_closed() -> None:
    reader, writer = os.pipe()
    with pytest.raises(RuntimeError, match="new thread"):
        StateTransfer(Stateful(), writer, load=False).start()
    assert os.read(reader, 1) == b""  # nobody can write any more
    os.close(reader)


def test_workers_that_cannot_all_be_started_are_all_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Echo):
        num_queues = 2

    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    fds = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with (
            pytest.raises(RuntimeError, match="new thread"),
            VhostUserDaemon("test", DeviceBackend.of(Two())),
        ):
            pass
    assert not started[0].is_alive()
    assert len(os.listdir("/proc/self/fd")) == len(fds)


SERVE = """
import resource, sys, threading
from vhost_backend import VirtioDevice, serve
class Echo(VirtioDevice):
    device_id, num_queues = 40, 64
    def handle(self, queue, request): request.write(request.read())
def ready():
    start = threading.Thread.start
    def limited(self):
        if "threads" in sys.argv and "print" in self._target.__name__:
            raise RuntimeError("can't start new thread")
        start(self)
    threading.Thread.start = limited
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
if "limit" in sys.argv:
    hard = int(sys.argv[sys.argv.index("limit") + 1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
serve(Echo(), sys.argv[1], ready=None if "untold" in sys.argv else ready)
"""


def command(path: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_counters_are_shown_where_there_can_be_no_more_threads(tmp_path: Path) -> None:
    with command(tmp_path / "socket", "threads") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        try:
            assert process.stderr.readline().startswith("Echo queue 0: stopped")
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_a_program_without_logging_says_where_it_serves(tmp_path: Path) -> None:
    with command(tmp_path / "socket", "untold") as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == f"Echo: serving on {tmp_path / 'socket'}\n"
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_the_limit_of_descriptors_is_raised_to_what_is_needed(tmp_path: Path) -> None:
    with command(tmp_path / "socket", "limit", "4096") as process:
        assert process.stdout is not None
        limit = int(process.stdout.readline())
        process.terminate()
        assert process.wait(60) == 0
    # For 64 rings of three descriptors, and 64 workers of two.
    assert 64 * 5 + 256 < limit < 4096


def test_a_limit_of_descriptors_that_is_too_low_is_said(tmp_path: Path) -> None:
    with command(tmp_path / "socket", "limit", "300") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert int(process.stdout.readline()) == 300
        assert "file descriptors may be needed, and 300 are allowed" in process.stderr.readline()
        process.terminate()
        assert process.wait(60) == 0
