"""Reading and writing a file at a position, with several pieces of memory in one call.

Python's preadv and pwritev call preadv2(2) and pwritev2(2). Some C libraries lack these, and some
seccomp filters forbid them; then pread(2) and pwrite(2) move the first piece only.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Any, Final

_REFUSALS: Final = frozenset((errno.ENOSYS, errno.EPERM, errno.EACCES))
_libc: Final[Any] = ctypes.CDLL(None, use_errno=True)


def read_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Read into the views from `offset` (bytes); returns the bytes read. Raises OSError."""
    try:
        return os.preadv(fd, views, offset)
    except (AttributeError, NotImplementedError):
        pass
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
    return _move(_libc.pread, fd, views[0], offset)


def write_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Write the views to `offset` (bytes); returns the bytes written. Raises OSError."""
    try:
        return os.pwritev(fd, views, offset)
    except (AttributeError, NotImplementedError):
        pass
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
    return _move(_libc.pwrite, fd, views[0], offset)


def _move(call: Any, fd: int, view: memoryview, offset: int) -> int:
    """Move one piece by its address: memory that is gone gives EFAULT, not a signal."""
    call.restype = ctypes.c_ssize_t
    place = ctypes.c_char.from_buffer(view)
    count: int = call(fd, ctypes.byref(place), ctypes.c_size_t(len(view)), ctypes.c_int64(offset))
    if count < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return count
