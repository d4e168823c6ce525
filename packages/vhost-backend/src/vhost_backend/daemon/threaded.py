"""The daemon: one device, one connection at a time, and the workers that serve its queues.

Threads: the connection's thread reads messages and runs the control plane. `start`, `start_client`
and `start_connection` make that thread; in `serve_forever` it is the caller's. Each worker serves
the queues of its mask. Workers live from the daemon's first start to its end, rings as long as a
connection.

Ending: `shutdown()` may be called from any thread and from a signal handler. It wakes the
connection's thread wherever that waits, which stops the rings; then the workers end. The daemon
waits for requests that the device works on: as long as the device can touch guest memory or its
medium, the memory stays mapped and the medium stays the device's. The daemon waits likewise when a
front-end hangs up; the next front-end's rings start afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from guest_memory import Mapper, MemoryHolder
from vhost_protocol import BackendConnection, FdLike, Received, Reply  # by name: at once
from virtqueue import EngineName

from ..adapter.checks import check_backend
from ..backend import VhostUserBackend
from ..control import Outcome
from ..epoll_handler import worker_type
from ..errors import BackendUsageError, VhostBackendError, is_shortage, kept
from ..fds.eventfd import WakeFd
from ..fds.listener import Listener
from ..vring.locks import VringMutex, VringRwLock
from .base import DaemonBase, Pause
from .conversation import Seen, answering, run

T = TypeVar("T")

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds between attempts of a client to connect: the first, and the longest after doubling.
RECONNECT_INTERVAL = (0.1, 5.0)


class VhostUserDaemon(DaemonBase):
    """Serves `backend` to one front-end, or to several one after another.

    `start(listener)` accepts one front-end and serves it on a thread; `wait` returns when that
    front-end has gone; `serve(path)` does both. `serve_forever` takes one front-end after another,
    until `shutdown`.

    Args:
        name: names the daemon's threads and log lines.
        backend: the device.
        memory: holds the current snapshot of guest memory; a new holder when None.
        mapper: maps regions; guest_memory's `MmapMapper` when None.
        engine: ring engine, "c" or "python"; None for VIRTQUEUE_ENGINE's or the best there is.
        vring: `VringMutex` (default) or `VringRwLock`.
        memory_slots: offer memory slots (CONFIGURE_MEM_SLOTS). The specification forbids postcopy
            migration together with them, so postcopy is offered only when this is False.
        drain_warning: seconds after which the log names the requests that a stop, a reset or the
            end of the daemon waits for. The next line comes after as long again, then after twice
            as long, and so on.
        busy_poll: the longest time in seconds that a worker looks at its rings before it sleeps.
            The worker adapts the time to the length of its sleeps. With 0 it sleeps at once.
        cpus: processors for the workers, in turn; when empty, workers are not bound to any.
    """

    def __init__(
        self,
        name: str,
        backend: VhostUserBackend,
        memory: MemoryHolder | None = None,
        *,
        mapper: Mapper | None = None,
        engine: EngineName | None = None,
        vring: type[VringMutex] | type[VringRwLock] = VringMutex,
        memory_slots: bool = True,
        drain_warning: float = 10.0,
        busy_poll: float = 0.0,
        cpus: Sequence[int] = (),
    ) -> None:
        check_backend(backend)
        self._stopping = False
        self._wake = WakeFd()
        self._progress = WakeFd()
        self._thread: threading.Thread | None = None
        #: The error of a worker that has ended, and with it the daemon.
        self._failure: BaseException | None = None
        #: The error that ended the last connection, if `wait` has not raised it yet.
        self._error: BaseException | None = None
        #: Held while front-ends are served.
        self._serving = threading.Lock()
        self._server: int | None = None
        self._closed = False
        super().__init__(
            name,
            backend,
            memory,
            mapper=mapper,
            engine=engine,
            vring=vring,
            memory_slots=memory_slots,
            drain_warning=drain_warning,
            worker_type=worker_type(backend),
            wake=self._progress.wake,
            busy_poll=busy_poll,
            cpus=cpus,
        )

    # -- running --------------------------------------------------------------------------------

    def start(self, listener: Listener) -> None:
        """Accept one front-end from `listener`, and serve it on a thread of the daemon's.

        Returns when a front-end has connected, or `shutdown` was called. `wait` returns at the end
        of the connection; then `start` may be called again. The listener stays the caller's.
        Raises `BackendUsageError` for a closed listener, or one whose only connection was served.
        """
        self._spawn(lambda: self._accept_one(listener), self._serve_connection)

    def start_client(self, path: str | os.PathLike[str], *, reconnect: bool = False) -> None:
        """Connect to a front-end that listens on `path`, and serve it on a thread of the daemon's.

        With `reconnect` that thread connects again, at growing intervals, whenever the connection
        is lost or refused. Without it `VhostBackendError` is raised when no front-end listens.
        """
        path = os.fspath(path)
        if reconnect:
            self._spawn(lambda: path, self._connect_all)
        else:
            self._spawn(lambda: _connect(path), self._serve_connection)

    def start_connection(self, connection: socket.socket) -> None:
        """Take over one connected socket, and serve it on a thread of the daemon's."""
        self._spawn(lambda: connection, self._serve_connection)

    def wait(self) -> None:
        """Wait until the front-end has gone, and raise the error that ended its connection.

        By then the device has ended all its requests. A hang-up is no error, nor is `shutdown`. A
        connection's error is raised once; the error of a worker that has ended is raised each time.
        Raises `BackendUsageError` on the daemon's own threads, as `close` does.
        """
        self._check_outside()
        if self._thread is None:
            if not self._stopping:
                raise BackendUsageError("the daemon was not started")
        else:
            self._thread.join()
        error, self._error = self._error, None
        if self._failure is not None:
            raise self._failure
        if error is not None:
            raise error

    def serve(self, path: str | os.PathLike[str]) -> None:
        """Listen on `path`, serve one front-end, and end the workers (and signal `exit_event`).

        Raises `ListenError`, and the errors of `wait`. Nothing ends when it cannot listen, or when
        another front-end is served.
        """
        with Listener(path) as listener:
            self._take()
            try:
                self._start_taken(lambda: self._accept(listener), self._serve_connection)
                self.wait()
            finally:
                # First: a worker that has ended completes none of its requests.
                self._end_connection()
                for worker in self._workers:
                    worker.send_exit_event()
                self.close()

    def serve_forever(self, where: Listener | str | os.PathLike[str]) -> None:
        """Serve front-ends one after another, on the caller's thread, until `shutdown`.

        `where` is a listener, which stays the caller's, or a path to listen on. An error that ends
        a connection is logged. Raises `ListenError`, and an error that ended a worker; on the main
        thread also `KeyboardInterrupt` and `SystemExit`.
        """
        self._take()
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._finish_remains)
                if not isinstance(where, Listener):
                    where = stack.enter_context(Listener(where))
                self._accept_all(where)
        finally:
            self._give_back()
        if self._failure is not None:
            raise self._failure

    @property
    def connected(self) -> bool:
        """Whether a front-end is being served now."""
        return self._connection is not None

    def shutdown(self) -> None:
        """End the daemon, from any thread or a signal handler.

        `wait` and `serve_forever` return once the device has ended its requests.
        """
        self._stopping = True
        self._wake.wake()
        self._progress.wake()
        # Shut only the receiving half: the front-end sees a hang-up when its requests have ended,
        # and can then read from the rings which ones did.
        self._shut(socket.SHUT_RD)

    def close(self) -> None:
        """Shut down, wait, and release the workers. Calling it again is harmless.

        Returns once the device has ended its requests, however long that takes. Raises
        `BackendUsageError` on the thread that serves, and on a worker's.
        """
        self._end_connection()
        for worker in self._workers:
            while not worker.stop(self._drain_warning):
                log.warning("%s: closing waits for a worker in the device's code", self.name)
        self._workers = []
        self._wake.close()
        self._progress.close()

    def _end_connection(self) -> None:
        """Shut down, and wait until the front-end and its requests have gone."""
        self._check_outside()
        self.shutdown()
        with self._serving:
            self._closed = True
        if self._thread is not None:
            self._thread.join()

    def _check_outside(self) -> None:
        """This thread is about to wait for the others: it must be none of them."""
        if self._server == threading.get_ident():
            raise BackendUsageError(
                "the thread that serves cannot wait for its own end: call shutdown() instead"
            )
        if any(worker.inside for worker in self._workers):
            raise BackendUsageError("a worker cannot wait for its own end: call shutdown() instead")

    def __enter__(self) -> VhostUserDaemon:
        try:
            self._start_workers()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _worker_failed(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = kept(error)
        self.shutdown()

    # -- the connection's thread ----------------------------------------------------------------

    def _take(self) -> None:
        """Make this thread the only one that takes front-ends."""
        if not self._serving.acquire(blocking=False):
            raise BackendUsageError("a front-end is served, or waited for, already")
        self._server = threading.get_ident()
        try:
            if self._closed:
                raise BackendUsageError("the daemon is closed")
            self._start_workers()
        except BaseException:
            self._give_back()
            raise

    def _give_back(self) -> None:
        self._server = None
        self._serving.release()

    def _spawn(
        self, get: Callable[[], T | None], serve: Callable[[T], BaseException | None]
    ) -> None:
        """`get` a front-end on this thread and `serve` it on one of the daemon's."""
        self._take()
        self._start_taken(get, serve)

    def _start_taken(
        self, get: Callable[[], T | None], serve: Callable[[T], BaseException | None]
    ) -> None:
        """`_spawn` after `_take`."""
        front_end: T | None = None
        thread: threading.Thread | None = None
        try:
            front_end = get()
            if front_end is not None:
                thread = threading.Thread(
                    target=self._work, args=(serve, front_end), name=f"{self.name}-control"
                )
                thread.daemon = True
                self._error = None
                # From here on this thread may wait for that one, which says so when it runs.
                self._server = None
                thread.start()
                self._thread = thread
                return
        except BaseException:
            if thread is None or thread.ident is None:  # otherwise it runs, and gives back itself
                if isinstance(front_end, socket.socket):
                    front_end.close()
                self._give_back()
            raise
        self._give_back()

    def _work(self, serve: Callable[[T], BaseException | None], front_end: T) -> None:
        self._server = threading.get_ident()
        error: BaseException | None = None
        try:
            try:
                error = serve(front_end)
            finally:
                self._finish_remains()
        except BaseException as unexpected:
            log.critical("%s: the daemon ends", self.name, exc_info=unexpected)
            error = unexpected
        self._error = None if error is None else kept(error)
        self._give_back()

    def _accept_all(self, listener: Listener) -> None:
        while True:
            connection = self._accept(listener)
            if connection is None:
                return
            self._serve_connection(connection)

    def _accept_one(self, listener: Listener) -> socket.socket | None:
        connection = self._accept(listener)
        if connection is None and not self._stopping:
            raise BackendUsageError("the listener is closed: no front-end can connect")
        return connection

    def _accept(self, listener: Listener) -> socket.socket | None:
        """Wait for the next connection; None when the daemon ends or the listener is closed."""
        if listener.connected:
            return listener.accept() if listener.fileno() >= 0 else None
        if listener.fileno() >= 0:
            # Somebody else may listen there, too, and be faster.
            listener.socket.setblocking(False)
        pause = Pause()
        while listener.fileno() >= 0 and self._wait_readable(listener.fileno()):
            try:
                return listener.accept()
            except OSError as error:
                self._sleep(self._not_accepted(error, pause))
        return None

    def _finish_remains(self) -> None:
        """Wait for requests that still run: their memory must stay mapped."""
        what = "the end of the daemon" if self._stopping else "the end of the last connection"
        report = self._wait_log(what, self._left)
        while self._failure is None and self._control.remains:
            self._poll({}, report.left)
            self._control.settle()
            report.look()
        report.end()

    def _connect_all(self, path: str) -> None:
        """Connect to `path` and serve the front-end, again and again until the daemon ends."""
        interval = RECONNECT_INTERVAL[0]
        while not self._stopping:
            begin = time.monotonic()
            try:
                connection = _connect(path)
            except VhostBackendError as error:
                if is_shortage(error):
                    self._shortages.error(
                        "%s: cannot connect, as this machine is short: %s", self.name, error
                    )
            else:
                self._serve_connection(connection)
                if time.monotonic() - begin > RECONNECT_INTERVAL[1]:
                    interval = RECONNECT_INTERVAL[0]
            # Sleep after a connection, too: one that ends at once is no better than none.
            self._sleep(interval)
            interval = min(interval * 2, RECONNECT_INTERVAL[1])

    def _serve_connection(self, sock: socket.socket) -> BaseException | None:
        """Serve one front-end until it hangs up; returns an error that ended the connection."""
        connection = BackendConnection(sock)
        self._connection = sock
        conversation = self._begin(connection.session, line := _ThreadLine(self, connection))
        found: BaseException | None = None
        try:
            run(conversation.hold())
        except BaseException as error:
            found = error if _ends_the_caller(error) else self._report(error)
        try:
            try:
                if self._stopping and not line.closed:
                    run(conversation.finish_requests(lambda: self._failure is not None))
            finally:
                self._end(conversation, connection.close)
        except BaseException as error:
            found = error if _ends_the_caller(error) else self._report(error)
        if found is not None and _ends_the_caller(found):
            raise found
        return found

    def _wait_readable(self, fd: int) -> bool:
        """Wait for `fd`; False when the daemon ends. Meanwhile start rings that can start now."""
        while not self._stopping:
            if self._poll({fd: select.POLLIN}, self._remains.look()):
                return not self._stopping
        return False

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping:
            left = end - time.monotonic()
            if left <= 0:
                return
            due = self._remains.look()
            self._poll({}, left if due is None else min(left, due))

    def _poll(self, wanted: dict[int, int], seconds: float | None) -> dict[int, int]:
        """Sleep until there are events, progress, the daemon's end, or `seconds` are over.

        Returns the events by descriptor.
        """
        poller = select.poll()
        if not self._stopping:
            poller.register(self._wake.fd, select.POLLIN)
        poller.register(self._progress.fd, select.POLLIN)
        for fd, events in wanted.items():
            poller.register(fd, events)
        found = dict(poller.poll(None if seconds is None else int(seconds * 1000) + 1))
        if found.pop(self._progress.fd, 0):
            self._progress.clear()
        found.pop(self._wake.fd, None)
        return found


class _ThreadLine:
    """A connection whose thread blocks in every wait, so that its coroutines never suspend."""

    def __init__(self, daemon: VhostUserDaemon, connection: BackendConnection) -> None:
        self._daemon = daemon
        self._connection = connection

    @property
    def closed(self) -> bool:
        return self._connection.closed

    @property
    def stopping(self) -> bool:
        return self._daemon._stopping

    async def look(self, seconds: float | None, *, reading: bool) -> Seen:
        # When the daemon ends it has shut the receiving half itself: that is no hang-up.
        wanted = (select.POLLIN if reading else 0) | (0 if self.stopping else select.POLLRDHUP)
        fd = self._connection.fileno()
        events = self._daemon._poll({fd: wanted}, seconds).get(fd, 0)
        if events & ~select.POLLIN:
            return Seen.HANG_UP
        return Seen.MESSAGE if events else Seen.NOTHING

    async def receive(self) -> Received | None:
        return self._connection.receive()

    async def handle(self, received: Received) -> Outcome:
        return self._daemon._control.handle(received.message, received.fds)

    async def reply(self, received: Received, message: Reply, fds: Sequence[FdLike]) -> None:
        with answering(self._connection):
            self._connection.reply(received, message, fds)

    async def acknowledge(self, received: Received, ok: bool) -> bool:
        with answering(self._connection):
            return self._connection.acknowledge(received, ok)


def _ends_the_caller(error: BaseException) -> bool:
    """Whether it is Ctrl-C or sys.exit() in a signal handler, which only the main thread runs.

    On a thread of the daemon's a hook has raised whatever it is.
    """
    main = threading.current_thread() is threading.main_thread()
    return main and isinstance(error, KeyboardInterrupt | SystemExit)


def _connect(path: str) -> socket.socket:
    """Connect to the front-end that listens on `path`. Raises `VhostBackendError`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Do not wait for a front-end whose queue of connections is full: that is an error, too.
        connection.setblocking(False)
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise VhostBackendError(f"{path}: {error.strerror}") from error
    return connection
