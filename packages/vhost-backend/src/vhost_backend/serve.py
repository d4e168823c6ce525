"""`serve`: run a device on a socket until told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
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
    try:
        with (
            VhostUserDaemon(
                type(device).__name__,
                DeviceBackend.of(device),
                engine=engine,
                mapper=mapper,
                memory_slots=memory_slots,
            ) as daemon,
            # Before the socket exists: from then on a signal has something to clean up.
            _signals(daemon),
            _metrics(metrics, daemon),
            path if isinstance(path, Listener) else Listener(path) as listener,
        ):
            daemon.start(listener)
            if ready is not None:
                ready()
            daemon.wait()
            daemon.close()
    finally:
        device.close()


@contextlib.contextmanager
def _signals(daemon: VhostUserDaemon) -> Iterator[None]:
    """SIGTERM and SIGINT end the daemon, SIGUSR1 asks it; the handlers before are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        daemon.shutdown()

    def show(number: int, frame: FrameType | None) -> None:
        # On a thread: the handler may have interrupted somebody who holds a ring's lock.
        threading.Thread(target=_print_counters, args=(daemon,), daemon=True).start()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, show)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_counters(daemon: VhostUserDaemon) -> None:
    print("\n".join(lines([daemon])), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _metrics(where: str | None, daemon: VhostUserDaemon) -> Iterator[None]:
    if where is None:
        yield
        return
    from .metrics import MetricsServer

    server = MetricsServer(where, [daemon])
    try:
        yield
    finally:
        server.close()
