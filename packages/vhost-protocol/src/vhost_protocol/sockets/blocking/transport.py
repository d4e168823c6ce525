"""A blocking socket: whole messages out, what arrives in, deadlines.

Only reading without a deadline leaves the waiting to a blocking socket.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

from ...errors import Timeout
from ...rules.core import Outgoing
from ..raw import Deadline, try_receive, try_send, whose

#: Reentrant: an exchange that fails closes the connection.
Lock = threading.RLock


@contextlib.contextmanager
def exchange_ended(lock: threading.RLock, shutdown: Callable[[], None]) -> Iterator[None]:
    """Hold `lock` to close a socket, once an exchange of another thread has ended by `shutdown`.

    The number of a socket that an exchange still uses must not go to another file.
    """
    if not lock.acquire(False):
        shutdown()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Transport:
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
                self._wait(select.POLLOUT, deadline)
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
                self._wait(select.POLLIN, deadline)
            except OSError as error:
                raise whose(error, partial) from error

    def _wait(self, event: int, deadline: Deadline) -> None:
        poller = select.poll()
        poller.register(self._sock, event)
        if deadline.seconds is None:
            poller.poll()
        # poll counts in milliseconds, rounded up here so as not to spin through the last one.
        elif not poller.poll(int(deadline.left() * 1000) + 1):
            raise Timeout(deadline.seconds)

    def shutdown(self) -> None:
        """End the stream in both directions, which wakes the threads that wait on it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def connect_socket(path: str, timeout: float | None) -> socket.socket:
    """Connect to a listening Unix socket.

    Waits at most ``timeout`` seconds for it to appear and to have room in its queue of connections.
    With None only the room is waited for, as long as it takes.

    Raises:
        Timeout: it cannot be connected to by then.
        OSError: it cannot be connected to, and waiting would not help.
    """
    end = time.monotonic() + (timeout or 0)
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A blocking call waits for room without a limit.
            sock.setblocking(timeout is None)
            sock.connect(path)
            sock.setblocking(True)
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
            if time.monotonic() >= end:
                if timeout:
                    raise Timeout(timeout) from None
                raise
        except BaseException:
            sock.close()
            raise
        time.sleep(0.01)
