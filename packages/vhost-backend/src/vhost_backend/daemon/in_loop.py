"""A daemon without threads: control plane and device in the caller's event loop.

The connection is a task. The loop serves a queue when its kick descriptor is readable, and runs
each call of an `async def handle` as a task. A plain `handle` or `handle_batch` blocks the loop
while it works. Two things still have threads of their own, because they wait for a peer: the
transfer of a device's state in a migration, and the timer of an IOTLB miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import vhost_protocol as vp
from guest_memory import Mapper, MemoryHolder
from vhost_protocol import AsyncBackendConnection  # by name: imported before a front-end connects
from virtqueue import EngineName

from ..adapter.checks import check_backend, check_device
from ..adapter.coroutines import AsyncVringEpollHandler
from ..adapter.device_backend import DeviceBackend
from ..backend import VhostUserBackend
from ..control import Outcome
from ..device.base import VirtioDevice, close_device, name_of
from ..errors import BackendUsageError, kept
from ..fds.listener import Listener, announce
from ..vring.locks import VringMutex
from .base import DaemonBase, Pause, say_another_waits
from .conversation import Seen, answering
from .metrics import served_metrics

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds between looks for a hang-up, while no more messages are read from a connection.
HANG_UP_INTERVAL = 0.05


class LoopWorker(AsyncVringEpollHandler):
    """A worker that runs in the running event loop, and has no thread."""

    _started = False

    def start(self) -> None:
        """Have the loop watch the queues."""
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(self._epoll.fileno(), self._turn)
        self._started = True
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
        if self._started:
            self._loop.remove_reader(self._epoll.fileno())
            self.leave()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return super().stop(timeout)


class AsyncDaemon(DaemonBase):
    """`VhostUserDaemon` in the running event loop; an asynchronous context manager.

    The parameters are `VhostUserDaemon`'s. Call all methods in the loop that was running when the
    object was made. To end the daemon, cancel the task that serves.

    `busy_poll` keeps the loop from sleeping for up to that long after the last request; other tasks
    run between two looks at the rings. `cpus` bind the loop's thread until the daemon is closed.
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
        busy_poll: float = 0.0,
        cpus: Sequence[int] = (),
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
            busy_poll=busy_poll,
            cpus=cpus,
        )
        self._cpus = frozenset(cpus)
        self._cpus_before: set[int] | None = None
        self._failure: BaseException | None = None
        self._task: asyncio.Task[Any] | None = None
        #: Whether `_task` was cancelled because of `_failure`.
        self._told = False
        self._closed = False
        if isinstance(backend, DeviceBackend):
            backend.on_exit = lambda error: end_loop(loop, error)

    async def serve(self, path: str | os.PathLike[str]) -> None:
        """Listen on `path`, serve one front-end, and take the device out of the loop.

        Raises `ListenError`, and the errors of `serve_connection`.
        """
        with Listener(path) as listener, self._ended_by_a_worker():
            try:
                await self.serve_connection(await self._accept(listener))
            finally:
                await self.__aexit__()

    async def serve_forever(self, where: Listener | str | os.PathLike[str]) -> None:
        """Serve front-ends one after another, until cancelled.

        `where` is a listener, which stays the caller's, or a path to listen on. An error that ends
        a connection is logged. Raises `ListenError`, and an error that ended a worker.
        """
        with contextlib.ExitStack() as stack:
            if not isinstance(where, Listener):
                where = stack.enter_context(Listener(where))
            with self._ended_by_a_worker():
                await self._accept_all(where)

    async def serve_connection(self, sock: socket.socket) -> None:
        """Take over one connected socket, and serve it until the front-end hangs up.

        Raises an error that ended the connection or a worker, and `BackendUsageError` while another
        task serves.
        """
        with contextlib.closing(sock), self._ended_by_a_worker():
            error = await self._serve_connection(sock)
        if error is not None:
            raise kept(error)

    @contextlib.contextmanager
    def _ended_by_a_worker(self) -> Iterator[None]:
        """When a worker fails, cancel the task that serves here and raise the worker's error."""
        if self._closed:
            raise BackendUsageError("the daemon is closed")
        if self._failure is not None:
            raise self._failure
        task = asyncio.current_task()
        if self._task is not None:
            if self._task is not task:
                raise BackendUsageError("a front-end is served, or waited for, already")
            yield
            return
        self._task = task
        before = 0 if task is None else task.cancelling()
        try:
            yield
        except asyncio.CancelledError:
            if task is None or not self._told or task.uncancel() > before:
                raise  # somebody else has cancelled the task, too
            assert self._failure is not None
            raise self._failure from None
        finally:
            self._task = None

    async def _accept_all(self, listener: Listener) -> None:
        while True:
            connection = await self._accept(listener)
            with self._watching(listener):
                await self._serve_connection(connection)
            if listener.fileno() < 0:  # the listener was the connection itself
                return

    async def _accept(self, listener: Listener) -> socket.socket:
        if listener.connected:
            return listener.accept()
        loop = asyncio.get_running_loop()
        listener.socket.setblocking(False)
        pause = Pause()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener.socket)
            except OSError as error:
                await asyncio.sleep(self._not_accepted(error, pause))
            else:
                return connection

    @contextlib.contextmanager
    def _watching(self, listener: Listener) -> Iterator[None]:
        """Log it when another front-end connects to `listener` meanwhile."""
        loop, fd = asyncio.get_running_loop(), listener.fileno()

        def another() -> None:
            loop.remove_reader(fd)
            say_another_waits(self.name)

        if fd >= 0:
            loop.add_reader(fd, another)
        try:
            yield
        finally:
            if fd >= 0:
                loop.remove_reader(fd)

    async def _serve_connection(self, sock: socket.socket) -> BaseException | None:
        """Serve one front-end until it hangs up; returns an error that ended the connection."""
        self._start_workers()
        for worker in self._workers:
            assert isinstance(worker, LoopWorker)
            worker.run_in(asyncio.current_task())
        connection = AsyncBackendConnection(sock)
        self._connection = sock
        conversation = self._begin(connection.session, _LoopLine(self, connection))
        try:
            await conversation.hold()
        except (KeyboardInterrupt, SystemExit):
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                await conversation.finish_requests(lambda: self._failure is not None)
                raise
            return self._report(error)  # a hook of the device raised it
        except BaseException as error:
            return self._report(error)
        finally:
            self._end(conversation, connection.close)
        return None

    def _start_workers(self) -> None:
        if self._cpus and self._cpus_before is None:
            self._cpus_before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._cpus)
        super()._start_workers()

    def _worker_failed(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = kept(error)
        if self._task is not None and not self._told:
            self._told = self._task.cancel()

    async def _sleep(self, seconds: float | None) -> None:
        """Sleep until there is progress, at most `seconds`."""
        self._progress.clear()
        # No progress is lost: the caller looks at its condition before it sleeps again.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._progress.wait()

    def _look_on(self) -> None:
        """Start rings that can start now, and wake the connection's task to look again."""
        self._control.settle()
        self._progress.set()

    async def finish(self) -> None:
        """Wait until the device has ended the requests of front-ends that have gone."""
        report = self._wait_log("the end of the daemon", self._left)
        while self._failure is None and self._control.remains:
            await self._sleep(report.left)
            report.look()
        report.end()

    def close(self) -> None:
        """Take the device out of the loop, after `finish`. Calling it again is harmless."""
        self._closed = True
        self._hang_up()
        for worker in self._workers:
            worker.stop()
        self._workers = []
        if self._cpus_before is not None:
            os.sched_setaffinity(0, self._cpus_before)
            self._cpus_before = None

    async def __aenter__(self) -> AsyncDaemon:
        if self._closed:
            raise BackendUsageError("the daemon is closed")
        try:
            self._start_workers()
        except BaseException:
            self.close()
            raise
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
    metrics: str | None = None,
    busy_poll: float = 0.0,
    cpus: Sequence[int] = (),
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve `device` on the Unix socket `path` (or a `Listener`) in the running loop.

    It ends when cancelled, and then closes the device. It installs no signal handlers; a program
    that wants SIGUSR1 to print the counters uses `loop.add_signal_handler` with `AsyncDaemon` and
    `report`. The arguments are those of `serve`, with `busy_poll` and `cpus` as in `AsyncDaemon`. A
    thread serves `metrics`. Raises `ListenError` when the path cannot be listened on.
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
                busy_poll=busy_poll,
                cpus=cpus,
            ) as daemon:
                with served_metrics(metrics, [daemon]):
                    if ready is None:
                        announce(daemon.name, listener)
                    else:
                        ready()
                    await daemon.serve_forever(listener)
    finally:
        close_device(device)


class _LoopLine:
    """A connection whose conversation is a task of the loop."""

    #: Always False: the task that serves is cancelled instead.
    stopping = False

    def __init__(self, daemon: AsyncDaemon, connection: AsyncBackendConnection) -> None:
        self._daemon = daemon
        self._connection = connection

    @property
    def closed(self) -> bool:
        return self._connection.closed

    async def look(self, seconds: float | None, *, reading: bool) -> Seen:
        loop, fd = asyncio.get_running_loop(), self._connection.fileno()
        seen = _seen(fd, reading)
        if seen is not Seen.NOTHING:
            return seen
        if reading:
            loop.add_reader(fd, self._daemon._progress.set)
        else:
            # asyncio cannot watch for a hang-up alone: unread messages make the socket readable.
            seconds = HANG_UP_INTERVAL if seconds is None else min(seconds, HANG_UP_INTERVAL)
        try:
            await self._daemon._sleep(seconds)
        finally:
            if reading:
                loop.remove_reader(fd)
        return _seen(fd, reading)

    async def receive(self) -> vp.Received | None:
        return await self._connection.receive()

    async def handle(self, received: vp.Received) -> Outcome:
        control = self._daemon._control
        if isinstance(received.message, vp.CheckDeviceState):
            # On a thread: the handler waits for the thread of the transfer.
            return await asyncio.to_thread(control.handle, received.message, received.fds)
        return control.handle(received.message, received.fds)

    async def reply(
        self, received: vp.Received, message: vp.Reply, fds: Sequence[vp.FdLike]
    ) -> None:
        with answering(self._connection):
            await self._connection.reply(received, message, fds)

    async def acknowledge(self, received: vp.Received, ok: bool) -> bool:
        with answering(self._connection):
            return await self._connection.acknowledge(received, ok)


def _seen(fd: int, reading: bool) -> Seen:
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP | (select.POLLIN if reading else 0))
    events = dict(poller.poll(0)).get(fd, 0)
    if events & ~select.POLLIN:
        return Seen.HANG_UP
    return Seen.MESSAGE if events else Seen.NOTHING


def end_loop(loop: asyncio.AbstractEventLoop, error: BaseException) -> None:
    """End the loop with KeyboardInterrupt or SystemExit, which asyncio raises out of a callback."""

    def end() -> None:
        raise error

    loop.call_soon(end)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Have the loop call the function, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits
        loop.call_soon_threadsafe(function)
