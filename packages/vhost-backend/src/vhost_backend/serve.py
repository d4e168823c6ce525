"""`serve`: run a device on a socket until told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from guest_memory import Mapper

from .daemon import VhostUserDaemon
from .device import VirtioDevice
from .device_backend import DeviceBackend
from .listener import Listener


def serve(
    device: VirtioDevice,
    path: str | os.PathLike[str] | Listener,
    *,
    engine: str | None = None,
    mapper: Mapper | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve `device` on the Unix socket `path` (or a `Listener`) until SIGTERM or SIGINT.

    Front-ends are served one after another; the device keeps its state in between and is closed in
    the end. `ready` is called once front-ends can connect. On another thread than the main one no
    signal handlers are installed, and the daemon runs until the process ends. Raises `ListenError`
    when the path cannot be listened on.
    """
    try:
        with (
            VhostUserDaemon(
                type(device).__name__, DeviceBackend.of(device), engine=engine, mapper=mapper
            ) as daemon,
            # Before the socket exists: from then on a signal has something to clean up.
            _ended_by_signals(daemon),
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
def _ended_by_signals(daemon: VhostUserDaemon) -> Iterator[None]:
    """SIGTERM and SIGINT end the daemon; the handlers before are put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        daemon.shutdown()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
