"""What works without system calls that a seccomp filter refuses.

    python tests/vhost-backend/refused_syscalls.py CASE ERRNO

The filter answers with the errno from then on, for this process and all of its threads.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import tempfile

from vhost_backend import BlockDevice
from vhost_backend.driver import BlockDriver
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.fds import eventfd
from vhost_backend.testing import attached

SIZE = 1 << 20
FLUSH = 1 << 9  # VIRTIO_BLK_F_FLUSH

NAMES = ("io_setup", "io_submit", "vmsplice", "fallocate", "preadv2", "pwritev2")
NUMBERS = {
    "x86_64": dict(zip(NAMES, (206, 209, 278, 285, 327, 328), strict=True)),
    "aarch64": dict(zip(NAMES, (0, 2, 75, 47, 286, 287), strict=True)),
}


def refuse(error: int, *names: str) -> None:
    """Have the kernel answer `error` to these calls."""

    def step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", code, then, otherwise, value)

    program = step(0x20, 0)  # load the number
    for name in names:
        program += step(0x15, NUMBERS[os.uname().machine][name], 0, 1)  # not equal: pass over
        program += step(0x06, 0x0005_0000 | error)  # SECCOMP_RET_ERRNO
    program += step(0x06, 0x7FFF_0000)  # SECCOMP_RET_ALLOW
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    assert libc.prctl(38, one, zero, zero, zero) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, ctypes.c_ulong(2), filter_) == 0, os.strerror(ctypes.get_errno())


def disk(error: int) -> None:
    """A disk that is written durably, read, and cleared, by Python and by C."""
    refuse(error, "preadv2", "pwritev2", "fallocate")
    for engine in ("python", None):
        with tempfile.NamedTemporaryFile() as image:
            image.truncate(SIZE)
            # A driver without FLUSH: a write is on the medium when it completes.
            device = BlockDevice(image.name)
            with attached(device, engine=engine, features=DRIVER_FEATURES & ~FLUSH) as session:
                driver = BlockDriver(session)
                data = os.urandom(3 * 4096)
                driver.write(4096, data)
                assert driver.read(4096, len(data)) == data
                assert os.pread(image.fileno(), len(data), 4096) == data
                driver.write_zeroes(4096, 4096)
                assert driver.read(4096, len(data)) == bytes(4096) + data[4096:]


def signals(error: int) -> None:
    """Each kind of descriptor is signalled and drained, and a dead end is noticed."""
    refuse(error, "io_setup", "io_submit", "vmsplice", "preadv2")
    ours, theirs = socket.socketpair()
    kinds = {
        "eventfd": (os.eventfd(0), -1),
        "pipe": os.pipe(),
        "socket": (ours.detach(), theirs.detach()),
    }
    for kind, (reader, writer) in kinds.items():
        for _ in range(2):
            assert eventfd.signal(reader if writer < 0 else writer), kind
            assert int.from_bytes(os.read(reader, 8), sys.byteorder) == 1, kind
            os.set_blocking(reader, False)
            assert eventfd.drain(reader), kind  # nothing is there
            assert eventfd.signal(reader if writer < 0 else writer), kind
            assert eventfd.drain(reader), kind
            try:
                os.read(reader, 8)
            except BlockingIOError:
                continue
            raise AssertionError(f"{kind} was not drained")
        if writer >= 0:
            os.close(writer)
            assert not eventfd.drain(reader), kind
    # None of these may be touched: somebody could answer as he likes.
    with tempfile.TemporaryFile() as file:
        assert not eventfd.signal(file.fileno())
        assert not eventfd.drain(file.fileno())


if __name__ == "__main__":
    {"disk": disk, "signals": signals}[sys.argv[1]](int(sys.argv[2]))
