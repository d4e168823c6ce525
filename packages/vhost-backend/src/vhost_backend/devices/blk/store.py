"""The bytes of a disk: a regular file or block device, with or without the page cache."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from typing import Final

from ...errors import REFUSALS, DeviceError
from .file_io import read_at, write_at, written
from .virtio_blk import SECTOR

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_BLKGETSIZE64: Final = 0x80081272

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int


class FileStore:
    """The open file at `path`; offsets and lengths are bytes.

    `fd` goes through the page cache. With `direct` there is also `direct_fd` (O_DIRECT), for
    aligned requests; otherwise it is -1. All methods but `close` raise `OSError` when the file
    fails. The constructor raises `DeviceError` for a file that cannot be a disk or be opened.
    """

    def __init__(self, path: str, *, read_only: bool, direct: bool) -> None:
        self.path = path
        self.direct_fd: int = -1
        self.fd: int = _open(path, read_only)
        try:
            self.size()
            if direct:
                self.direct_fd = _open_direct(path, read_only)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.fd < 0

    def close(self) -> None:
        """Close the descriptors. Calling it again is harmless."""
        fds, self.fd, self.direct_fd = (self.fd, self.direct_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def size(self) -> int:
        """The size now. Raises `DeviceError` for a file that cannot be a disk."""
        status = os.fstat(self.fd)
        if stat.S_ISBLK(status.st_mode):
            buffer = bytearray(8)
            fcntl.ioctl(self.fd, _BLKGETSIZE64, buffer)
            size = int.from_bytes(buffer, "little")
        elif stat.S_ISREG(status.st_mode):
            size = status.st_size
        else:
            raise DeviceError(f"{self.path}: neither a regular file nor a block device")
        if size < SECTOR:
            raise DeviceError(f"{self.path}: {size} bytes hold no sector of {SECTOR} bytes")
        return size

    def read(self, pieces: Iterable[memoryview], offset: int) -> bool:
        """Fill the pieces; False when the file ends too early (it may have been truncated)."""
        for view in pieces:
            position = 0
            while position < len(view):
                count = read_at(self.fd, view[position:], offset)
                if not count:
                    return False
                position += count
                offset += count
        return True

    def write(self, pieces: Iterable[memoryview], offset: int, durable: bool) -> None:
        """Write the pieces; with `durable` they are on the medium when this returns."""
        for view in pieces:
            position = 0
            while position < len(view):
                count = written(write_at(self.fd, view[position:], offset, durable))
                position += count
                offset += count

    def flush(self) -> None:
        """Bring all writes to the medium."""
        os.fdatasync(self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole; the data stays where the file system cannot do that."""
        _fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeroes; with `unmap` its space may be freed."""
        if unmap and _fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
            return
        if not _fallocate(self.fd, _ZERO_RANGE | _KEEP_SIZE, offset, length):
            _write_zeroes(self.fd, offset, length)


def _open(path: str, read_only: bool) -> int:
    """Open the file without waiting: opening a FIFO would wait for a writer."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except ValueError as error:  # the path has a zero byte
        raise DeviceError(f"{path!r}: {error}") from None
    except OSError as error:
        raise DeviceError(f"{path or repr(path)}: {error.strerror}") from None
    os.set_blocking(fd, True)
    return fd


def _open_direct(path: str, read_only: bool) -> int:
    try:
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        raise DeviceError(
            f"{path}: cannot be opened past the page cache: {error.strerror}"
        ) from None


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """False where the file system cannot do it, or a seccomp filter forbids it."""
    while _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in REFUSALS or number == errno.EINVAL:
            return False
        raise OSError(number, os.strerror(number))
    return True


def _write_zeroes(fd: int, offset: int, length: int) -> None:
    zeroes = bytes(min(length, 1 << 20))
    while length:
        count = written(os.pwrite(fd, zeroes[:length], offset))
        offset += count
        length -= count
