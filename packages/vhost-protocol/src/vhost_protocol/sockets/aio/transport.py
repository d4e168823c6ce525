"""A socket in an event loop: whole messages out, what arrives in, deadlines.

``asyncio`` streams lose descriptors, so this reads with ``recvmsg`` itself when the loop says that
the socket is readable.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ...errors import ConnectionClosed, Timeout
from ...rules.core import Outgoing
from ..raw import Deadline, try_receive, try_send, whose

AsyncLock = asyncio.Lock


def exchange_ended(lock: AsyncLock, shutdown: Callable[[], None]) -> AbstractContextManager[None]:
    """Nothing to wait for: tasks of one loop do not run while another closes its socket."""
    return nullcontext()


class AsyncTransport:
    """One connected Unix stream socket, owned from here on."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._waiters: set[asyncio.Future[None]] = set()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    async def send(self, outgoing: Outgoing, deadline: Deadline) -> None:
        """Send all of a message.

        Raises:
            Timeout: the peer does not read.
            ConnectionClosed, OutOfResources: see ``whose``.
        """
        loop = asyncio.get_running_loop()
        left = memoryview(outgoing.data)
        fds = outgoing.fds
        while left:
            try:
                sent = try_send(self._sock, left, fds)
            except BlockingIOError:
                await self._wait(loop.add_writer, loop.remove_writer, deadline)
                continue
            except OSError as error:
                raise whose(error) from error
            left = left[sent:]
            fds = ()

    async def receive(self, size: int, partial: int, deadline: Deadline) -> tuple[bytes, list[int]]:
        """Read up to ``size`` bytes; none at the end of the stream.

        Raises:
            Timeout: nothing arrives.
            ConnectionClosed, OutOfResources: see ``whose`` and ``try_receive``.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return try_receive(self._sock, size)
            except BlockingIOError:
                await self._wait(loop.add_reader, loop.remove_reader, deadline)
            except OSError as error:
                raise whose(error, partial) from error

    async def _wait(
        self,
        add: Callable[..., object],
        remove: Callable[[int], object],
        deadline: Deadline,
    ) -> None:
        fd = self._sock.fileno()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        timer = None
        if deadline.seconds is not None:
            timer = loop.call_later(deadline.left(), _late, waiter, deadline.seconds)
        self._waiters.add(waiter)
        add(fd, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if timer is not None:
                timer.cancel()
            # After close() the number may be another's already, and close() has removed it.
            if self._sock.fileno() >= 0:
                remove(fd)

    def shutdown(self) -> None:
        """End the stream in both directions, which wakes the tasks that wait on it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; tasks that wait on it get ConnectionClosed."""
        fd = self._sock.fileno()
        for waiter in self._waiters:
            loop = waiter.get_loop()
            if not loop.is_closed():
                loop.remove_reader(fd)
                loop.remove_writer(fd)
            if not waiter.done():
                waiter.set_exception(ConnectionClosed("the connection was closed here"))
        self._waiters.clear()
        self._sock.close()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _late(waiter: asyncio.Future[None], seconds: float) -> None:
    if not waiter.done():
        waiter.set_exception(Timeout(seconds))


async def connect_socket(path: str, timeout: float | None) -> socket.socket:
    """Connect to a listening Unix socket.

    Waits at most ``timeout`` seconds for it to appear and to have room in its queue of connections.
    With None only the room is waited for, as long as it takes.

    Raises:
        Timeout: it cannot be connected to by then.
        OSError: it cannot be connected to, and waiting would not help.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + (timeout or 0)
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            # At once or not at all. The loop's own call takes a full queue for a connection.
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            sock.close()
            full = isinstance(error, BlockingIOError)
            if loop.time() >= end and not (full and timeout is None):
                if timeout:
                    raise Timeout(timeout) from None
                raise
        except BaseException:
            sock.close()
            raise
        await asyncio.sleep(0.01)
