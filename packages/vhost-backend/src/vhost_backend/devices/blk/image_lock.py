"""Locks on a disk image: against other back-ends, against QEMU, and to say who has it.

Three kinds, all advisory:

- flock(2), as other programs of this host take it: shared by a reader, exclusive by a writer.
- QEMU's convention (its block/file-posix.c): a *read* lock of the open file description on byte
  100 + i says "I use permission i", on byte 200 + i "nobody else may use it". Whether another
  program stands against that is asked for with F_OFD_GETLK. Permissions: 0 consistent read,
  1 write, 2 write without a change, 3 resize.
- A mark of our own on two bytes more, held from open to close: a second back-end on the same image
  learns of the first before either of them runs.
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

#: auto: as `on`, except where the file system has no locks; off: none.
Locking = Literal["auto", "on", "off"]

#: Seconds to wait for a lock that another program holds: udev and others look at a disk for a
#: moment, and lock it meanwhile.
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
    """Another program has the image; the message says which, as far as it can be known."""


class ImageLock:
    """The locks of one open image.

    `fd` stays the caller's, and must outlive this object; `writes` tells a writer from a reader.
    The mark is set at once, the locks themselves by `acquire`.

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
        """Who else has the image open as a back-end or runs on it now, in words; else None."""
        if not self._ofd:
            return None
        marks = (_OPEN_WRITER, _OPEN_READER) if self._writes else (_OPEN_WRITER,)
        if any(_taken(self._fd, byte) for byte in (*marks, *self._against)):
            return _holder(self._fd, "OFDLCK")
        return None

    def acquire(self) -> None:
        """Take the locks; waits up to `PATIENCE` seconds for others'. Raises `ImageInUse`."""
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
        """Let others have the image; the mark stays."""
        if self._ofd:
            _set(self._fd, fcntl.F_UNLCK, _USES, _OPEN_READER - _USES)
        if self._flock:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release everything, also while a copy of the descriptor lives on elsewhere."""
        try:
            self.release()
        finally:
            if self._ofd:
                _set(self._fd, fcntl.F_UNLCK, _OPEN_READER, _END - _OPEN_READER)

    def _try(self) -> str | None:
        """Take what can be had at once; nothing is held when it returns what stands against it."""
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
            # Ours first, then a look at theirs: of two that come at once at least one sees it.
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
        """False, after a word about it: there are no such locks here."""
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
    except OSError:  # there is no /proc to tell
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
    """A lock of an open file description has no process; the files of those we may see do."""
    image = os.readlink(f"/proc/self/fd/{fd}")
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            for name in os.listdir(f"/proc/{process}/fd"):
                # By name: to ask the file itself could wait for whoever serves it.
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
