"""Mapping the files that every front-end but Xen's passes."""

import ctypes
import os
import stat
from typing import Any

from ..addresses import align_down, align_up
from ..errors import InvalidRegion, MappingFailed, OutOfBounds, UsageError
from ..linux import syscalls
from . import seals
from .region import Region
from .window import Window

_OFFSET_LIMIT = 1 << 63
_HUGE = 1 << 21


class _Placement:
    """A mapped range of this process, which is unmapped or covered exactly once."""

    __slots__ = ("_generation", "_may_unmap", "_open", "_window", "base", "length")

    def __init__(self, base: int, length: int, window: Window | None) -> None:
        self.base: int = base
        self.length: int = length
        self._window = window
        self._generation = syscalls.generation
        self._may_unmap = syscalls.unmap_at_end  # modules may be empty when the interpreter ends
        self._open = [True]

    def close(self) -> None:
        try:
            self._open.pop()  # atomic, with and without the GIL
        except IndexError:
            return
        if self._window is not None:
            self._window.cover(self.base, self.length)
        elif self._may_unmap(self._generation):
            syscalls.unmap_memory(self.base, self.length)


class MmapMapping:
    """A region of a file, mapped shared. Made by `MmapMapper`; see `Mapping` for the interface.

    Attributes:
        host_address: host address of the region's first byte.
        size: the region's size in bytes.
        page_size: page size of the file, in bytes.
        poison_address: host address of the 32-bit word that a SIGBUS guard sets.
        sealed: the file can never shrink under the mapping.
        guarded: the mapper was told that a SIGBUS guard watches.
        read_only: the mapping must not be written.
        bounded: the file is in memory (tmpfs, hugetlbfs), so a first access is short.
    """

    def __init__(
        self,
        region: Region,
        placement: _Placement,
        poison: ctypes.c_uint32,
        *,
        delta: int,
        page_size: int,
        sealed: bool,
        guarded: bool,
        read_only: bool,
        bounded: bool,
    ) -> None:
        self._region = region
        self._placement = placement
        self._poison = poison
        self._delta = delta
        self.host_address: int = placement.base + delta
        self.size: int = region.size
        self.page_size = page_size
        self.poison_address: int = ctypes.addressof(poison)
        self.sealed = sealed
        self.guarded = guarded
        self.read_only = read_only
        self.bounded = bounded

    @property
    def poisoned(self) -> bool:
        """True once an access has failed because the file had been truncated."""
        return self._poison.value != 0

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        """See `Mapping.pin`; the whole region is mapped already."""
        offset = address - self._region.guest_address
        if offset < 0 or length < 0 or length > self.size - offset:
            raise OutOfBounds(address, length)
        return self.host_address + offset, self

    def unpin(self, token: Any) -> None:
        """See `Mapping.unpin`."""
        if token is not self:
            raise UsageError("not a token of this mapping")

    def close(self) -> None:
        """Unmap the region; in a window, its place reads as zeroes from now on."""
        self._placement.close()

    def duplicate(self, window: Window) -> "MmapMapping":
        """See `WindowMapping.duplicate`. Raises `MappingFailed` for a hugetlb mapping."""
        base, length = self._placement.base, self._placement.length
        alignment = _alignment(self.page_size, length)
        target = window.duplicate(base, length, alignment)
        return MmapMapping(
            self._region,
            _Placement(target, length, window),
            self._poison,
            delta=self._delta,
            page_size=self.page_size,
            sealed=self.sealed,
            guarded=self.guarded,
            read_only=self.read_only,
            bounded=self.bounded,
        )

    def __del__(self) -> None:
        placement: _Placement | None = getattr(self, "_placement", None)
        if placement is not None:
            placement.close()


def _alignment(page_size: int, length: int) -> int:
    # The kernel uses large pages of tmpfs only where file offset and address agree.
    return max(page_size, _HUGE) if length >= _HUGE else page_size


class MmapMapper:
    """Maps files with mmap: shared, without reserving swap, never in core dumps or forked children.

    Args:
        guarded: a SIGBUS guard is installed, and watches every snapshot before it is used. This
            allows zero-copy access to files that their owner can shrink. Without it such regions
            stay outside of the flat window, views of them raise `Unguarded`, and copies go through
            the kernel, which reports missing pages.
        require_seal: refuse files that are not sealed against shrinking (F_SEAL_SHRINK).
        read_only: map for reading only.
    """

    def __init__(
        self, *, guarded: bool = False, require_seal: bool = False, read_only: bool = False
    ) -> None:
        self.guarded = guarded
        self.require_seal = require_seal
        self.read_only = read_only

    def map(self, region: Region, fd: int | None) -> MmapMapping:
        """Map one region wherever there is room. See `Mapper.map`.

        Raises:
            InvalidRegion: no file, an offset or a size beyond the file's end.
            MappingFailed: the system refused.
        """
        return self._map(region, fd, None)

    def map_into(self, region: Region, fd: int | None, window: Window) -> MmapMapping:
        """Map one region into a window. See `WindowMapper.map_into`.

        The window holds only memory that may be touched directly. Regions that may vanish without a
        guard, and read-only ones, are mapped elsewhere.

        Raises:
            WindowFull, InvalidRegion, MappingFailed.
        """
        return self._map(region, fd, window)

    def _map(self, region: Region, fd: int | None, window: Window | None) -> MmapMapping:
        region.check()
        address, size, offset = region.guest_address, region.size, region.mmap_offset
        if fd is None:
            raise InvalidRegion(address, size, "it came without a file descriptor")
        # Ask for the seal before the size: the file could be cut and then sealed between the two.
        sealed = seals.cannot_shrink(fd)
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise MappingFailed(error.errno or 0, "fstat") from None
        # Only of regular files (and memfds) the size limits a mapping.
        if stat.S_ISREG(status.st_mode) and offset + size > status.st_size:
            raise InvalidRegion(
                address, size, f"offset {offset:#x} and size exceed the file's {status.st_size:#x}"
            )
        kind, block_size = syscalls.file_system(fd)
        hugetlb = kind == syscalls.HUGETLBFS_MAGIC
        page_size = block_size if hugetlb else syscalls.PAGE_SIZE
        file_offset = align_down(offset, page_size)
        delta = offset - file_offset
        length = align_up(delta + size, page_size)
        if file_offset + length > _OFFSET_LIMIT:
            raise InvalidRegion(address, size, "offset and size exceed what a file can have")
        if self.require_seal and not sealed:
            raise InvalidRegion(address, size, "its file is not sealed against shrinking")
        # A sealed hugetlb file may still run out of large pages after a hole was punched.
        sealed = sealed and not hugetlb
        if self.read_only or not (sealed or self.guarded):
            window = None
        prot = syscalls.PROT_READ if self.read_only else syscalls.PROT_READ | syscalls.PROT_WRITE
        flags = syscalls.MAP_SHARED | syscalls.MAP_NORESERVE
        if window is None:
            base = syscalls.map_memory(0, length, prot, flags, fd, file_offset)
        else:
            alignment = _alignment(page_size, length)
            base = window.map(length, alignment, prot, flags, fd, file_offset)
        placement = _Placement(base, length, window)
        try:
            syscalls.keep_private(base, length)
            return MmapMapping(
                region,
                placement,
                ctypes.c_uint32(),
                delta=delta,
                page_size=page_size,
                sealed=sealed,
                guarded=self.guarded,
                read_only=self.read_only,
                bounded=kind in (syscalls.TMPFS_MAGIC, syscalls.RAMFS_MAGIC) or hugetlb,
            )
        except BaseException:
            placement.close()
            raise
