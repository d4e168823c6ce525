"""Kick, call and error file descriptors, and an eventfd of our own to wake a sleeper.

The front-end hands these descriptors over and keeps its own copies, so nothing is assumed of them:
they may be full, blocking, or no eventfd at all. They are switched to non-blocking when they
arrive, and a signal that does not fit is already pending, so it need not be sent again.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import Final

# An eventfd takes a native-order u64.
_ONE: Final = (1).to_bytes(8, sys.byteorder)


def adopt(fd: int) -> int:
    """Make a received descriptor safe to use from a worker: it must never block one."""
    os.set_blocking(fd, False)
    return fd


def is_eventfd(fd: int) -> bool:
    """Whether each write to the descriptor is an edge for epoll, so that it need not be read."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return False


def signal(fd: int) -> bool:
    """Add one to an eventfd (or write eight bytes to whatever it is); False if nobody listens.

    A full counter counts as signalled: the reader has a wake-up pending. It is looked at first,
    because whoever handed the descriptor over can make it blocking again.
    """
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    try:
        if not poller.poll(0):
            return True
        os.write(fd, _ONE)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def drain(fd: int) -> bool:
    """Consume what is pending on a kick descriptor; False when its other end is gone for good."""
    try:
        return bool(os.read(fd, 8))
    except BlockingIOError:
        return True
    except OSError:
        return False


class WakeFd:
    """An eventfd of our own: any thread or signal handler may `wake` whoever polls it."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd: int = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self.fd

    def wake(self) -> None:
        if self.fd >= 0:
            signal(self.fd)

    def clear(self) -> None:
        drain(self.fd)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
