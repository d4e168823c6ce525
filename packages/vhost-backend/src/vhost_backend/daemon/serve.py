"""`serve` and `serve_all`: run devices on their sockets until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType

from guest_memory import Mapper
from virtqueue import EngineName

from ..adapter.checks import check_device
from ..adapter.device_backend import DeviceBackend
from ..device.base import VirtioDevice, close_device, name_of
from ..errors import VhostBackendError, kept
from ..fds.listener import Listener, announce
from .base import say_another_waits
from .descriptor_limit import raise_limit
from .metrics import served_metrics
from .report import lines
from .threaded import VhostUserDaemon

log: logging.Logger = logging.getLogger("vhost_backend")


def serve(
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
    """Serve `device` on the Unix socket `path` (or a `Listener`) until SIGTERM, SIGINT or SIGHUP.

    It first waits for the requests that the device works on; the log says when that takes long. A
    second SIGTERM or SIGINT ends the process at once.

    `ready` is called once front-ends can connect. Without it the path is logged (INFO), or printed
    on stderr in a program without logging. The soft limit of open files is raised as needed.

    Front-ends are served one after another; the device keeps its state in between and is closed at
    the end. SIGUSR1 prints each queue's counters on stderr. Signal handlers are installed on the
    main thread only; on another thread the daemon runs until the process ends. A SIGHUP that is
    ignored (nohup) stays ignored.

    `engine`, `mapper`, `memory_slots`, `busy_poll` and `cpus` are `VhostUserDaemon`'s. `metrics` is
    the address to serve the counters to Prometheus: `unix:PATH`, or `HOST:PORT` on loopback.

    Raises `ListenError` when the path cannot be listened on, `BackendUsageError` for a device that
    cannot work.
    """
    serve_all(
        [(device, path)],
        engine=engine,
        mapper=mapper,
        memory_slots=memory_slots,
        metrics=metrics,
        busy_poll=busy_poll,
        cpus=cpus,
        ready=ready,
    )


def serve_all(
    devices: Iterable[tuple[VirtioDevice, str | os.PathLike[str] | Listener]],
    *,
    engine: EngineName | None = None,
    mapper: Mapper | None = None,
    memory_slots: bool = True,
    metrics: str | None = None,
    busy_poll: float = 0.0,
    cpus: Sequence[int] = (),
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve several devices, each on a socket of its own, until SIGTERM, SIGINT or SIGHUP.

    Each device has a daemon of its own. They share no threads, rings, memory or front-ends, and a
    front-end's fault ends only its own connection. Log lines and counters call each device by its
    `name`, and also by its socket where two names are the same. The arguments are those of `serve`;
    `ready` is called once front-ends can connect to all devices.

    When one daemon fails, all end, and its error is raised. Raises `ListenError` when one of the
    paths cannot be listened on; then no device is served.
    """
    pairs = list(devices)
    for device, _ in pairs:
        check_device(device)
    daemons: list[VhostUserDaemon] = []
    try:
        with contextlib.ExitStack() as stack:
            backends = [DeviceBackend.of(device) for device, _ in pairs]
            raise_limit(backends)
            for backend, name in zip(backends, _names(pairs), strict=True):
                daemon = VhostUserDaemon(
                    name,
                    backend,
                    engine=engine,
                    mapper=mapper,
                    memory_slots=memory_slots,
                    busy_poll=busy_poll,
                    cpus=cpus,
                )
                daemons.append(stack.enter_context(daemon))
            bell = stack.enter_context(contextlib.closing(_Bell(daemons)))
            # Before the first socket exists: from then on a signal must clean up.
            listeners: list[Listener] = []
            stack.enter_context(_signals(daemons, bell, lambda: _close_all(listeners)))
            stack.enter_context(served_metrics(metrics, daemons))
            for _, path in pairs:
                listener = path if isinstance(path, Listener) else Listener(path)
                listeners.append(stack.enter_context(listener))
            serving = [
                _Serving(daemon, listener, bell)
                for daemon, listener in zip(daemons, listeners, strict=True)
            ]
            for thread in serving:
                thread.start()
            for daemon, listener in zip(daemons, listeners, strict=True):
                bell.watch(listener, daemon)
                if ready is None:
                    announce(daemon.name, listener)
            if ready is not None:
                ready()
            _wait_for_all(serving, bell)
            for daemon in daemons:
                daemon.shutdown()
            for daemon in daemons:
                daemon.close()
    finally:
        for device, _ in pairs:
            close_device(device)


def _close_all(listeners: Iterable[Listener]) -> None:
    for listener in listeners:
        listener.close()


def _names(
    pairs: Sequence[tuple[VirtioDevice, str | os.PathLike[str] | Listener]],
) -> list[str]:
    """A name for each device, no two the same."""
    plain = [name_of(device) for device, _ in pairs]
    names = []
    for index, (name, (_, where)) in enumerate(zip(plain, pairs, strict=True)):
        if plain.count(name) > 1:
            path = where.path if isinstance(where, Listener) else os.fspath(where)
            name = f"{name} on {path or f'socket {index}'}"
        names.append(name)
    return names


class _Bell:
    """A pipe that wakes the main thread, which waits for signals and for the daemons' ends.

    That thread must not wait for a lock. Of two signals that come at once the kernel may give one
    to another thread, and then nothing would make the main thread run the handlers.

    It also notices connections that must wait, because their daemon serves another front-end.
    """

    def __init__(self, daemons: Sequence[VhostUserDaemon]) -> None:
        self._daemons = daemons
        #: Whether the thread that waits must print the counters.
        self.show = False
        self._reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._reader, select.EPOLLIN)
        self._listening: dict[int, VhostUserDaemon] = {}

    def watch(self, listener: Listener, daemon: VhostUserDaemon) -> None:
        """From now on log it when a front-end has to wait for `daemon`."""
        if not listener.connected:
            self._listening[listener.fileno()] = daemon
            # Each connection is an edge, so each one that waits is reported once.
            self._epoll.register(listener.fileno(), select.EPOLLIN | select.EPOLLET)

    def ring(self) -> None:
        """Wake the thread in `wait`."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self.writer, b"\0")

    def wait(self) -> None:
        """Wait until `ring` is called or a signal comes."""
        for fd, _ in self._epoll.poll():
            daemon = self._listening.get(fd)
            # The connection waits only if the daemon serves another and has not accepted it.
            if daemon is not None and daemon.connected and _readable(fd):
                say_another_waits(daemon.name)
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        if self.show:
            self.show = False
            _print_counters(self._daemons)

    def close(self) -> None:
        """Close the pipe."""
        self._epoll.close()
        os.close(self._reader)
        os.close(self.writer)


def _readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


class _Serving(threading.Thread):
    """One daemon on a thread of its own."""

    def __init__(self, daemon: VhostUserDaemon, listener: Listener, bell: _Bell) -> None:
        super().__init__(name=f"{daemon.name}-control", daemon=True)
        self.served = daemon
        self.failure: BaseException | None = None
        #: Set before the bell rings, so that `_wait_for_all` never waits for this thread again.
        self.ended = False
        self._listener = listener
        self._bell = bell

    def run(self) -> None:
        try:
            self.served.serve_forever(self._listener)
        except BaseException as error:
            if not isinstance(error, VhostBackendError):  # its message says enough
                log.critical("%s: the daemon ends", self.served.name, exc_info=error)
            self.failure = kept(error)
        finally:
            self.ended = True
            self._bell.ring()


def _wait_for_all(serving: Sequence[_Serving], bell: _Bell) -> None:
    """Wait until every daemon has ended; the failure of one ends the others."""
    failure: BaseException | None = None
    while not all(thread.ended for thread in serving):
        bell.wait()
        for thread in serving:
            if failure is None and thread.failure is not None:
                failure = thread.failure
                for other in serving:
                    other.served.shutdown()
    for thread in serving:
        thread.join()
        failure = failure or thread.failure
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _signals(
    daemons: Sequence[VhostUserDaemon], bell: _Bell, cleanup: Callable[[], None]
) -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP end the daemons, and SIGUSR1 print their counters.

    A second ending signal ends the process, after `cleanup`. The former handlers are put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    told = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            # Requests that the device works on end with the process, so nothing is unmapped or
            # unlocked under them. Only the sockets must be removed first.
            cleanup()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        told = True
        for daemon in daemons:
            daemon.shutdown()

    def show(number: int, frame: FrameType | None) -> None:
        # On a thread: the handler may have interrupted code that holds a ring's lock, and the
        # write to stderr may block.
        try:
            threading.Thread(target=_print_counters, args=(daemons,), daemon=True).start()
        except RuntimeError:  # no more threads: the one in `wait` must print
            bell.show = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, end)
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, show)
    # The kernel may give a signal to any thread; the bell makes the main thread notice.
    woken_before = signal.set_wakeup_fd(bell.writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_counters(daemons: Sequence[VhostUserDaemon]) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print("\n".join(lines(daemons)), file=sys.stderr, flush=True)
