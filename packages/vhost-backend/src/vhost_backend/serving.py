"""`serve` and `serve_all`: run devices on their sockets until told to stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType

from guest_memory import Mapper

from .checks import check_device
from .daemon import VhostUserDaemon
from .descriptors import raise_limit
from .device import VirtioDevice, close_device
from .device_backend import DeviceBackend
from .listener import Listener, announce
from .observe import lines


def serve(
    device: VirtioDevice,
    path: str | os.PathLike[str] | Listener,
    *,
    engine: str | None = None,
    mapper: Mapper | None = None,
    memory_slots: bool = True,
    metrics: str | None = None,
    busy_poll: float = 0.0,
    cpus: Sequence[int] = (),
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve `device` on the Unix socket `path` (or a `Listener`) until SIGTERM or SIGINT.

    Requests that the device works on are ended first, and the log says when that takes long. A
    second SIGTERM or SIGINT ends the process at once.

    Says where, in the log (INFO), or on stderr in a program without logging. The soft limit of
    open files is raised to what may be needed.

    Front-ends are served one after another; the device keeps its state in between and is closed in
    the end. SIGUSR1 prints each queue's counters on stderr. `ready` is called once front-ends can
    connect. On another thread than the main one no signal handlers are installed, and the daemon
    runs until the process ends.

    `engine`, `mapper`, `memory_slots`, `busy_poll` and `cpus` are `VhostUserDaemon`'s. `metrics` is
    where to serve the counters to Prometheus: `unix:PATH`, or `HOST:PORT` on loopback.

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
    engine: str | None = None,
    mapper: Mapper | None = None,
    memory_slots: bool = True,
    metrics: str | None = None,
    busy_poll: float = 0.0,
    cpus: Sequence[int] = (),
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve several devices, each on a socket of its own, until SIGTERM or SIGINT.

    Each device has a daemon of its own: threads, rings, memory and front-ends are not shared, and
    what one front-end does wrong ends its own connection. The arguments are those of `serve`;
    `ready` is called once front-ends can connect to all of them.

    When one daemon fails, all end, and what it failed with is raised. Raises `ListenError` when one
    of the paths cannot be listened on; then none is served.
    """
    pairs = list(devices)
    for device, _ in pairs:
        check_device(device)
    daemons: list[VhostUserDaemon] = []
    try:
        with contextlib.ExitStack() as stack:
            for device, _ in pairs:
                daemon = VhostUserDaemon(
                    type(device).__name__,
                    DeviceBackend.of(device),
                    engine=engine,
                    mapper=mapper,
                    memory_slots=memory_slots,
                    busy_poll=busy_poll,
                    cpus=cpus,
                )
                daemons.append(stack.enter_context(daemon))
            raise_limit(daemons)
            bell = stack.enter_context(contextlib.closing(_Bell()))
            # Before a socket exists: from then on a signal has something to clean up.
            listeners: list[Listener] = []
            stack.enter_context(_signals(daemons, bell, lambda: _close_all(listeners)))
            stack.enter_context(_metrics(metrics, daemons))
            for _, path in pairs:
                listener = path if isinstance(path, Listener) else Listener(path)
                listeners.append(stack.enter_context(listener))
            for daemon, listener in zip(daemons, listeners, strict=True):
                daemon.start(listener)
                announce(daemon.name, listener)
            if ready is not None:
                ready()
            _wait_for_all(daemons, bell)
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


class _Bell:
    """A pipe that wakes the thread which waits for everything.

    That thread must not wait for a lock: of two signals that come at once the kernel may give one
    to another thread, and then nothing would make this one run the handlers.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        #: Whether whoever waits shall print the counters.
        self.asked = False

    def ring(self) -> None:
        """Wake whoever waits."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self.writer, b"\0")

    def wait(self) -> None:
        """Until somebody rings, or a signal comes."""
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        poller.poll()
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._reader)
        os.close(self.writer)


def _wait_for_all(daemons: Sequence[VhostUserDaemon], bell: _Bell) -> None:
    """Wait until every daemon has ended; the failure of one ends the others."""
    failures: list[BaseException] = []

    def wait(daemon: VhostUserDaemon) -> None:
        try:
            daemon.wait()
        except BaseException as error:
            failures.append(error)
            for other in daemons:
                other.shutdown()
        finally:
            bell.ring()

    threads = [threading.Thread(target=wait, args=(daemon,)) for daemon in daemons]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        bell.wait()
        if bell.asked:
            bell.asked = False
            _print_counters(daemons)
        for thread in threads:
            # One that has rung is about to end.
            thread.join(0.1)
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _signals(
    daemons: Sequence[VhostUserDaemon], bell: _Bell, cleanup: Callable[[], None]
) -> Iterator[None]:
    """SIGTERM and SIGINT end the daemons, SIGUSR1 asks them; the handlers before are put back.

    A second SIGTERM or SIGINT ends the process, after `cleanup`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    told = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            # Whatever the device still works on ends with the process, and then nothing is
            # unmapped or unlocked under it. The sockets go first.
            cleanup()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        told = True
        for daemon in daemons:
            daemon.shutdown()

    def show(number: int, frame: FrameType | None) -> None:
        # On a thread: the handler may have interrupted somebody who holds a ring's lock, and
        # whoever should read stderr may not.
        try:
            threading.Thread(target=_print_counters, args=(daemons,), daemon=True).start()
        except RuntimeError:  # there can be no more threads: the one that waits has to do it
            bell.asked = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, show)
    # A signal may be given to any thread; the bell makes the main one notice.
    woken_before = signal.set_wakeup_fd(bell.writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_counters(daemons: Sequence[VhostUserDaemon]) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print("\n".join(lines(daemons)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _metrics(where: str | None, daemons: Sequence[VhostUserDaemon]) -> Iterator[None]:
    if where is None:
        yield
        return
    from .metrics import MetricsServer

    server = MetricsServer(where, daemons)
    try:
        yield
    finally:
        server.close()
