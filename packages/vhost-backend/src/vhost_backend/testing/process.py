"""A device in a process of its own that a test can kill and start again."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import vhost_protocol as vp
from virtqueue import EngineName, SigbusGuard

from ..backend import VhostUserBackend
from ..daemon.threaded import VhostUserDaemon
from ..device.base import VirtioDevice
from ..driver import DriverSession, SessionError
from ..fds.listener import Listener
from .harness import as_backend
from .logged import ChildErrors, no_errors


class DeviceProcess:
    """Runs a device in a child process, behind a socket.

    Each child calls `make` when it starts; `make` may be any callable, also a closure. The socket
    belongs to this process and stays: a connection that comes while no child runs waits for the
    next one. The child inherits only standard input, output and error. It ends with this process at
    the latest.

    Errors that the child logs are logged here when it ends, and fail the test as with `attached`.

    Args:
        make: makes the device (or back-end); takes no arguments.
        engine: the ring engine, "c" or "python".
        timeout: seconds that an answer may take.
        options: `VhostUserDaemon`'s, such as `busy_poll`.
    """

    def __init__(
        self,
        make: Callable[[], VirtioDevice | VhostUserBackend],
        *,
        engine: EngineName | None = None,
        timeout: float = 10.0,
        **options: Any,
    ) -> None:
        self._make = make
        self._options = dict(options, engine=engine)
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="vhost-")
        self._listener = Listener(os.path.join(self._folder.name, "device.sock"), backlog=64)
        self._lifeline = -1
        self._errors = ChildErrors()
        self._stack = contextlib.ExitStack()
        SigbusGuard.available()  # loads the C engine, so that each child has it at once
        #: The child's process id; None while there is none.
        self.pid: int | None = None
        #: How often a child was started.
        self.starts: int = 0
        self.start()

    @property
    def path(self) -> str:
        """The socket's path."""
        assert self._listener.path is not None
        return self._listener.path

    # -- the child's life -----------------------------------------------------------------------

    def start(self) -> None:
        """Start a child. Raises `SessionError` while one runs."""
        if self.pid is not None:
            raise SessionError("the device's process runs already")
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python warns of fork in a process with threads. The child has this thread only, and
            # takes no lock that another thread may have held.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            status = 1
            try:
                # Keep the parent's objects: a finalizer could close a descriptor number that is
                # the child's now.
                gc.freeze()
                self._run(reader)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(reader)
        self._lifeline = writer
        self.pid = pid
        self.starts += 1

    def _run(self, lifeline: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        listening = os.dup(self._listener.fileno())
        _close_all_but({listening, lifeline, self._errors.fd})
        # The parent's objects may write to a file that was just closed here.
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        watcher = threading.Thread(target=_end_with, args=(lifeline,), daemon=True)
        watcher.start()
        self._errors.send()
        backend = as_backend(self._make())
        daemon = VhostUserDaemon("test", backend, **self._options)
        signal.signal(signal.SIGTERM, lambda number, frame: daemon.shutdown())
        with daemon, Listener.from_fd(listening) as listener:
            daemon.serve_forever(listener)

    def kill(self) -> None:
        """SIGKILL, at once; returns when the child is gone."""
        status = self._end(signal.SIGKILL)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SessionError(f"the device's process ended by itself (status {status:#x})")

    def terminate(self) -> None:
        """SIGTERM: the daemon ends in good order. Raises `SessionError` when it fails to."""
        status = self._end(signal.SIGTERM)
        if status:
            raise SessionError(f"the device's process ended with status {status:#x}")

    def _end(self, number: int) -> int:
        pid, self.pid = self.pid, None
        if pid is None:
            raise SessionError("the device's process does not run")
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        os.close(self._lifeline)
        self._lifeline = -1
        self._errors.receive()
        return status

    def restart(self) -> None:
        """Kill the child and start another."""
        self.kill()
        self.start()

    # -- its front-ends -------------------------------------------------------------------------

    def connect(self, **options: Any) -> DriverSession:
        """A driver's session with the device; `options` are `DriverSession`'s."""
        return DriverSession.connect(self.path, timeout=self._timeout, **options)

    def frontend(self) -> vp.Frontend:
        """A bare connection, for `DriverSession.reconnect` or your own messages."""
        return vp.Frontend.connect(self.path, timeout=self._timeout)

    def kill_and_reconnect(self, session: DriverSession) -> None:
        """Kill the device under `session`, and reconnect the session to a new process.

        Make the session with `inflight=True`; otherwise requests may be lost or served twice.
        """
        self.restart()
        session.reconnect(self.frontend())

    def close(self) -> None:
        """Kill the child and remove the socket. Calling it again is harmless."""
        if self.pid is not None:
            with contextlib.suppress(SessionError):
                self.kill()
        self._listener.close()
        self._errors.close()
        self._folder.cleanup()

    def __enter__(self) -> DeviceProcess:
        self._stack.enter_context(no_errors())
        self._stack.callback(self.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(0)
