"""Plain shared memory: in-flight records, dirty bitmaps, and memory for a driver without a VMM."""

import ctypes
import fcntl
import os
import stat

from . import syscalls
from .addresses import align_down, align_up
from .errors import InvalidRegion, MappingFailed, UsageError

_F_ADD_SEALS = 1033
_F_SEAL_SHRINK_AND_GROW = 2 | 4


class _Range:
    """A mapped range that is unmapped with its last user."""

    def __init__(self, base: int, length: int) -> None:
        self.base = base
        self.length = length
        self._generation = syscalls.generation
        self._unmap = syscalls.unmap_memory
        syscalls.keep_private(base, length)

    def __del__(self) -> None:
        if self._generation == syscalls.generation:
            self._unmap(self.base, self.length)


class SharedMapping:
    """A part of a file, mapped shared and writable.

    Args:
        fd: the file; borrowed, the mapping does not need it afterwards.
        size: bytes.
        offset: where it begins in the file, in bytes; any value.

    Raises:
        InvalidRegion: empty, or beyond the end of the file.
        MappingFailed: the system refused.
    """

    def __init__(self, fd: int, size: int, offset: int = 0) -> None:
        if size <= 0 or offset < 0 or offset + size > 1 << 62:
            raise InvalidRegion(offset, size, "size and offset are not those of a file")
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise MappingFailed(error.errno or 0, "fstat") from None
        if stat.S_ISREG(status.st_mode) and offset + size > status.st_size:
            raise InvalidRegion(offset, size, f"the file has {status.st_size:#x} bytes")
        kind, block_size = syscalls.file_system(fd)
        page = block_size if kind == syscalls.HUGETLBFS_MAGIC else syscalls.PAGE_SIZE
        start = align_down(offset, page)
        length = align_up(offset - start + size, page)
        base = syscalls.map_memory(
            0,
            length,
            syscalls.PROT_READ | syscalls.PROT_WRITE,
            syscalls.MAP_SHARED | syscalls.MAP_NORESERVE,
            fd,
            start,
        )
        self.size = size
        self._address = base + offset - start
        self._range: _Range | None = _Range(base, length)

    @property
    def address(self) -> int:
        """Host address of the first byte.

        Raises:
            UsageError: the mapping is closed.
        """
        self._need()
        return self._address

    @property
    def view(self) -> memoryview:
        """A writable view of format ``"B"``; the memory stays mapped as long as it exists.

        Raises:
            UsageError: the mapping is closed.
        """
        owner = self._need()
        exporter = (ctypes.c_ubyte * self.size).from_address(self._address)
        exporter.owner = owner  # type: ignore[attr-defined]
        return memoryview(exporter).cast("B")

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._range is None

    def close(self) -> None:
        """Give the memory up: it is unmapped now, or with the last view. Harmless when repeated."""
        self._range = None

    def __enter__(self) -> "SharedMapping":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _need(self) -> _Range:
        owner = self._range
        if owner is None:
            raise UsageError("the mapping is closed")
        return owner


def allocate_memfd(size: int, name: str = "guest-memory") -> int:
    """Create anonymous shared memory that nobody can resize any more.

    Args:
        size: bytes, at least 1.
        name: shown in /proc.

    Returns:
        A file descriptor, close-on-exec, owned by the caller.

    Raises:
        UsageError: the size is no size.
        MappingFailed: the system refused.
    """
    if not 0 < size < 1 << 63:
        raise UsageError("memory needs a size that a file can have")
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise MappingFailed(error.errno or 0, "memfd_create") from None
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK_AND_GROW)
    except OSError as error:
        os.close(fd)
        raise MappingFailed(error.errno or 0, "ftruncate") from None
    except BaseException:
        os.close(fd)
        raise
    return fd
