"""System calls on one socket: pieces of messages, their descriptors, and errors sorted.

Calls pass MSG_DONTWAIT; the transports wait themselves.  So a socket may be blocking or not, its
file status flags (shared with other processes when it was inherited) stay as they are, and a
deadline holds for a whole message, not for each system call.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import time
from collections.abc import Sequence

from ..errors import BadDescriptors, ConnectionClosed, DescriptorsLost, OutOfResources
from ..fds import OwnedFd
from ..messages.constants import MAX_FDS

_INT_SIZE = array.array("i").itemsize
# Space for as many descriptors as the kernel can pass, and for the credentials a socket may be set
# to deliver: truncation then means that this process has reached its limit of descriptors.
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _INT_SIZE) + socket.CMSG_SPACE(64)
# Plain numbers: `socket` has flags, which take a microsecond to combine, for each message anew.
_CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_CLOEXEC_DONTWAIT = _CLOEXEC | int(socket.MSG_DONTWAIT)
_SEND = int(socket.MSG_DONTWAIT) | int(getattr(socket, "MSG_NOSIGNAL", 0))
_TRUNCATED = int(socket.MSG_CTRUNC)


# Errors of a socket that say something about this process or machine, not about the peer.
_OURS = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, getattr(errno, "ETOOMANYREFS", 0))
)


def whose(error: OSError, partial: int = 0) -> Exception:
    """Sort an error of a socket by the side that caused it.

    Args:
        error: what a system call on a connected socket failed with.
        partial: bytes of an unfinished message that had been read.

    Returns:
        ConnectionClosed when the peer is gone, OutOfResources when this process or machine lacks
        something, else ``error``: a mistake of the caller's.
    """
    if isinstance(error, BrokenPipeError):
        return ConnectionClosed("the peer closed the connection", partial=partial)
    if isinstance(error, ConnectionResetError):
        return ConnectionClosed("the peer reset the connection", partial=partial)
    if error.errno is not None and error.errno in _OURS:
        return OutOfResources(f"this process ran short: {error.strerror}", error.errno)
    return error


def rights(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors of received control messages."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % _INT_SIZE])
    return found.tolist()


def try_receive(sock: socket.socket, size: int, *, wait: bool = False) -> tuple[bytes, list[int]]:
    """Read at most ``size`` bytes now, with the descriptors that came with them.

    Args:
        sock: where to read.
        size: at most the rest of one message.
        wait: wait for them, if the socket is one that does.

    Raises:
        BlockingIOError: there is nothing to read.
        DescriptorsLost: the kernel had to drop descriptors.
    """
    how = _CLOEXEC if wait else _CLOEXEC_DONTWAIT
    data, ancillary, flags, _ = sock.recvmsg(size, _ANCILLARY, how)
    fds = rights(ancillary) if ancillary else []
    if flags & _TRUNCATED:
        for fd in fds:
            os.close(fd)
        raise DescriptorsLost(
            "the kernel dropped descriptors of a message: this process has reached its limit",
            errno.EMFILE,
        )
    return data, fds


def try_send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int]) -> int:
    """Write what the socket takes now; descriptors go with the first byte.

    Raises:
        BlockingIOError: it takes nothing.
    """
    if fds:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        return sock.sendmsg([data], control, _SEND)
    return sock.send(data, _SEND)


def socket_from(fd: OwnedFd) -> socket.socket:
    """Make a socket object of a descriptor that arrived.

    Raises:
        BadDescriptors: it is not a socket; it has been closed.
    """
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError as error:
        fd.close()
        raise BadDescriptors("fds", error.strerror, "must be a socket") from error
    fd.detach()
    return sock


class Deadline:
    """A point in time by which something must be done.

    Attributes:
        seconds: the time that was allowed, or None for any.
    """

    __slots__ = ("_end", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds: float | None = seconds
        self._end = 0.0 if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, at least 0.  Do not ask when any time is allowed."""
        return max(0.0, self._end - time.monotonic())
