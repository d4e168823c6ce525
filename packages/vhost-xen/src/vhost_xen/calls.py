"""The few system calls that this package makes, behind one small interface.

Tests give the mapper a recorder in place of `LinuxCalls`. No other code of the package makes system
calls.
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
    """The number of forks behind this process. A forked child lacks its parent's mappings."""
    return _generation


def may_release(mapped_in: int) -> bool:
    """Tell whether this process may release a mapping of generation ``mapped_in``.

    A forked child does not have the mapping but shares the open file, so it would give back its
    parent's grants. When the interpreter ends, a daemon thread may still use the memory in C, so
    the release is left to the kernel.
    """
    return mapped_in == _generation and not sys.is_finalizing()


class SystemCalls(Protocol):
    """The system calls of the mapper; every method raises OSError when the call fails."""

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

        With `address` 0 the kernel chooses the place; otherwise a mapping there is replaced.
        """
        ...

    def munmap(self, address: int, length: int) -> None:
        """Remove the mapping."""
        ...

    def ioctl(self, fd: int, request: int, argument: "ctypes.Array[ctypes.c_char]") -> None:
        """Make the request; the kernel may write into `argument`."""
        ...


class LinuxCalls:
    """`SystemCalls` of this machine, by ctypes on the C library.

    The calls release the GIL, because a request to the hypervisor may take long.
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

        With `address` 0 the kernel chooses the place; otherwise a mapping there is replaced.
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
