"""Pages of guest memory mapped a second time, side by side.

Behind an IOMMU a driver puts a ring that is larger than a page wherever it has pages, and the
engines want one address for each part of a ring. Shared memory can be had twice: mremap(2) with an
old size of 0 maps the same pages elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

from ..layout import Reason
from . import access
from .sigbus_guard import SigbusGuard
from .table import Broken, Piece

_PAGE: Final = os.sysconf("SC_PAGESIZE")
_PROT_NONE: Final = 0
_MAP_PRIVATE_ANONYMOUS_NORESERVE: Final = 0x4022
_MREMAP_MAYMOVE: Final = 1
_MREMAP_MAYMOVE_FIXED: Final = 3

_libc = ctypes.CDLL(None, use_errno=True)
_mmap: Any = _libc.mmap
_mmap.restype = ctypes.c_size_t
_mmap.argtypes = [
    *(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
]
_mremap: Any = _libc.mremap
_mremap.restype = ctypes.c_size_t
_mremap.argtypes = [
    *(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t)
]
_munmap: Any = _libc.munmap
_munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_FAILED: Final = ctypes.c_size_t(-1).value


class Joined:
    """Several pieces at consecutive host addresses, for as long as the object lives.

    `address` is the host address of the first byte.

    Raises `Broken`: RING_MEMORY for pieces that cannot be had so (they do not meet at boundaries of
    pages, may vanish with nothing to catch the fault, are mapped on demand, or are of large pages),
    TRUNCATED where a page is missing.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        #: (address, bytes) of what is mapped here and nowhere else.
        self._held: list[tuple[int, int]] = []
        self._watched: list[tuple[int, int]] = []
        self._unwatch: Callable[[int, int], None] = SigbusGuard.unwatch_range
        self._owner = os.getpid()
        for before, after in pairwise(pieces):
            if (before.host + before.length) % _PAGE or after.host % _PAGE:
                raise Broken(Reason.RING_MEMORY, after.guest)
        for piece in pieces:
            if piece.unguarded or piece.provision:
                raise Broken(Reason.RING_MEMORY, piece.guest)
        spans = [
            (piece.host & -_PAGE, -(-(piece.host + piece.length) // _PAGE) * _PAGE)
            for piece in pieces
        ]
        size = sum(end - start for start, end in spans)
        target: int = _mmap(0, size, _PROT_NONE, _MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
        if target == _FAILED:
            raise Broken(Reason.RING_MEMORY, pieces[0].guest)
        self._held.append((target, size))
        self.address: int = target + pieces[0].host % _PAGE
        for piece, (start, end) in zip(pieces, spans, strict=True):
            self._join(piece, start, end, target)
            target += end - start

    def _join(self, piece: Piece, start: int, end: int, target: int) -> None:
        # What postcopy has not brought yet is waited for at the mapping that is watched for it: a
        # touch of the second one would find zeroes, and the page could not be brought any more.
        byte = ctypes.c_char()
        for page in range(start, end, _PAGE):
            if not access.copy(page, ctypes.addressof(byte), 1, False):
                raise Broken(Reason.TRUNCATED, piece.guest)
        # A refused MREMAP_FIXED may have removed what was there, and another thread's mapping may
        # fall into the hole. So the kernel is asked first to map the same anywhere.
        length = end - start
        trial: int = _mremap(start, 0, length, _MREMAP_MAYMOVE, 0)
        if trial == _FAILED:
            raise Broken(Reason.RING_MEMORY, piece.guest)
        _munmap(trial, length)
        if _mremap(start, 0, length, _MREMAP_MAYMOVE_FIXED, target) != target:
            base, size = self._held.pop()
            self._held += [(base, target - base), (target + length, base + size - target - length)]
            raise Broken(Reason.RING_MEMORY, piece.guest)
        if piece.poison is not None:
            try:
                SigbusGuard.watch_range(target, end - start, _PAGE, ctypes.addressof(piece.poison))
            except ImportError:
                return  # without the library there is no guard, and this memory needs none
            self._watched.append((target, end - start))

    def __del__(self) -> None:
        # A forked child does not have it. When the interpreter ends, a daemon thread may be in C
        # with it, and modules may be empty.
        if sys.is_finalizing() or self._owner != os.getpid():
            return
        for start, length in self._watched:
            self._unwatch(start, length)
        for start, length in self._held:
            if length:
                _munmap(start, length)
