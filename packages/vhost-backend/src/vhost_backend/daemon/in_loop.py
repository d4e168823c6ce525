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
from typing import Any

import vhost_protocol as vp
from guest_memory import Mapper, MemoryHolder
from vhost_protocol import AsyncBackendConnection  # by name: imported before anybody connects
from virtqueue import EngineName

from ..adapter.checks import check_backend, check_device
from ..adapter.coroutines import AsyncVringEpollHandler
from ..adapter.device_backend import DeviceBackend
from ..backend import VhostUserBackend
from ..control import Answer, Outcome, Wait
from ..device.base import VirtioDevice, close_device, name_of
from ..errors import Refused
from ..fds.listener import Listener, announce
from ..vring.locks import VringMutex
from .base import DaemonBase, Pause, close_lent
from .waiting import WaitLog

log: logging.Logger = logging.getLogger("vhost_backend")

#: Where nothing more is read, a connection is looked at this often (seconds) for a hang-up.
HANG_UP_INTERVAL = 0.05


class LoopWorker(AsyncVringEpollHandler):
    """A worker that is part of the running event loop instead of a thread."""

    def start(self) -> None:
        """Have the loop watch the queues."""
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(self._epoll.fileno(), self._turn)
        self._turn()

    def _failed(self, what: str, error: BaseException) -> None:
        super()._failed(what, error)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            end_loop(self._loop, error)

    def _lost(self, error: BaseException) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._give_up(error)

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
        engine: EngineName | None = None,
        memory_slots: bool = True,
        drain_warning: float = 10.0,
    ) -> None:
        loop = asyncio.get_running_loop()
        check_backend(backend)
        self._progress = asyncio.Event()
        super().__init__(
            name,
            backend,
            memory,
            mapper=mapper,
            engine=engine,
            vring=VringMutex,
            memory_slots=memory_slots,
            drain_warning=drain_warning,
            worker_type=LoopWorker,
            wake=lambda: _call(loop, self._look_on),
        )
        self._failure: BaseException | None = None
        self._task: asyncio.Task[Any] | None = None
        if isinstance(backend, DeviceBackend):
            backend.on_exit = lambda error: end_loop(loop, error)
        for worker in self._workers:
            worker.start()

    async def serve(self, listener: Listener) -> None:
        """Accept front-ends from `listener`, one after another, until cancelled.

        The listener stays the caller's. Raises what has ended a worker that cannot go on.
        """
        self._task = asyncio.current_task()
        try:
            await self._accept_all(listener)
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None
        finally:
            self._task = None

    async def _accept_all(self, listener: Listener) -> None:
        if listener.connected:
            await self.serve_connection(listener.accept())
            return
        loop = asyncio.get_running_loop()
        listener.socket.setblocking(False)
        pause = Pause()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener.socket)
            except OSError as error:
                await asyncio.sleep(self._not_accepted(error, pause))
                continue
            pause = Pause()
            await self.serve_connection(connection)

    async def serve_connection(self, sock: socket.socket) -> None:
        """Serve one connected socket, which is taken over, until the front-end hangs up."""
        for worker in self._workers:
            assert isinstance(worker, LoopWorker)
            worker.run_in(asyncio.current_task())
        self._connection = sock
        connection = AsyncBackendConnection(sock)
        self._control.connect(connection.session)
        log.info("%s: a front-end has connected", self.name)
        try:
            await self._converse(connection)
        except (KeyboardInterrupt, SystemExit):
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                await self._finish_requests(connection)
                raise
            self._report(error)  # some hook of the device's has raised it
        except BaseException as error:
            self._report(error)
        finally:
            self._connection = None
            self._ahead.close()
            try:
                self._control.disconnect()
            finally:
                connection.close()
                log.info("%s: the front-end has gone", self.name)

    def _worker_failed(self, error: BaseException) -> None:
        self._failure = error
        if self._task is not None:
            self._task.cancel()

    async def _converse(self, connection: AsyncBackendConnection) -> None:
        while True:
            received = self._ahead.next() or await connection.receive()
            if received is None or not await self._serve(connection, received):
                return

    async def _serve(self, connection: AsyncBackendConnection, received: vp.Received) -> bool:
        """Handle one message and answer it; False when the front-end has hung up meanwhile."""
        with received:
            try:
                outcome = await self._handle(received)
            except Refused as error:
                # Where no answer can say "no", only hanging up can.
                if not await connection.acknowledge(received, False):
                    raise
                self._refused(error)
                return True
            if isinstance(outcome, Wait):
                if not await self._wait_for(outcome, connection):
                    return False
                outcome = outcome.finish()
            if isinstance(outcome, Answer):
                try:
                    await connection.reply(received, outcome.message, outcome.fds)
                finally:
                    close_lent(outcome)
            else:
                await connection.acknowledge(received, True)
            return True

    async def _handle(self, received: vp.Received) -> Outcome:
        if isinstance(received.message, vp.CheckDeviceState):
            # Waits for the transfer's thread.
            return await asyncio.to_thread(self._control.handle, received.message, received.fds)
        return self._control.handle(received.message, received.fds)

    async def _wait_for(self, wait: Wait, connection: AsyncBackendConnection) -> bool:
        """Wait until the device has ended what a message waits for; see `VhostUserDaemon`.

        False when the front-end hangs up before.
        """
        report = self._wait_log(wait.what, lambda: wait.rings)
        reading: asyncio.Task[vp.Received | None] | None = None
        try:
            while not wait.ready():
                if reading is None and not self._ahead.full:
                    reading = asyncio.ensure_future(connection.receive())
                if not await self._look(connection, report, reading):
                    return False
                if reading is not None and reading.done():
                    received, reading = reading.result(), None
                    if received is None:
                        return False
                    if self._ahead.goes_first(received) and not await self._serve(
                        connection, received
                    ):
                        return False
            report.end()
            return True
        finally:
            if reading is not None:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    received = await reading  # a message may just have come
                    if received is not None and self._ahead.goes_first(received):
                        await self._serve(connection, received)

    async def _finish_requests(self, connection: AsyncBackendConnection) -> None:
        """The daemon ends, and the front-end is still there: show it how its requests end."""
        ended = self._control.end_requests()
        report = self._shutdown_log(lambda: range(len(self.vrings)))
        while self._failure is None and not ended() and not connection.closed:
            if not await self._look(connection, report, None):
                return
        report.end()

    async def _look(
        self,
        connection: AsyncBackendConnection | None,
        report: WaitLog,
        reading: asyncio.Task[vp.Received | None] | None,
    ) -> bool:
        """Sleep until there is progress, a line to be logged, or something was read.

        False when the front-end has hung up.
        """
        if connection is not None and reading is None:
            poller = select.poll()
            poller.register(connection.fileno(), select.POLLRDHUP)
            if poller.poll(0):
                return False
        self._progress.clear()
        # Looked at once more by the caller: what came true before is not missed for longer.
        left = report.left if reading is not None else min(report.left, HANG_UP_INTERVAL)
        waiter = asyncio.ensure_future(self._progress.wait())
        try:
            await asyncio.wait(
                {waiter} if reading is None else {waiter, reading},
                timeout=left,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            waiter.cancel()
        report.look()
        return True

    def _look_on(self) -> None:
        """Something that was waited for may have come true."""
        self._control.settle()
        self._progress.set()

    async def finish(self) -> None:
        """Wait until the device has ended what it works on for front-ends that have gone."""
        report = self._shutdown_log(lambda: self._control.remains)
        while self._failure is None and self._control.remains:
            await self._look(None, report, None)
        report.end()

    def close(self) -> None:
        """Take the device out of the loop, after `finish`. Harmless when repeated."""
        self._hang_up()
        for worker in self._workers:
            worker.stop()
        self._workers = []

    async def __aenter__(self) -> AsyncDaemon:
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            await self.finish()
        finally:
            self.close()


async def serve_async(
    device: VirtioDevice,
    path: str | os.PathLike[str] | Listener,
    *,
    engine: EngineName | None = None,
    mapper: Mapper | None = None,
    memory_slots: bool = True,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve `device` on the Unix socket `path` (or a `Listener`) in the running loop.

    Ends when cancelled; the device is closed then. No signal handlers are installed. The arguments
    are those of `serve`. Raises `ListenError` when the path cannot be listened on.
    """
    check_device(device)
    try:
        with path if isinstance(path, Listener) else Listener(path) as listener:
            async with AsyncDaemon(
                name_of(device),
                DeviceBackend.of(device),
                engine=engine,
                mapper=mapper,
                memory_slots=memory_slots,
            ) as daemon:
                if ready is None:
                    announce(daemon.name, listener)
                else:
                    ready()
                await daemon.serve(listener)
    finally:
        close_device(device)


def end_loop(loop: asyncio.AbstractEventLoop, error: BaseException) -> None:
    """Have the loop end with KeyboardInterrupt or SystemExit, which it lets out of a callback."""

    def end() -> None:
        raise error

    loop.call_soon(end)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Have the loop call the function, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits
        loop.call_soon_threadsafe(function)
