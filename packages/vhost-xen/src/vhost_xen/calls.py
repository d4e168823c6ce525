"""The few system calls that this package makes, behind one small interface.

Tests give the mapper a recorder in place of `LinuxCalls`; nothing else here touches the system.
"""

import ctypes
import mmap
import os
import stat
import sys
from typing import Protocol

from .errors import XenUnavailable

PROT_READ = 1
PROT_WRITE = 2
_MAP_SHARED = 0x01
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = (1 << 8 * ctypes.sizeof(ctypes.c_void_p)) - 1


_generation = 0


def _forked() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def generation() -> int:
    """How many forks are behind this process: no child has its parent's mappings."""
    return _generation


def may_release(mapped_in: int) -> bool:
    """Tell whether what was mapped in generation ``mapped_in`` is this process's to take down.

    A forked child does not have the mapping, and shares the open file: a grant that it gave back
    would be its parent's. When the interpreter ends, a daemon thread may still be in C with the
    memory, and the kernel takes it down.
    """
    return mapped_in == _generation and not sys.is_finalizing()


class SystemCalls(Protocol):
    """What the mapper needs of the system; every method raises OSError when the call fails."""

    @property
    def page_size(self) -> int:
        """Bytes in one page of this kernel."""
        ...

    def is_character_device(self, fd: int) -> bool:
        """Tell whether the file is a character device."""
        ...

    def duplicate(self, fd: int) -> int:
        """Return a close-on-exec duplicate of the file descriptor."""
        ...

    def close(self, fd: int) -> None:
        """Close the file descriptor."""
        ...

    def mmap(self, address: int, length: int, protection: int, fd: int, offset: int) -> int:
        """Map the file shared, and return where.

        An `address` of 0 leaves the choice to the kernel; at any other what is there is replaced.
        """
        ...

    def munmap(self, address: int, length: int) -> None:
        """Remove the mapping."""
        ...

    def ioctl(self, fd: int, request: int, argument: "ctypes.Array[ctypes.c_char]") -> None:
        """Make the request; the kernel may write into `argument`."""
        ...


class LinuxCalls:
    """`SystemCalls` of the machine this runs on, by ctypes on the C library.

    The library is loaded so that calls release the GIL: a request to the hypervisor may be long.
    """

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise XenUnavailable("Xen mappings need Linux")
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        self._munmap = libc.munmap
        self._munmap.restype = ctypes.c_int
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._ioctl = libc.ioctl
        self._ioctl.restype = ctypes.c_int
        self._ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

    @property
    def page_size(self) -> int:
        """Bytes in one page of this kernel."""
        return mmap.PAGESIZE

    def is_character_device(self, fd: int) -> bool:
        """Tell whether the file is a character device."""
        return stat.S_ISCHR(os.fstat(fd).st_mode)

    def duplicate(self, fd: int) -> int:
        """Return a close-on-exec duplicate of the file descriptor."""
        return os.dup(fd)

    def close(self, fd: int) -> None:
        """Close the file descriptor."""
        os.close(fd)

    def mmap(self, address: int, length: int, protection: int, fd: int, offset: int) -> int:
        """Map the file shared, and return where.

        An `address` of 0 leaves the choice to the kernel; at any other what is there is replaced.
        """
        flags = _MAP_SHARED | _MAP_NORESERVE | (_MAP_FIXED if address else 0)
        place: int | None = self._mmap(address, length, protection, flags, fd, offset)
        if place is None or place == _MAP_FAILED:
            raise _last_error()
        return place

    def munmap(self, address: int, length: int) -> None:
        """Remove the mapping."""
        if self._munmap(address, length):
            raise _last_error()

    def ioctl(self, fd: int, request: int, argument: "ctypes.Array[ctypes.c_char]") -> None:
        """Make the request; the kernel may write into `argument`."""
        if self._ioctl(fd, request, ctypes.addressof(argument)):
            raise _last_error()


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
