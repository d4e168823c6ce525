"""Who may use an image: flock, QEMU's locks, and what is said about it."""

import asyncio
import errno
import fcntl
import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

import vhost_protocol as vp
from vhost_backend import (
    BlockDevice,
    DeviceBackend,
    DeviceError,
    VhostUserDaemon,
    serve_async,
)
from vhost_backend.devices.blk import image_lock
from vhost_backend.devices.blk.image_lock import ImageInUse, ImageLock, Locking
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import attached, serving

FLOCK = struct.Struct("hh4xqqi4x")
WRITER = [100, 101, 103, 201, 203]
READER = [100, 201, 203]


def set_lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def held_bytes(image: Path) -> list[int]:
    """Which of the bytes of QEMU's convention somebody has a lock on."""
    with open(image, "rb") as file:
        found = []
        for byte in [*range(100, 104), *range(200, 204)]:
            question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            answer = FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, question))
            if answer[0] != fcntl.F_UNLCK:
                assert answer[0] == fcntl.F_RDLCK
                found.append(byte)
    return found


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_lock, "PATIENCE", 0.0)


@contextmanager
def other_program(image: Path, locks: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the image locked: `flock`, or the bytes of QEMU's convention."""
    program = f"""
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
if {locks!r} == "flock":
    fcntl.flock(fd, fcntl.LOCK_SH)
else:
    for byte in map(int, {locks!r}.split()):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hh4xqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("read_only", "expected"), [(False, WRITER), (True, READER)])
def test_the_bytes_are_held_while_rings_run(
    image: Path, read_only: bool, expected: list[int]
) -> None:
    device = BlockDevice(image, read_only=read_only)
    assert held_bytes(image) == []
    with attached(device, features=DRIVER_FEATURES) as session:
        assert held_bytes(image) == expected
        session.stop_ring(0)
        assert held_bytes(image) == []
    device.close()


def test_nothing_is_held_by_what_outlives_a_closed_device(image: Path) -> None:
    """A handler in C keeps a descriptor of its own of the same open file."""
    device = BlockDevice(image)
    copy = os.dup(device._store.fd)
    device.started()
    device.close()
    assert held_bytes(image) == []
    with open(image, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(copy)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("read_only", "locks", "said"),
    [
        (False, "101", "writes to it"),
        (False, "103", "may resize it"),
        (False, "200", "lets nobody else read it"),
        (False, "100 201", "lets nobody else write to it"),
        (False, "203", "lets nobody else resize it"),
        (True, "101", "writes to it"),
        (True, "200", "lets nobody else read it"),
        (False, "flock", "has it locked (flock)"),
    ],
)
def test_another_programs_lock_is_named(
    image: Path, read_only: bool, locks: str, said: str
) -> None:
    device = BlockDevice(image, read_only=read_only)
    with other_program(image, locks) as process:
        with (
            pytest.raises(vp.RequestFailed),
            attached(device, features=DRIVER_FEATURES),
        ):
            pass
        with pytest.raises(ImageInUse) as caught:
            device._lock.acquire()
        assert str(caught.value).startswith(f"{image} is in use: process {process.pid} (python")
        assert str(caught.value).endswith(said)
        assert 101 not in held_bytes(image) or "101" in locks  # nothing of ours is left
    device.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("locks", ["100", "100 201 203", "102", "202"])
def test_readers_do_not_disturb_each_other(image: Path, locks: str) -> None:
    device = BlockDevice(image, read_only=True)
    with other_program(image, locks), attached(device, features=DRIVER_FEATURES) as session:
        assert BlockDriver(session).read(0, 512) == bytes(512)
    device.close()


@pytest.mark.parametrize("daemon", ["threads", "loop"])
@pytest.mark.parametrize("kind", ["flock", "qemu"])
def test_a_lock_of_a_moment_is_waited_for(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, daemon: str
) -> None:
    """As udev has it while it looks at a disk. A loop goes on meanwhile."""
    monkeypatch.setattr(image_lock, "PATIENCE", 60.0)
    device = BlockDevice(image)
    tries, turns = 0, 0
    attempt = ImageLock.try_acquire

    def count(lock: ImageLock) -> None:
        nonlocal tries
        tries += 1
        attempt(lock)

    monkeypatch.setattr(ImageLock, "try_acquire", count)

    def use() -> None:
        with open(image, "r+b") as other:
            if kind == "flock":
                fcntl.flock(other, fcntl.LOCK_SH)
            else:
                set_lock(other.fileno(), fcntl.F_RDLCK, 201)
            until((tmp_path / "s").exists, "there is no socket")
            session = threading.Thread(target=read)
            session.start()
            first = turns
            until(lambda: tries >= 3, "the device is not asked again")
            until(lambda: daemon == "threads" or turns > first + 3, "the loop stands still")
            assert held_bytes(image) != WRITER
            assert not read_it
        session.join(60)
        assert read_it == [bytes(512)]

    read_it: list[bytes] = []

    def read() -> None:
        with DriverSession.connect(tmp_path / "s", timeout=60, features=DRIVER_FEATURES) as session:
            read_it.append(BlockDriver(session).read(0, 512))
            assert held_bytes(image) == WRITER

    if daemon == "threads":
        with (
            VhostUserDaemon("test", DeviceBackend.of(device)) as served,
            serving(served, tmp_path / "s"),
        ):
            use()
        device.close()
        return

    async def main() -> None:
        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        tasks = [
            asyncio.create_task(serve_async(device, tmp_path / "s")),
            asyncio.create_task(turn()),
        ]
        await asyncio.to_thread(use)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_a_front_end_that_hangs_up_does_not_wait_for_a_lock(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_lock, "PATIENCE", 3600.0)
    device = BlockDevice(image)
    with (
        VhostUserDaemon("test", DeviceBackend.of(device)) as daemon,
        serving(daemon, tmp_path / "s"),
        open(image, "r+b") as other,
    ):
        until((tmp_path / "s").exists, "there is no socket")
        fcntl.flock(other, fcntl.LOCK_SH)
        for _ in range(3):
            with pytest.raises(vp.Timeout):
                DriverSession.connect(tmp_path / "s", timeout=0.3, features=DRIVER_FEATURES)
        until(lambda: not daemon.connected, "it is still served")
    device.close()


def test_off_takes_none_and_heeds_none(image: Path) -> None:
    device = BlockDevice(image, locking="off")
    with (
        other_program(image, "100 101 201"),
        open(image, "rb") as file,
        attached(device, features=DRIVER_FEATURES) as session,
    ):
        BlockDriver(session).write(0, b"x" * 512)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    device.close()


@pytest.mark.parametrize("locking", ["auto", "on"])
def test_where_the_file_system_has_no_locks(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    locking: Locking,
) -> None:
    real = fcntl.fcntl

    def refusing(fd: int, command: int, argument: bytes | int = 0) -> bytes | int:
        if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    if locking == "on":
        with pytest.raises(DeviceError, match=r"disk\.img: cannot be locked: No locks available"):
            BlockDevice(image, locking=locking)
        return
    device = BlockDevice(image, locking=locking)
    with caplog.at_level(logging.WARNING):
        with attached(device, features=DRIVER_FEATURES) as session:
            BlockDriver(session).write(0, b"x" * 512)
            with open(image, "rb") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # that one there is
        device.close()
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "has no such locks" in line] == lines


def test_a_word_for_locking_that_means_nothing(image: Path) -> None:
    with pytest.raises(DeviceError, match="locking is auto, on or off, not 'maybe'"):
        BlockDevice(image, locking="maybe")  # type: ignore[arg-type]


def test_a_second_back_end_on_one_image_is_one_line(
    image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while neither of them runs; two that only read are no matter."""
    first = BlockDevice(image, read_only=True)
    BlockDevice(image, read_only=True).close()
    assert caplog.messages == []
    second = BlockDevice(image)
    assert len(caplog.messages) == 1
    assert f"{image}: another disk of this process has it open, too" in caplog.text
    first.close()
    second.close()
    BlockDevice(image).close()
    assert len(caplog.messages) == 1


def test_two_that_come_at_once_do_not_both_get_it(image: Path) -> None:
    for _ in range(50):
        fds = [os.open(image, os.O_RDWR) for _ in range(2)]
        locks = [ImageLock(fd, str(image), writes=True) for fd in fds]
        for lock in locks:
            lock._flock = False  # which alone would do
        gate = threading.Barrier(2)
        results: list[str | None] = []

        def race(lock: ImageLock, gate: threading.Barrier, results: list[str | None]) -> None:
            gate.wait()
            results.append(lock._try())

        threads = [threading.Thread(target=race, args=(lock, gate, results)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count(None) <= 1
        for fd in fds:
            os.close(fd)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("locks", ["flock", "101"])
def test_without_proc_a_lock_of_others_is_said_all_the_same(
    image: Path, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    with other_program(image, locks), open(image, "r+b") as file:
        lock = ImageLock(file.fileno(), str(image), writes=True)
        monkeypatch.setattr(image_lock, "_by_number", missing)
        monkeypatch.setattr(image_lock, "_by_open_files", missing)
        if locks != "flock":
            assert lock.others() == "another program"
        with pytest.raises(ImageInUse, match="another program"):
            lock.acquire()
        assert held_bytes(image) == ([] if locks == "flock" else [101])
        lock.close()
