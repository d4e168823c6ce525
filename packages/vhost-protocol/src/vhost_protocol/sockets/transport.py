"""Blocking sockets: whole messages out, exact pieces in, deadlines, and no descriptor lost.

Calls pass MSG_DONTWAIT and wait in ``poll`` themselves.  So a socket may be blocking or not,
its file status flags (shared with other processes when it was inherited) stay as they are, and a
deadline holds for a whole message, not for each system call.  Only reading without a deadline
leaves the waiting to a blocking socket.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Sequence

from ..errors import ConnectionClosed, DescriptorsLost, OutOfResources, Timeout
from ..messages.constants import MAX_FDS
from ..rules.core import Outgoing

_INT_SIZE = array.array("i").itemsize
# Space for as many descriptors as the kernel can pass, and for the credentials a socket may be set
# to deliver: truncation then means that this process may not open any more.
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
    """Return what to raise for an error of a socket: by whose it is.

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
            "the kernel dropped descriptors of a message: this process may not open more",
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


class Deadline:
    """A point in time by which something must be done."""

    __slots__ = ("_end", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds: float | None = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def wait(self, sock: socket.socket, event: int) -> None:
        """Wait until ``sock`` is ready.

        Raises:
            Timeout: it is not by then.
        """
        poller = select.poll()
        poller.register(sock, event)
        if self._end is None or self.seconds is None:
            poller.poll()
            return
        left = self._end - time.monotonic()
        # poll counts in milliseconds, rounded up here so as not to spin through the last one.
        if not poller.poll(max(0, int(left * 1000) + 1)):
            raise Timeout(self.seconds)


class SocketTransport:
    """One connected Unix stream socket, owned from here on."""

    def __init__(self, sock: socket.socket) -> None:
        if sock.gettimeout():
            sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def send(self, outgoing: Outgoing, deadline: Deadline) -> None:
        """Send all of a message.

        Raises:
            Timeout: the peer does not read.
            ConnectionClosed, OutOfResources: see ``whose``.
        """
        left = memoryview(outgoing.data)
        fds = outgoing.fds
        while left:
            try:
                sent = try_send(self._sock, left, fds)
            except BlockingIOError:
                deadline.wait(self._sock, select.POLLOUT)
                continue
            except OSError as error:
                raise whose(error) from error
            left = left[sent:]
            fds = ()

    def receive(self, size: int, partial: int, deadline: Deadline) -> tuple[bytes, list[int]]:
        """Read up to ``size`` bytes; none at the end of the stream.

        Raises:
            Timeout: nothing arrives.
            ConnectionClosed, OutOfResources: see ``whose`` and ``try_receive``.
        """
        # Without a time limit the kernel can do the waiting, in one call instead of three.
        wait = deadline.seconds is None
        while True:
            try:
                return try_receive(self._sock, size, wait=wait)
            except BlockingIOError:
                deadline.wait(self._sock, select.POLLIN)
            except OSError as error:
                raise whose(error, partial) from error

    def shutdown(self) -> None:
        """End the stream in both directions, which wakes whoever waits on it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
