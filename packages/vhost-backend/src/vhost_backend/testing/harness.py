"""A device, its daemon and a driver in one process."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import vhost_protocol as vp
from virtqueue import EngineName

from ..adapter.device_backend import DeviceBackend
from ..backend import VhostUserBackend
from ..daemon.threaded import VhostUserDaemon
from ..device.base import VirtioDevice
from ..driver import DriverSession
from ..errors import kept
from ..fds.listener import Listener
from .logged import no_errors


@contextlib.contextmanager
def attached(
    device: VirtioDevice | VhostUserBackend,
    *,
    engine: EngineName | None = None,
    timeout: float = 10.0,
    **options: Any,
) -> Iterator[DriverSession]:
    """Run `device` and attach a driver to it; both end with the context.

    `engine` chooses the device's ring engine. `timeout` (seconds) bounds every answer that the
    driver waits for. `options` are `DriverSession`'s.

    Raises `DeviceErrors` at the end when an error was logged that the test did not expect; see
    `expect_errors`.
    """
    with no_errors(), VhostUserDaemon("test", as_backend(device), engine=engine) as daemon:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        daemon.start_connection(ours)
        with DriverSession(vp.Frontend(theirs, timeout=timeout), **options) as session:
            yield session


@contextlib.contextmanager
def served(
    device: VirtioDevice | VhostUserBackend, *, engine: EngineName | None = None
) -> Iterator[str]:
    """Run `device` behind a socket in a temporary folder; yields the socket's path.

    Raises `DeviceErrors` as `attached` does.
    """
    with (
        no_errors(),
        tempfile.TemporaryDirectory(prefix="vhost-") as directory,
        Listener(os.path.join(directory, "device.sock")) as listener,
        VhostUserDaemon("test", as_backend(device), engine=engine) as daemon,
        serving(daemon, listener),
    ):
        assert listener.path is not None
        yield listener.path


@contextlib.contextmanager
def serving(daemon: VhostUserDaemon, where: Listener | str | os.PathLike[str]) -> Iterator[None]:
    """Run `daemon.serve_forever(where)` on a thread during the context, then close the daemon.

    Raises an error of `serve_forever` at the end.
    """
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            daemon.serve_forever(where)
        except BaseException as error:
            failures.append(kept(error))

    thread = threading.Thread(target=serve, name=f"{daemon.name}-control", daemon=True)
    thread.start()
    try:
        yield
    finally:
        daemon.shutdown()
        thread.join()
        daemon.close()
    if failures:
        raise failures[0]


def as_backend(device: VirtioDevice | VhostUserBackend) -> VhostUserBackend:
    """The back-end for `device`, or `device` itself if it is a back-end."""
    return DeviceBackend.of(device) if isinstance(device, VirtioDevice) else device
