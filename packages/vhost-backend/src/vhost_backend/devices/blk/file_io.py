"""Reading and writing a file at a position, straight from and to guest memory.

Python's preadv and pwritev call preadv2(2) and pwritev2(2). Some C libraries lack these, and some
seccomp filters forbid them; then the older calls do the same.
"""

from __future__ import annotations

import errno
import os

from ...errors import REFUSALS


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read into `view` from `offset` (bytes); returns the bytes read. Raises OSError."""
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
    """Write `view` to `offset` (bytes); returns the bytes written. Raises OSError.

    With `durable` they are on the medium when this returns.
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
    """Return `count`, the result of a write.

    Raises OSError for 0: a FUSE file system could return that for ever.
    """
    if not count:
        raise OSError(errno.EIO, "the file takes no data")
    return count
