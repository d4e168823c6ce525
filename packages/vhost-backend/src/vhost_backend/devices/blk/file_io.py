"""Reading and writing a file at a position, straight from and to guest memory.

Python's preadv and pwritev are preadv2(2) and pwritev2(2) underneath, which not every C library and
seccomp filter lets through; then the older calls do the same.
"""

from __future__ import annotations

import errno
import os
from typing import Final

REFUSALS: Final = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES))
"""What a kernel or a file system without a call or its flags answers, and a seccomp filter."""


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset` (bytes) on; how many bytes there were. Raises OSError."""
    try:
        return os.preadv(fd, [view], offset)
    except (AttributeError, NotImplementedError):
        pass
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
    data = os.pread(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


def write_at(fd: int, view: memoryview, offset: int, durable: bool) -> int:
    """Write `view` to `offset` (bytes); how many bytes were written. Raises OSError.

    With `durable` they are on the medium at the return.
    """
    if not durable:
        return os.pwrite(fd, view, offset)
    try:
        return os.pwritev(fd, [view], offset, os.RWF_DSYNC)
    except (AttributeError, NotImplementedError):
        pass
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
    count = os.pwrite(fd, view, offset)
    os.fdatasync(fd)
    return count


def written(count: int) -> int:
    """`count`, what a write has returned.

    Raises OSError for 0: a FUSE file system can answer that as often as it is asked.
    """
    if not count:
        raise OSError(errno.EIO, "the file takes nothing")
    return count
