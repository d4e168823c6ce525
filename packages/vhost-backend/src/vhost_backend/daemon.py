"""The daemon: one device, one connection at a time, and the workers that serve its queues.

Threads: the connection's thread (made by `start` or `start_client`, or the caller's in `serve`)
reads messages and runs the control plane; each worker serves the queues of its mask. Workers live
as long as the daemon, rings as long as a connection.

Ending: `shutdown()` may be called from any thread and from a signal handler. It wakes the
connection's thread wherever it waits, rings are stopped, workers end. Requests that a handler is
still working on are given `drain_timeout` seconds; what completes later touches nothing.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from guest_memory import Mapper, MemoryHolder
from vhost_protocol import BackendConnection  # by name: imported before anybody connects

from .backend import VhostUserBackend
from .composition import DaemonBase, close_lent
from .control import Answer, Wait
from .errors import BackendUsageError, Refused, VhostBackendError, kept
from .eventfd import WakeFd
from .listener import Listener
from .vring_locks import VringMutex, VringRwLock
from .worker import VringEpollHandler

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds between attempts of a client to connect: the first, and the longest after doubling.
RECONNECT_INTERVAL = (0.1, 5.0)


class VhostUserDaemon(DaemonBase):
    """Serves `backend` to front-ends that connect one after another.

    Args:
        name: names the daemon's threads and log lines.
        backend: the device.
        memory: holds the current snapshot of guest memory; a new holder when None.
        mapper: how regions are mapped; guest_memory's mmap when None.
        engine: ring engine, "c" or "python"; None for VIRTQUEUE_ENGINE's or the best there is.
        vring: `VringMutex` (default) or `VringRwLock`.
        memory_slots: offer memory slots (CONFIGURE_MEM_SLOTS). The specification forbids postcopy
            migration together with them, so that is offered only when this is False.
        drain_timeout: seconds that requests in flight get when a ring is stopped.
        busy_poll: the longest time in seconds that a worker looks at its rings before it sleeps;
            the time is adapted to how long sleeps are. 0: it sleeps at once.
        cpus: processors for the workers, in turn; none are given to any.
    """

    def __init__(
        self,
        name: str,
        backend: VhostUserBackend,
        memory: MemoryHolder | None = None,
        *,
        mapper: Mapper | None = None,
        engine: str | None = None,
        vring: type[VringMutex] | type[VringRwLock] = VringMutex,
        memory_slots: bool = True,
        drain_timeout: float = 10.0,
        busy_poll: float = 0.0,
        cpus: Sequence[int] = (),
    ) -> None:
        self._stopping = False
        self._wake = WakeFd()
        self._progress = WakeFd()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        super().__init__(
            name,
            backend,
            memory,
            mapper=mapper,
            engine=engine,
            vring=vring,
            memory_slots=memory_slots,
            drain_timeout=drain_timeout,
            # A back-end of this package says which kind of worker it needs; any other gets plain
            # threads.
            worker_type=getattr(backend, "worker_type", VringEpollHandler),
            wake=self._progress.wake,
            busy_poll=busy_poll,
            cpus=cpus,
        )
        for worker in self._workers:
            worker.start()

    # -- running --------------------------------------------------------------------------------

    def start(self, listener: Listener) -> None:
        """Accept front-ends from `listener`, one after another, on a thread of the daemon's.

        The listener stays the caller's. Use `wait` for the end.
        """
        self._spawn(lambda: self._accept_all(listener))

    def start_client(self, path: str | os.PathLike[str], *, reconnect: bool = True) -> None:
        """Connect to a front-end that listens on `path`, on a thread of the daemon's.

        With `reconnect` it connects again whenever the connection is lost or not to be had, at
        intervals that grow; without, the daemon ends with the connection.
        """
        self._spawn(lambda: self._connect_all(os.fspath(path), reconnect))

    def start_connection(self, connection: socket.socket) -> None:
        """Serve one connected socket, which the daemon takes over, on a thread of the daemon's."""
        self._spawn(lambda: self._serve_connection(connection))

    def wait(self) -> None:
        """Wait until the daemon has ended; raises what ended it, if it was not `shutdown`."""
        if self._thread is None:
            raise BackendUsageError("the daemon was not started")
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def serve(self, path: str | os.PathLike[str]) -> None:
        """Listen on `path` and serve until `shutdown`. Raises `ListenError`."""
        with Listener(path) as listener:
            self.start(listener)
            self.wait()

    @property
    def connected(self) -> bool:
        """Whether a front-end is being served now."""
        return self._connection is not None

    def shutdown(self) -> None:
        """End the daemon, from any thread or a signal handler; `wait` returns soon after."""
        self._stopping = True
        self._wake.wake()
        self._progress.wake()
        self._hang_up()

    def close(self) -> None:
        """Shut down, wait, and release the workers. Harmless when repeated."""
        self.shutdown()
        if self._thread is not None:
            self._thread.join()
        for worker in self._workers:
            if not worker.stop(self._drain_timeout):
                log.warning("%s: a worker is stuck in a handler and is left behind", self.name)
        self._workers = []
        self._wake.close()
        self._progress.close()

    def __enter__(self) -> VhostUserDaemon:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the connection's thread ----------------------------------------------------------------

    def _spawn(self, target: Callable[[], None]) -> None:
        if self._thread is not None:
            raise BackendUsageError("the daemon was started already")

        def run() -> None:
            try:
                target()
            except BaseException as error:
                self._failure = kept(error)

        self._thread = threading.Thread(target=run, name=f"{self.name}-control", daemon=True)
        self._thread.start()

    def _accept_all(self, listener: Listener) -> None:
        if listener.connected:
            self._serve_connection(listener.accept())
            return
        while self._wait_readable(listener.fileno()):
            try:
                connection = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            self._serve_connection(connection)

    def _connect_all(self, path: str, reconnect: bool) -> None:
        interval = RECONNECT_INTERVAL[0]
        while not self._stopping:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # A front-end whose queue of connections is full is one that is not to be had.
            connection.setblocking(False)
            begin = time.monotonic()
            try:
                connection.connect(path)
            except OSError as error:
                connection.close()
                if not reconnect:
                    raise VhostBackendError(f"{path}: {error.strerror}") from None
            else:
                self._serve_connection(connection)
                if not reconnect:
                    return
                if time.monotonic() - begin > RECONNECT_INTERVAL[1]:
                    interval = RECONNECT_INTERVAL[0]
            # Also after a connection: one that ends at once is no better than none.
            self._sleep(interval)
            interval = min(interval * 2, RECONNECT_INTERVAL[1])

    def _serve_connection(self, sock: socket.socket) -> None:
        self._connection = sock
        connection = BackendConnection(sock)
        self._control.connect(connection.session)
        log.info("%s: a front-end has connected", self.name)
        try:
            if not self._stopping:
                self._converse(connection)
        except Exception as error:
            self._report(error)
        finally:
            self._connection = None
            self._release()
            connection.close()
            log.info("%s: the front-end has gone", self.name)

    def _converse(self, connection: BackendConnection) -> None:
        while not self._stopping:
            self._control.wait_for_message(connection.fileno())
            received = connection.receive()
            if received is None:
                return
            with received:
                try:
                    outcome = self._control.handle(received.message, received.fds)
                except Refused as error:
                    # Where no answer can say "no", only hanging up can.
                    if not connection.acknowledge(received, False):
                        raise
                    log.warning("%s: %s", self.name, error)
                    continue
                if isinstance(outcome, Wait):
                    self._wait_for(outcome.ready, connection, outcome.what)
                    outcome = outcome.finish()
                if isinstance(outcome, Answer):
                    try:
                        connection.reply(received, outcome.message, outcome.fds)
                    finally:
                        close_lent(outcome)
                else:
                    connection.acknowledge(received, True)

    def _release(self) -> None:
        """The front-end is gone: let requests in flight end, then forget its rings and memory."""
        busy = self._control.begin_disconnect()
        self._wait_for(lambda: self._drained(busy), None, "rings drain")
        self._control.disconnect()

    def _wait_for(
        self, ready: Callable[[], bool], connection: BackendConnection | None, what: str
    ) -> None:
        """Wait until `ready()`, for the time a drain may take. Workers go on meanwhile.

        A front-end that hangs up ends its wait.
        """
        deadline = time.monotonic() + self._drain_timeout
        poller = select.poll()
        poller.register(self._progress.fd, select.POLLIN)
        if connection is not None:
            poller.register(connection.fileno(), select.POLLRDHUP)
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                self._late(what)
                return
            for fd, _ in poller.poll(left * 1000):
                if fd != self._progress.fd:
                    return
                self._progress.clear()

    def _wait_readable(self, fd: int) -> bool:
        """Wait for `fd` or the end; False for the end."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._wake.fd, select.POLLIN)
        while not self._stopping:
            if any(ready == fd for ready, _ in poller.poll()):
                return not self._stopping
        return False

    def _sleep(self, seconds: float) -> None:
        if not self._stopping:
            poller = select.poll()
            poller.register(self._wake.fd, select.POLLIN)
            poller.poll(seconds * 1000)
