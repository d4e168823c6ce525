"""Plain shared memory: in-flight records, dirty logs, and memory for a driver without a VMM."""

import ctypes
import os
import stat
from collections.abc import Callable

from ..addresses import align_down, align_up
from ..errors import InvalidRegion, MappingFailed, UsageError
from ..linux import syscalls
from . import seals


class _Range:
    """A mapped range, which is unmapped when its last user goes."""

    def __init__(self, base: int, length: int) -> None:
        self.base = base
        self.length = length
        self.poison = ctypes.c_uint32()
        self.before_unmapping: list[Callable[[], object]] = []
        self._generation = syscalls.generation
        # Kept here: the modules may be empty already when the interpreter ends.
        self._unmap = syscalls.unmap_memory
        self._may_unmap = syscalls.unmap_at_end
        syscalls.keep_private(base, length)

    def __del__(self) -> None:
        if self._may_unmap(self._generation):
            try:
                for callback in self.before_unmapping:
                    callback()
            finally:
                self._unmap(self.base, self.length)


class SharedMapping:
    """A part of a file, mapped shared and writable.

    Args:
        fd: the file; borrowed, the mapping does not need it afterwards.
        size: bytes.
        offset: where it begins in the file, in bytes; any value.
        guarded: a SIGBUS guard is installed, and watches the mapping before it is used.

    Attributes:
        size: its size in bytes.
        page_size: page size of the file, in bytes.
        sealed: the file can never shrink under the mapping.
        direct: the memory is sealed or guarded, so it may be touched directly. Otherwise its owner
            can turn any access into a SIGBUS, and only copies by the kernel report missing pages.

    Raises:
        InvalidRegion: empty, or beyond the end of the file.
        MappingFailed: the system refused.
    """

    def __init__(self, fd: int, size: int, offset: int = 0, *, guarded: bool = False) -> None:
        if size <= 0 or offset < 0 or offset + size > 1 << 62:
            raise InvalidRegion(offset, size, "size and offset are not those of a file")
        # Ask for the seal before the size: the file could be cut and then sealed between the two.
        sealed = seals.cannot_shrink(fd)
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise MappingFailed(error.errno or 0, "fstat") from None
        if stat.S_ISREG(status.st_mode) and offset + size > status.st_size:
            raise InvalidRegion(offset, size, f"the file has {status.st_size:#x} bytes")
        kind, block_size = syscalls.file_system(fd)
        hugetlb = kind == syscalls.HUGETLBFS_MAGIC
        page = block_size if hugetlb else syscalls.PAGE_SIZE
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
        self.page_size: int = page
        # A sealed hugetlb file may still run out of large pages after a hole was punched.
        self.sealed: bool = sealed and not hugetlb
        self.direct: bool = self.sealed or guarded
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
    def pages(self) -> tuple[int, int]:
        """Host address and length in bytes of its pages, for a SIGBUS guard.

        Raises:
            UsageError: the mapping is closed.
        """
        owner = self._need()
        return owner.base, owner.length

    @property
    def poison_address(self) -> int:
        """Host address of the 32-bit word that is set once a page was found missing.

        Raises:
            UsageError: the mapping is closed.
        """
        return ctypes.addressof(self._need().poison)

    @property
    def poisoned(self) -> bool:
        """True once a page was found missing, as the file had been truncated; False when closed."""
        owner = self._range
        return owner is not None and owner.poison.value != 0

    def poison(self) -> None:
        """Remember that a page was found missing. Harmless on a closed mapping."""
        owner = self._range
        if owner is not None:
            owner.poison.value = 1

    def before_unmapping(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called right before the memory is unmapped, by `close` or a last view.

        It lets a guard stop watching. The callback must not refer to this object.

        Raises:
            UsageError: the mapping is closed.
        """
        self._need().before_unmapping.append(callback)

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._range is None

    def close(self) -> None:
        """Unmap the memory now, or with the last view. Calling it again is harmless."""
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
    """Create anonymous shared memory that no process can resize any more.

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
        seals.fix_size(fd)
    except OSError as error:
        os.close(fd)
        raise MappingFailed(error.errno or 0, "ftruncate") from None
    except BaseException:
        os.close(fd)
        raise
    return fd
