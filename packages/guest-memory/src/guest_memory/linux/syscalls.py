"""System calls that Python's standard library lacks, or has only without raw addresses."""

import ctypes
import errno
import os
import sys
from typing import Any

from ..errors import MappingFailed

PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MADV_DONTFORK = 10
_MADV_DONTDUMP = 16
_MADV_NOHUGEPAGE = 15
_FAILED = ctypes.c_size_t(-1).value

TMPFS_MAGIC = 0x01021994
RAMFS_MAGIC = 0x858458F6
HUGETLBFS_MAGIC = 0x958458F6

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_libc: Any = ctypes.CDLL(None, use_errno=True)
_held: Any = ctypes.PyDLL(None, use_errno=True)


def function(name: str, result: Any, *arguments: Any, library: Any = _libc) -> Any:
    """A function of the C library; where that lacks it, calling it raises `MappingFailed`."""
    try:
        found = library[name]
    except AttributeError:

        def unavailable(*_: Any) -> Any:
            raise MappingFailed(errno.ENOSYS, name)

        return unavailable
    found.restype = result
    found.argtypes = arguments
    return found


_size = ctypes.c_size_t
_int = ctypes.c_int
_long = ctypes.c_long
_pointer = ctypes.c_void_p
_mmap = function("mmap", _size, _size, _size, _int, _int, _int, ctypes.c_int64)
_munmap = function("munmap", _int, _size, _size)
_madvise = function("madvise", _int, _size, _size, _int)
_mremap = function("mremap", _size, _size, _size, _size, _int, _size)
_fstatfs = function("fstatfs", _int, _int, _pointer)
_syscall = (_long, _long, _size, _size, _size, _size, _size, _size)
syscall: Any = function("syscall", *_syscall)
held_syscall: Any = function("syscall", *_syscall, library=_held)  # keeps the GIL
ioctl: Any = function("ioctl", _int, _int, ctypes.c_ulong, _pointer)

# aarch64, riscv64 and loongarch64 share one table of system call numbers.
_MACHINE = os.uname().machine
FUTEX = {"x86_64": 202, "s390x": 238, "ppc64le": 221}.get(_MACHINE, 98)
USERFAULTFD = {"x86_64": 323, "s390x": 355, "ppc64le": 364}.get(_MACHINE, 282)


generation: int = 0
"""The number of forks behind this process. A forked child does not have its parent's mappings."""


def _forked() -> None:
    global generation
    generation += 1


os.register_at_fork(after_in_child=_forked)


def unmap_at_end(mapped_in: int) -> bool:
    """Tell whether a finalizer may unmap memory that was mapped in generation ``mapped_in``.

    A forked child does not have the mapping, and may have another one at the same place. When the
    interpreter ends, a daemon thread may still use the memory in C, so unmapping is left to the
    kernel.
    """
    return mapped_in == generation and not sys.is_finalizing()


def map_memory(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """Call mmap; return the address or raise `MappingFailed`."""
    if length >> 63:  # a larger length would be cut to the C type
        raise MappingFailed(errno.ENOMEM)
    result: int = _mmap(address, length, prot, flags, fd, offset)
    if result == _FAILED:
        raise MappingFailed(ctypes.get_errno())
    return result


def reserve_hole(address: int, length: int) -> bool:
    """Reserve a range if nothing is mapped in it; False otherwise."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    try:
        got = map_memory(address, length, PROT_NONE, flags, -1, 0)
    except MappingFailed:
        return False
    if got != address:  # before Linux 4.17 the address is a hint
        unmap_memory(got, length)
        return False
    keep_private(address, length)
    return True


def unmap_memory(address: int, length: int) -> None:
    """Call munmap; raise `MappingFailed` when the kernel runs out of mapping slots."""
    if _munmap(address, length):
        raise MappingFailed(ctypes.get_errno(), "munmap")


def keep_private(address: int, length: int) -> None:
    """Leave a range out of core dumps and of forked children.

    A core dump with a guest's memory would leak the guest's secrets, and a child would be a second,
    uncounted user of the mapping. Both calls are advice: their failure is no error.
    """
    _madvise(address, length, _MADV_DONTDUMP)
    _madvise(address, length, _MADV_DONTFORK)


def no_huge_pages(address: int, length: int) -> None:
    """Keep the kernel from filling missing pages of a range with large pages during postcopy."""
    _madvise(address, length, _MADV_NOHUGEPAGE)


def duplicate_mapping(address: int, length: int, target: int) -> int:
    """Map a shared mapping's pages again at ``target`` (0: anywhere); return the address."""
    # With an old size of 0 mremap leaves the first mapping where it is.
    flags = _MREMAP_MAYMOVE | (_MREMAP_FIXED if target else 0)
    result: int = _mremap(address, 0, length, flags, target)
    if result == _FAILED:
        raise MappingFailed(ctypes.get_errno(), "mremap")
    return result


_Statfs = ctypes.c_uint64 * 32  # larger than struct statfs, whose first two words are used


def file_system(fd: int) -> tuple[int, int]:
    """Return the type (magic number) and the block size of the file system that ``fd`` is on."""
    buffer = _Statfs()
    if _fstatfs(fd, ctypes.addressof(buffer)):
        raise MappingFailed(ctypes.get_errno(), "fstatfs")
    return buffer[0], buffer[1]
