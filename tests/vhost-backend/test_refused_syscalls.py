"""Where a C library lacks calls, or a seccomp filter refuses them, older ones do the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vhost_backend.devices.blk.file_io import read_at, write_at
from vhost_backend.fds import eventfd

SCRIPT = Path(__file__).parent / "refused_syscalls.py"
REFUSALS = [errno.EPERM, errno.ENOSYS, errno.EACCES]


@pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64"), reason="no numbers of system calls"
)
@pytest.mark.parametrize("error", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("case", ["disk", "signals"])
def test_a_filter_refuses_what_there_are_other_ways_for(case: str, error: int) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, case, str(error)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(params=["no function", "no flags"])
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How Python is built with a C library that has no preadv2 and pwritev2."""

    def refuse(*_: object) -> int:
        raise NotImplementedError("pwritev: flags unavailable on this platform")

    for name in ("preadv", "pwritev"):
        if request.param == "no function":
            monkeypatch.delattr(os, name)
        else:
            monkeypatch.setattr(os, name, refuse)
    for name in ("RWF_DSYNC", "RWF_NOWAIT"):
        monkeypatch.delattr(os, name)


@pytest.mark.usefixtures("bare")
def test_a_library_without_flags_writes_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fdatasync = os.fdatasync

    def watched(fd: int) -> None:
        synced.append(fd)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", watched)
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    assert write_at(fd, memoryview(b"abcd"), 3, durable=False) == 4
    assert not synced
    assert write_at(fd, memoryview(b"efgh"), 7, durable=True) == 4
    assert synced == [fd]
    target = bytearray(10)
    assert read_at(fd, memoryview(target), 3) == 8
    assert target == b"abcdefgh\0\0"
    os.close(fd)


@pytest.mark.usefixtures("bare")
def test_a_library_without_flags_drains_a_kick() -> None:
    fd = os.eventfd(3, os.EFD_NONBLOCK)
    assert eventfd.drain(fd)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    os.close(fd)


def test_an_error_of_the_file_is_raised(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "image", os.O_RDONLY | os.O_CREAT)
    for durable in (False, True):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            write_at(fd, memoryview(b"abcd"), 0, durable)
    os.close(fd)
