"""A daemon without threads: control plane and device in the caller's event loop.

The connection is a task, queues are served when the loop finds their kick descriptors readable, and
`async def handle` runs as tasks of the same loop. A plain `handle` or `handle_batch` keeps the loop
while it works. Two things still happen on threads of their own, because they wait for a peer: the
transfer of a device's state in a migration, and the clock of an IOTLB miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from collections.abc import Callable

import vhost_protocol as vp
from guest_memory import Mapper, MemoryHolder
from vhost_protocol import AsyncBackendConnection  # by name: imported before anybody connects

from .async_worker import AsyncVringEpollHandler
from .backend import VhostUserBackend
from .composition import DaemonBase, close_lent
from .control import Answer, Outcome, Wait
from .device import VirtioDevice, name_of
from .device_backend import DeviceBackend
from .errors import Refused
from .listener import Listener
from .vring_locks import VringMutex

log: logging.Logger = logging.getLogger("vhost_backend")

#: A connection that waits for requests to end looks this often (seconds) whether its peer has gone.
HANG_UP_INTERVAL = 0.05


class LoopWorker(AsyncVringEpollHandler):
    """A worker that is part of the running event loop instead of a thread."""

    def start(self) -> None:
        """Have the loop watch the queues."""
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(self._epoll.fileno(), self._turn)
        self._turn()

    def stop(self, timeout: float | None = None) -> bool:
        """Take the queues out of the loop."""
        self._loop.remove_reader(self._epoll.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return super().stop(timeout)


class AsyncDaemon(DaemonBase):
    """`VhostUserDaemon` in the running event loop; an asynchronous context manager.

    The parameters are `VhostUserDaemon`'s. All methods belong to the loop that was running when the
    object was made. Ends when the task that serves is cancelled.
    """

    def __init__(
        self,
        name: str,
        backend: VhostUserBackend,
        memory: MemoryHolder | None = None,
        *,
        mapper: Mapper | None = None,
        engine: str | None = None,
        memory_slots: bool = True,
        drain_timeout: float = 10.0,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._progress = asyncio.Event()
        super().__init__(
            name,
            backend,
            memory,
            mapper=mapper,
            engine=engine,
            vring=VringMutex,
            memory_slots=memory_slots,
            drain_timeout=drain_timeout,
            worker_type=LoopWorker,
            wake=lambda: _tell(loop, self._progress),
        )
        for worker in self._workers:
            worker.start()

    async def serve(self, listener: Listener) -> None:
        """Accept front-ends from `listener`, one after another, until cancelled.

        The listener stays the caller's.
        """
        if listener.connected:
            await self.serve_connection(listener.accept())
            return
        loop = asyncio.get_running_loop()
        listener.socket.setblocking(False)
        while True:
            try:
                connection, _ = await loop.sock_accept(listener.socket)
            except ConnectionAbortedError:
                continue
            await self.serve_connection(connection)

    async def serve_connection(self, sock: socket.socket) -> None:
        """Serve one connected socket, which is taken over, until the front-end hangs up."""
        self._connection = sock
        connection = AsyncBackendConnection(sock)
        self._control.connect(connection.session)
        log.info("%s: a front-end has connected", self.name)
        try:
            await self._converse(connection)
        except Exception as error:
            self._report(error)
        finally:
            self._connection = None
            try:
                busy = self._control.begin_disconnect()
                await self._wait_for(lambda: self._drained(busy), None, "rings drain")
            finally:
                self._control.disconnect()
                connection.close()
                log.info("%s: the front-end has gone", self.name)

    async def _converse(self, connection: AsyncBackendConnection) -> None:
        while True:
            received = await connection.receive()
            if received is None:
                return
            with received:
                try:
                    outcome = await self._handle(received)
                except Refused as error:
                    # Where no answer can say "no", only hanging up can.
                    if not await connection.acknowledge(received, False):
                        raise
                    log.warning("%s: %s", self.name, error)
                    continue
                if isinstance(outcome, Wait):
                    await self._wait_for(outcome.ready, connection, outcome.what)
                    outcome = outcome.finish()
                if isinstance(outcome, Answer):
                    try:
                        await connection.reply(received, outcome.message, outcome.fds)
                    finally:
                        close_lent(outcome)
                else:
                    await connection.acknowledge(received, True)

    async def _handle(self, received: vp.Received) -> Outcome:
        if isinstance(received.message, vp.CheckDeviceState):
            # Waits for the transfer's thread.
            return await asyncio.to_thread(self._control.handle, received.message, received.fds)
        return self._control.handle(received.message, received.fds)

    async def _wait_for(
        self,
        ready: Callable[[], bool],
        connection: AsyncBackendConnection | None,
        what: str,
    ) -> None:
        """Wait until `ready()`, for the time a drain may take, or until the front-end hangs up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._drain_timeout
        poller = select.poll()
        if connection is not None:
            poller.register(connection.fileno(), select.POLLRDHUP)
        while not ready():
            if loop.time() >= deadline:
                self._late(what)
                return
            if poller.poll(0):
                return
            self._progress.clear()
            if ready():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._progress.wait(), HANG_UP_INTERVAL)

    def close(self) -> None:
        """Take the device out of the loop. Harmless when repeated."""
        self._hang_up()
        for worker in self._workers:
            worker.stop()
        self._workers = []

    async def __aenter__(self) -> AsyncDaemon:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


async def serve_async(
    device: VirtioDevice,
    path: str | os.PathLike[str] | Listener,
    *,
    engine: str | None = None,
    mapper: Mapper | None = None,
    memory_slots: bool = True,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve `device` on the Unix socket `path` (or a `Listener`) in the running loop.

    Ends when cancelled; the device is closed then. No signal handlers are installed. The arguments
    are those of `serve`. Raises `ListenError` when the path cannot be listened on.
    """
    try:
        with path if isinstance(path, Listener) else Listener(path) as listener:
            async with AsyncDaemon(
                name_of(device),
                DeviceBackend.of(device),
                engine=engine,
                mapper=mapper,
                memory_slots=memory_slots,
            ) as daemon:
                if ready is not None:
                    ready()
                await daemon.serve(listener)
    finally:
        device.close()


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set the event, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(event.set)
