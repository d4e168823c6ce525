"""The daemon: one device, one connection at a time, and the workers that serve its queues.

Threads: the connection's thread (made by `start` or `start_client`, or the caller's in `serve`)
reads messages and runs the control plane; each worker serves the queues of its mask. Workers live
as long as the daemon, rings as long as a connection.

Ending: `shutdown()` may be called from any thread and from a signal handler. It wakes the
connection's thread wherever it waits, rings are stopped, workers end. Requests that the device
works on are waited for: while it can touch guest memory or its medium, the memory stays mapped and
the medium the device's. The same when a front-end hangs up; the next one's rings start after that.
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
from vhost_protocol import BackendConnection, Received  # by name: before anybody connects
from virtqueue import EngineName

from ..adapter.checks import check_backend
from ..backend import VhostUserBackend
from ..control import Answer, Wait
from ..epoll_handler import worker_type
from ..errors import BackendUsageError, Refused, VhostBackendError, is_shortage, kept
from ..fds.eventfd import WakeFd
from ..fds.listener import Listener
from ..vring.locks import VringMutex, VringRwLock
from .base import DaemonBase, Pause, close_lent
from .waiting import WaitLog

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
        drain_warning: seconds after which the log names the requests that a stop, a reset or the
            end of the daemon waits for; it says so again after as long, twice as long, and so on.
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
        self._failure: BaseException | None = None
        self._remains_report: WaitLog | None = None
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
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self.close()
            raise

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
        """End the daemon, from any thread or a signal handler.

        `wait` returns as soon as the device has ended the requests that it works on.
        """
        self._stopping = True
        self._wake.wake()
        self._progress.wake()
        # The front-end sees no hang-up before its requests have ended: then it can tell from the
        # rings which ones did.
        self._shut(socket.SHUT_RD)

    def close(self) -> None:
        """Shut down, wait, and release the workers. Harmless when repeated.

        Returns when the device has ended the requests that it works on, however long that takes.
        """
        self.shutdown()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        for worker in self._workers:
            while not worker.stop(self._drain_warning):
                log.warning("%s: closing waits for a worker in the device's code", self.name)
        self._workers = []
        self._wake.close()
        self._progress.close()

    def __enter__(self) -> VhostUserDaemon:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _worker_failed(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = kept(error)
        self.shutdown()

    # -- the connection's thread ----------------------------------------------------------------

    def _spawn(self, target: Callable[[], None]) -> None:
        if self._thread is not None:
            raise BackendUsageError("the daemon was started already")

        def run() -> None:
            try:
                try:
                    target()
                finally:
                    self._finish_remains()
            except BaseException as error:
                if not isinstance(error, VhostBackendError):  # which says enough where it is raised
                    log.critical("%s: the daemon ends", self.name, exc_info=error)
                self._failure = kept(error)

        self._thread = threading.Thread(target=run, name=f"{self.name}-control", daemon=True)
        self._thread.start()

    def _accept_all(self, listener: Listener) -> None:
        if listener.connected:
            self._serve_connection(listener.accept())
            return
        pause = Pause()
        # A listener that was closed brings nobody any more.
        while listener.fileno() >= 0 and self._wait_readable(listener.fileno()):
            try:
                connection = listener.accept()
            except OSError as error:
                self._sleep(self._not_accepted(error, pause))
                continue
            pause = Pause()
            self._serve_connection(connection)

    def _finish_requests(self, connection: BackendConnection) -> None:
        """The daemon ends, and the front-end is still there: show it how its requests end."""
        ended = self._control.end_requests()
        report = self._shutdown_log(lambda: range(len(self.vrings)))
        # A worker that has ended by itself leaves requests behind that nothing works on.
        while self._failure is None and not ended():
            if self._look(connection, report, reading=False) & select.POLLHUP:
                return
        report.end()

    def _finish_remains(self) -> None:
        """The daemon ends: nothing may be unmapped or let go of under a request that still runs."""
        report = self._shutdown_log(lambda: self._control.remains)
        while self._failure is None and self._control.remains:
            self._look(None, report)
        report.end()

    def _connect_all(self, path: str, reconnect: bool) -> None:
        interval = RECONNECT_INTERVAL[0]
        while not self._stopping:
            begin = time.monotonic()
            connection: socket.socket | None = None
            try:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                # A front-end whose queue of connections is full is one that is not to be had.
                connection.setblocking(False)
                connection.connect(path)
            except OSError as error:
                if connection is not None:
                    connection.close()
                if is_shortage(error):
                    self._shortages.error(
                        "%s: cannot connect, as this machine is short: %s", self.name, error
                    )
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
        except BaseException as error:
            # On this thread no signal's exception comes: whatever it is, a hook has raised it.
            self._report(error)
        finally:
            if self._stopping and not connection.closed:
                self._finish_requests(connection)
            self._connection = None
            self._ahead.close()
            try:
                self._control.disconnect()
            except BaseException as error:
                self._report(error)
            connection.close()
            log.info("%s: the front-end has gone", self.name)

    def _converse(self, connection: BackendConnection) -> None:
        while not self._stopping:
            received = self._ahead.next()
            if received is None:
                if self._control.remains and not self._wait_readable(connection.fileno()):
                    return
                self._control.wait_for_message(connection.fileno())
                received = connection.receive()
            if received is None or not self._serve(connection, received):
                return

    def _serve(self, connection: BackendConnection, received: Received) -> bool:
        """Handle one message and answer it; False when the conversation has ended meanwhile."""
        with received:
            try:
                outcome = self._control.handle(received.message, received.fds)
            except Refused as error:
                # Where no answer can say "no", only hanging up can.
                if not connection.acknowledge(received, False):
                    raise
                self._refused(error)
                return True
            if isinstance(outcome, Wait):
                if not self._wait_for(outcome, connection):
                    return False
                outcome = outcome.finish()
            if isinstance(outcome, Answer):
                try:
                    connection.reply(received, outcome.message, outcome.fds)
                finally:
                    close_lent(outcome)
            else:
                connection.acknowledge(received, True)
            return True

    def _wait_for(self, wait: Wait, connection: BackendConnection) -> bool:
        """Wait until the device has ended what a message waits for. Workers go on meanwhile.

        False when the front-end hangs up, or the daemon is told to end, before.
        """
        report = self._wait_log(wait.what, lambda: wait.rings)
        while not wait.ready():
            if self._stopping:
                return False
            events = self._look(connection, report)
            if events & ~select.POLLIN:
                return False
            if events:
                received = connection.receive()
                if received is None:
                    return False
                if self._ahead.goes_first(received) and not self._serve(connection, received):
                    return False
        report.end()
        return True

    def _look(
        self, connection: BackendConnection | None, report: WaitLog, *, reading: bool = True
    ) -> int:
        """Sleep until there is progress, a line to be logged, or something from `connection`.

        Returns the events there.
        """
        poller = select.poll()
        poller.register(self._progress.fd, select.POLLIN)
        if connection is not None:
            wanted = select.POLLRDHUP if reading else 0
            if reading and not self._ahead.full:
                wanted |= select.POLLIN
            poller.register(connection.fileno(), wanted)
        found = 0
        for fd, events in poller.poll(int(report.left * 1000) + 1):
            if fd == self._progress.fd:
                self._progress.clear()
            else:
                found = events
        self._control.settle()
        report.look()
        return found

    def _wait_readable(self, fd: int) -> bool:
        """Wait for `fd` or the end; False for the end."""
        while not self._stopping:
            if fd in self._idle(fd, None):
                return not self._stopping
        return False

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping:
            left = end - time.monotonic()
            if left <= 0:
                return
            self._idle(-1, left)

    def _idle(self, fd: int, seconds: float | None) -> list[int]:
        """Wait for `fd`, the end, or `seconds`; see to what remains of the last front-end."""
        poller = select.poll()
        if fd >= 0:
            poller.register(fd, select.POLLIN)
        poller.register(self._wake.fd, select.POLLIN)
        poller.register(self._progress.fd, select.POLLIN)
        if not self._control.remains:
            self._remains_report = None
        elif self._remains_report is None:
            self._remains_report = self._wait_log(
                "the end of the last connection", lambda: self._control.remains
            )
        report = self._remains_report
        if report is not None:
            seconds = report.left if seconds is None else min(seconds, report.left)
        ready = [found for found, _ in poller.poll(None if seconds is None else seconds * 1000 + 1)]
        if self._progress.fd in ready:
            self._progress.clear()
        self._control.settle()
        if report is not None and self._control.remains:
            report.look()
        return ready
