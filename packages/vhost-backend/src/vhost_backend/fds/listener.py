"""Listening on a Unix socket path: replacing a stale socket file, and removing our own.

A path that a running program listens on is refused. A socket file that refuses connections was left
by a program that was killed, and is replaced. The directory is locked meanwhile: otherwise two
programs that start at the same moment could both find the file stale. `close` removes the socket
file if it is still ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from typing import Final

from ..errors import ListenError

log: logging.Logger = logging.getLogger("vhost_backend")

# The most bytes in a socket's path (unix(7): sun_path has 108, and ends in a zero byte).
_LONGEST: Final = 107

# Seconds to wait for the directory's lock, and between two attempts.
_PATIENCE = 2.0
_INTERVAL: Final = 0.01


class Listener:
    """A listening Unix stream socket.

    `Listener(path)` binds; `Listener.from_fd(fd)` adopts a descriptor that is listening already.
    Raises `ListenError` when the path cannot be listened on.
    """

    def __init__(self, path: str | os.PathLike[str], backlog: int = 8) -> None:
        self.path: str | None = os.fspath(path)
        #: Whether the descriptor is itself the one connection.
        self.connected = False
        self._identity: tuple[int, int] | None = None
        self.socket: socket.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(self.path, backlog)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_fd(cls, fd: int) -> Listener:
        """Adopt a descriptor that listens, or that is one connection already.

        The first `accept` returns a descriptor that is connected; there is no second. `close`
        removes no file. Raises `ListenError` when it is no Unix stream socket.
        """
        listener = cls.__new__(cls)
        listener.path = None
        listener._identity = None
        try:
            listener.socket = socket.socket(fileno=fd)
            family, kind = listener.socket.family, listener.socket.type
        except OSError:
            raise ListenError(f"descriptor {fd}", "not a Unix stream socket") from None
        if family != socket.AF_UNIX or kind != socket.SOCK_STREAM:
            listener.socket.detach()
            raise ListenError(f"descriptor {fd}", "not a Unix stream socket")
        listener.connected = not listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return listener

    def _bind(self, path: str, backlog: int) -> None:
        length = len(os.fsencode(path))
        if "\0" in path:
            raise ListenError(repr(path), "the path of a socket has no zero byte")
        if not 1 <= length <= _LONGEST:
            raise ListenError(
                path or "''", f"the path of a socket has 1 to {_LONGEST} bytes, not {length}"
            )
        try:
            with _directory_lock(os.path.dirname(path) or "."):
                _remove_stale(path)
                self.socket.bind(path)
                status = os.stat(path)
                self._identity = (status.st_dev, status.st_ino)
                self.socket.listen(backlog)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ListenError(path, reason) from None

    def accept(self) -> socket.socket:
        """The next connection (blocking if the socket is)."""
        if self.connected:
            return socket.socket(fileno=self.socket.detach())
        return self.socket.accept()[0]

    def fileno(self) -> int:
        """The listening descriptor."""
        return self.socket.fileno()

    def close(self) -> None:
        """Remove the socket file unless another program has replaced it, and stop listening."""
        if self.path is not None and self._identity is not None:
            with contextlib.suppress(OSError):
                status = os.stat(self.path)
                if (status.st_dev, status.st_ino) == self._identity:
                    os.unlink(self.path)
            self._identity = None
        self.socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def announce(name: str, listener: Listener) -> None:
    """Say where a device is served: in the log, or on stderr in a program without logging."""
    where = listener.path or f"descriptor {listener.fileno()}"
    if log.hasHandlers():
        log.info("%s: serving on %s", name, where)
    else:
        with contextlib.suppress(OSError, ValueError):
            print(f"{name}: serving on {where}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _directory_lock(directory: str) -> Iterator[None]:
    """Lock the directory against programs that start to listen there at the same time.

    They hold the lock for milliseconds. One that is held longer, or cannot be taken at all, has
    another purpose and is ignored.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a directory may allow new files and still not be readable
        yield
        return
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _try_lock(fd) and time.monotonic() < deadline:
            time.sleep(_INTERVAL)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        pass
    return True


def _remove_stale(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise ListenError(path, "a symbolic link that leads nowhere") from None
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(path, "exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # a full backlog: a program listens
    raise ListenError(path, "another program listens on this socket")
