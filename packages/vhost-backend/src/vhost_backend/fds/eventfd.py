"""Kick, call and error file descriptors, and an eventfd of our own to wake a sleeping thread.

The front-end passes these descriptors and keeps its own copies, so this module assumes nothing of
them: they may be full, blocking, just emptied by another process, or no eventfds at all. They are
made non-blocking when they arrive, but the front-end shares that flag and can clear it. So nothing
here depends on it:

* Reads are preadv2(2) with RWF_NOWAIT, which eventfds know since Linux 5.8; sockets and pipes,
  where they do not, are read by recv(2) with MSG_DONTWAIT and vmsplice(2) with SPLICE_F_NONBLOCK.
* An eventfd is signalled by the kernel itself (see `eventfd_signal`); sockets and pipes are written
  by send(2) and vmsplice(2) with the same flags.
* Anything else is neither read nor written: a file of a FUSE file system, say, could make every
  access wait for the front-end.

Where such a call is missing from the kernel or the C library, or a seccomp filter forbids it,
eventfds and pipes are polled first, and read or written only when they are ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import stat
import sys
import threading
from typing import Any, Final

from ..errors import REFUSALS
from . import eventfd_signal as aio_signal

# An eventfd takes a native-order u64.
_ONE: Final = (1).to_bytes(8, sys.byteorder)
_SPLICE_F_NONBLOCK: Final = 2
_Iovec = ctypes.c_size_t * 2

_libc: Any = ctypes.CDLL(None, use_errno=True)
_vmsplice: Any = _libc.vmsplice
_vmsplice.restype = ctypes.c_ssize_t
_vmsplice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint]
_send: Any = _libc.send
_send.restype = ctypes.c_ssize_t
_send.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
_recv: Any = _libc.recv
_recv.restype = ctypes.c_ssize_t
_recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# vmsplice lends this very page to pipes, so it holds nothing else and never changes.
_page: Final = mmap.mmap(-1, mmap.PAGESIZE)
_page.write(_ONE)
_one_on_page: Final = _Iovec(ctypes.addressof(ctypes.c_char.from_buffer(_page)), len(_ONE))


def adopt(fd: int) -> int:
    """Make a received descriptor non-blocking; only a hostile front-end undoes that."""
    os.set_blocking(fd, False)
    return fd


def can_kick(fd: int) -> bool:
    """Whether a thread may wait on a descriptor: it is an eventfd, a pipe or a socket.

    Even polling any other file may wait for the program that serves it (FUSE).
    """
    return _is_pipe(fd) or _is_socket(fd) or is_eventfd(fd)


def _is_pipe(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return False
    return True


def _is_socket(fd: int) -> bool:
    flags = socket.MSG_DONTWAIT | socket.MSG_PEEK
    return _recv(fd, None, 0, flags) >= 0 or ctypes.get_errno() not in (
        errno.ENOTSOCK,
        errno.EBADF,
    )


def is_eventfd(fd: int) -> bool:
    """Whether this is an eventfd: each write is an edge for epoll, so it need not be read."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:  # no /proc here: try to signal it, as a kick too many is harmless
        error = aio_signal.add_one(fd)
    if error in (errno.EINVAL, errno.EBADF):
        return False
    # Signalling is not allowed either. An anonymous inode at least is served by the kernel alone.
    return not error or stat.S_IFMT(os.fstat(fd).st_mode) == 0


def signal(fd: int) -> bool:
    """Add one to an eventfd, or write eight bytes into a pipe or socket; False without a reader.

    A full descriptor counts as signalled: its reader has a wake-up pending.
    """
    error = aio_signal.add_one(fd)
    if not error:
        return True
    if error == errno.EBADF:
        return False
    if _send(fd, _ONE, len(_ONE), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) >= 0:
        return True
    found = ctypes.get_errno()
    if found == errno.ENOTSOCK:
        if _vmsplice(fd, _one_on_page, 1, _SPLICE_F_NONBLOCK) >= 0:
            return True
        found = ctypes.get_errno()
        if found != errno.EAGAIN and (_is_pipe(fd) or (error != errno.EINVAL and is_eventfd(fd))):
            return _look_and_write(fd)
    return found == errno.EAGAIN


def _look_and_write(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    try:
        if poller.poll(0):
            os.write(fd, _ONE)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def drain(fd: int) -> bool:
    """Consume a pending signal of a descriptor; False when its other end has been closed."""
    buffer = bytearray(8)
    try:
        return bool(os.preadv(fd, [buffer], -1, os.RWF_NOWAIT))
    except BlockingIOError:
        return True
    except (AttributeError, NotImplementedError):  # missing in this C library
        return _drain_otherwise(fd)
    except OSError as error:
        # This kernel cannot read the file without waiting, or a seccomp filter forbids it.
        return error.errno in REFUSALS and _drain_otherwise(fd)


def _drain_otherwise(fd: int) -> bool:
    buffer = ctypes.create_string_buffer(8)
    got: int = _recv(fd, buffer, 8, socket.MSG_DONTWAIT)
    if got < 0 and ctypes.get_errno() == errno.ENOTSOCK:
        if is_eventfd(fd):
            return _look_and_read(fd)
        got = _vmsplice(fd, _Iovec(ctypes.addressof(buffer), 8), 1, _SPLICE_F_NONBLOCK)
        if got < 0 and ctypes.get_errno() in REFUSALS and _is_pipe(fd):
            return _look_and_read(fd)
    return got > 0 or (got < 0 and ctypes.get_errno() == errno.EAGAIN)


def _look_and_read(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    try:
        return not poller.poll(0) or bool(os.read(fd, 8))
    except BlockingIOError:
        return True
    except OSError:
        return False


class WakeFd:
    """An eventfd of our own: any thread or signal handler may `wake` the thread that polls it."""

    __slots__ = ("_lock", "fd")

    def __init__(self) -> None:
        self.fd: int = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Keeps `close` from freeing the number between a check of it and its use. Reentrant for
        # signal handlers; the code under it never waits.
        self._lock = threading.RLock()

    def fileno(self) -> int:
        return self.fd

    def wake(self) -> None:
        with self._lock:
            if self.fd >= 0:
                with contextlib.suppress(OSError):
                    os.write(self.fd, _ONE)

    def clear(self) -> None:
        with self._lock:
            if self.fd >= 0:
                with contextlib.suppress(OSError):
                    os.read(self.fd, 8)

    def close(self) -> None:
        with self._lock:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
