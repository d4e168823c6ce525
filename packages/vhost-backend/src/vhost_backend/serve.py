"""`serve` and `serve_all`: run devices on their sockets until told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType

from guest_memory import Mapper

from .daemon import VhostUserDaemon
from .device import VirtioDevice
from .device_backend import DeviceBackend
from .listener import Listener
from .observe import lines


def serve(
    device: VirtioDevice,
    path: str | os.PathLike[str] | Listener,
    *,
    engine: str | None = None,
    mapper: Mapper | None = None,
    memory_slots: bool = True,
    metrics: str | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve `device` on the Unix socket `path` (or a `Listener`) until SIGTERM or SIGINT.

    Front-ends are served one after another; the device keeps its state in between and is closed in
    the end. SIGUSR1 prints each queue's counters on stderr. `ready` is called once front-ends can
    connect. On another thread than the main one no signal handlers are installed, and the daemon
    runs until the process ends.

    `engine`, `mapper` and `memory_slots` are `VhostUserDaemon`'s. `metrics` is where to serve the
    counters to Prometheus: `unix:PATH`, or `HOST:PORT` on loopback.

    Raises `ListenError` when the path cannot be listened on.
    """
    serve_all(
        [(device, path)],
        engine=engine,
        mapper=mapper,
        memory_slots=memory_slots,
        metrics=metrics,
        ready=ready,
    )


def serve_all(
    devices: Iterable[tuple[VirtioDevice, str | os.PathLike[str] | Listener]],
    *,
    engine: str | None = None,
    mapper: Mapper | None = None,
    memory_slots: bool = True,
    metrics: str | None = None,
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
                )
                daemons.append(stack.enter_context(daemon))
            # Before a socket exists: from then on a signal has something to clean up.
            stack.enter_context(_signals(daemons))
            stack.enter_context(_metrics(metrics, daemons))
            listeners = [
                stack.enter_context(path if isinstance(path, Listener) else Listener(path))
                for _, path in pairs
            ]
            for daemon, listener in zip(daemons, listeners, strict=True):
                daemon.start(listener)
            if ready is not None:
                ready()
            _wait_for_all(daemons)
            for daemon in daemons:
                daemon.shutdown()
            for daemon in daemons:
                daemon.close()
    finally:
        for device, _ in pairs:
            device.close()


def _wait_for_all(daemons: Sequence[VhostUserDaemon]) -> None:
    """Wait until every daemon has ended; the failure of one ends the others."""
    failures: list[BaseException] = []

    def wait(daemon: VhostUserDaemon) -> None:
        try:
            daemon.wait()
        except BaseException as error:
            failures.append(error)
            for other in daemons:
                other.shutdown()

    # The last one is waited for here, so that one device needs no thread more.
    threads = [threading.Thread(target=wait, args=(daemon,)) for daemon in daemons[:-1]]
    for thread in threads:
        thread.start()
    for daemon in daemons[-1:]:
        wait(daemon)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _signals(daemons: Sequence[VhostUserDaemon]) -> Iterator[None]:
    """SIGTERM and SIGINT end the daemons, SIGUSR1 asks them; the handlers before are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        for daemon in daemons:
            daemon.shutdown()

    def show(number: int, frame: FrameType | None) -> None:
        # On a thread: the handler may have interrupted somebody who holds a ring's lock.
        threading.Thread(target=_print_counters, args=(daemons,), daemon=True).start()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, show)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_counters(daemons: Sequence[VhostUserDaemon]) -> None:
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
