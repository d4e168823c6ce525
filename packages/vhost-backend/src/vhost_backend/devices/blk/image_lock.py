"""Locks on a disk image: against other back-ends and against QEMU.

There are three kinds, all advisory:

- flock(2), as other programs of this host take it: shared by a reader, exclusive by a writer.
- QEMU's convention (its block/file-posix.c): a *read* lock of the open file description on byte
  100 + i says "I use permission i", and on byte 200 + i "no other program may use it". A program
  finds conflicting locks with F_OFD_GETLK. Permissions: 0 consistent read, 1 write, 2 write without
  a change, 3 resize.
- A mark of our own on one of two further bytes, held from open to close. By it a second back-end on
  the same image learns of the first before either of them runs.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from typing import Final, Literal

from ...errors import DeviceError

log: logging.Logger = logging.getLogger("vhost_backend.blk")

#: auto takes locks where the file system has them; on fails where it has none; off takes none.
Locking = Literal["auto", "on", "off"]

#: Seconds to wait for another program's lock: udev and others lock a disk for a moment while they
#: look at it.
PATIENCE = 3.0
_INTERVAL: Final = 0.02

_USES: Final = 100
_KEEPS: Final = 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_OPEN_READER, _OPEN_WRITER = 300, 301
_END: Final = 302

_CLAIMS: Final = {
    _USES + _WRITE: "writes to it",
    _USES + _RESIZE: "may resize it",
    _KEEPS + _READ: "lets nobody else read it",
    _KEEPS + _WRITE: "lets nobody else write to it",
    _KEEPS + _RESIZE: "lets nobody else resize it",
}

# struct flock of fcntl(2): type, whence, start, length, process (0 for these locks).
_FLOCK: Final = struct.Struct("hh4xqqi4x")
_UNSUPPORTED: Final = frozenset(
    (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
)


class ImageInUse(DeviceError):
    """Another program uses the image; the message names it where that is known."""


class ImageLock:
    """The locks of one open image.

    `fd` stays the caller's, and must outlive this object. `writes` is whether the image is opened
    for writing. The mark is set at once; `acquire` takes the locks.

    Raises `DeviceError` with `locking="on"` where the file system has no such locks.
    """

    def __init__(self, fd: int, path: str, *, writes: bool, locking: Locking = "auto") -> None:
        if locking not in ("auto", "on", "off"):
            raise DeviceError(f"locking is auto, on or off, not {locking!r}")
        self._fd = fd
        self._path = path
        self._locking = locking
        self._writes = writes
        self._held: tuple[int, ...] = (_USES + _READ, _KEEPS + _WRITE, _KEEPS + _RESIZE)
        self._against: tuple[int, ...] = (_KEEPS + _READ, _USES + _WRITE, _USES + _RESIZE)
        if writes:
            self._held += (_USES + _WRITE, _USES + _RESIZE)
            self._against += (_KEEPS + _WRITE, _KEEPS + _RESIZE)
        self._flock = self._ofd = locking != "off"
        if self._ofd:
            try:
                _set(fd, fcntl.F_RDLCK, _OPEN_WRITER if writes else _OPEN_READER)
            except OSError as error:
                self._ofd = self._missing(error)

    def others(self) -> str | None:
        """The program that has the image open as a back-end or uses it now, in words, or None."""
        if not self._ofd:
            return None
        marks = (_OPEN_WRITER, _OPEN_READER) if self._writes else (_OPEN_WRITER,)
        if any(_taken(self._fd, byte) for byte in (*marks, *self._against)):
            return _holder(self._fd, "OFDLCK")
        return None

    def acquire(self) -> None:
        """Take the locks; wait up to `PATIENCE` seconds for others'. Raises `ImageInUse`."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.try_acquire()
                return
            except ImageInUse:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_INTERVAL)

    def try_acquire(self) -> None:
        """Take the locks, or raise `ImageInUse` at once."""
        conflict = self._try()
        if conflict is not None:
            raise ImageInUse(f"{self._path} is in use: {conflict}")

    def release(self) -> None:
        """Release the locks, so that others may use the image; the mark stays."""
        if self._ofd:
            _set(self._fd, fcntl.F_UNLCK, _USES, _OPEN_READER - _USES)
        if self._flock:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release locks and mark, even if a copy of the descriptor stays open elsewhere."""
        try:
            self.release()
        finally:
            if self._ofd:
                _set(self._fd, fcntl.F_UNLCK, _OPEN_READER, _END - _OPEN_READER)

    def _try(self) -> str | None:
        """Try to take all locks at once; returns the conflict, and then holds none."""
        if self._flock:
            kind = fcntl.LOCK_EX if self._writes else fcntl.LOCK_SH
            try:
                fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"{_holder(self._fd, 'FLOCK')} has it locked (flock)"
            except OSError as error:
                self._flock = self._missing(error)
        if not self._ofd:
            return None
        try:
            # Set our locks, then look for theirs: of two programs, at least one sees the other's.
            for byte in self._held:
                _set(self._fd, fcntl.F_RDLCK, byte)
            taken = [byte for byte in self._against if _taken(self._fd, byte)]
        except OSError as error:
            self.release()
            raise DeviceError(f"{self._path}: cannot be locked: {error.strerror}") from None
        if not taken:
            return None
        self.release()
        return f"{_holder(self._fd, 'OFDLCK')} {_CLAIMS[taken[0]]}"

    def _missing(self, error: OSError) -> bool:
        """Log that there are no such locks here, and return False.

        Raises `DeviceError` for another error, and with `locking="on"`.
        """
        if self._locking == "on" or error.errno not in _UNSUPPORTED:
            raise DeviceError(f"{self._path}: cannot be locked: {error.strerror}") from None
        log.warning(
            "%s: the file system has no such locks (%s): nothing keeps other programs off",
            self._path,
            error.strerror,
        )
        return False


def _set(fd: int, kind: int, start: int, length: int = 1) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _taken(fd: int, byte: int) -> bool:
    """Whether another open file has a lock on that byte."""
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _holder(fd: int, kind: str) -> str:
    """Which process has a lock of that kind (as /proc/locks names it) on the file, in words."""
    try:
        processes = _by_number(fd, kind) or _by_open_files(fd, kind)
    except OSError:  # there is no /proc
        processes = set()
    if not processes:
        return "another program"
    process = min(processes)
    if process == os.getpid():
        return "another disk of this process"
    try:
        with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
            return f"process {process} ({file.read().strip()})"
    except OSError:
        return f"process {process}"


def _by_number(fd: int, kind: str) -> set[int]:
    """From /proc/locks: 1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF."""
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as table:
            rows = [row.split() for row in table]
    except OSError:
        return set()
    return {
        int(row[4])
        for row in rows
        if len(row) >= 6 and row[1] == kind and row[5] == file and int(row[4]) > 0
    }


def _by_open_files(fd: int, kind: str) -> set[int]:
    """The processes that have the locked file open, as far as we may see their files.

    A lock of an open file description belongs to no process, so /proc/locks names none.
    """
    image = os.readlink(f"/proc/self/fd/{fd}")
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            for name in os.listdir(f"/proc/{process}/fd"):
                # By name: a stat of the file could wait for the program that serves it (FUSE).
                if os.readlink(f"/proc/{process}/fd/{name}") != image:
                    continue
                if int(process) == os.getpid() and int(name) == fd:
                    continue
                with open(f"/proc/{process}/fdinfo/{name}", encoding="ascii") as file:
                    if any(line.startswith("lock:") and kind in line for line in file):
                        found.add(int(process))
        except OSError:  # not ours to see, or gone meanwhile
            continue
    return found
