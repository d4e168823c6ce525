"""Descriptors that arrive: each has one owner at any time and is closed once."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import Protocol


class HasFileno(Protocol):
    """Anything with a descriptor: a socket, a file, an OwnedFd."""

    def fileno(self) -> int:
        """Return the descriptor."""
        ...


#: What can be passed along with a message.  It stays the caller's: it is duplicated by the kernel.
FdLike = int | HasFileno


class OwnedFd:
    """A file descriptor with one owner: the holder of this object closes it.

    Use it as a context manager, ``close()`` it, or take the number away with ``detach()``.  One
    that is forgotten is closed when it is collected, with a ResourceWarning.
    """

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor, which stays owned by this object.

        Raises:
            ValueError: it was closed or detached.
        """
        if self._fd < 0:
            raise ValueError("the descriptor was closed or detached")
        return self._fd

    def detach(self) -> int:
        """Return the descriptor and leave closing it to the caller.

        Raises:
            ValueError: it was closed or detached before.
        """
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close the descriptor, if it is still here."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def closed(self) -> bool:
        """Whether it was closed or detached."""
        return self._fd < 0

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})" if self._fd >= 0 else "OwnedFd(closed)"


def fd_number(fd: FdLike) -> int:
    """Return the descriptor of ``fd`` without taking it."""
    return fd if isinstance(fd, int) else fd.fileno()


def close_all(fds: list[OwnedFd]) -> None:
    """Close every descriptor of a list and empty it."""
    while fds:
        fds.pop().close()
