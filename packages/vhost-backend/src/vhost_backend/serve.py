"""`serve`: run a device on a socket until told to stop."""

from __future__ import annotations

import os
import signal
import threading
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
) -> None:
    """Serve `device` on the Unix socket `path` (or a `Listener`) until SIGTERM or SIGINT.

    Front-ends are served one after another; the device keeps its state in between and is closed in
    the end. On another thread than the main one no signal handlers are installed, and the daemon
    runs until the process ends. Raises `ListenError` when the path cannot be listened on.
    """
    name = type(device).__name__
    listener = path if isinstance(path, Listener) else Listener(path)
    with (
        listener,
        VhostUserDaemon(name, DeviceBackend.of(device), engine=engine, mapper=mapper) as daemon,
    ):
        try:
            with _signals(daemon):
                daemon.start(listener)
                daemon.wait()
        finally:
            daemon.close()
            device.close()


class _signals:
    """SIGTERM and SIGINT end the daemon; the handlers before are put back."""

    def __init__(self, daemon: VhostUserDaemon) -> None:
        self._daemon = daemon
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._daemon.shutdown()

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
