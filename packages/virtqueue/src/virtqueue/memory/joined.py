"""Pages of guest memory mapped a second time, side by side.

Behind an IOMMU a driver puts a ring that is larger than a page wherever it has pages, and the
engines want one address for each part of a ring. Shared memory can be had twice, in a window of
guest_memory's.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from guest_memory import MappingFailed, Window, WindowFull, try_copy

from ..layout import Reason
from .sigbus_guard import SigbusGuard
from .table import Broken, Piece

_PAGE: Final = os.sysconf("SC_PAGESIZE")


class Joined:
    """Several pieces at consecutive host addresses, for as long as the object lives.

    `address` is the host address of the first byte.

    Raises `Broken`: RING_MEMORY for pieces that cannot be had so (they do not meet at boundaries of
    pages, may vanish with nothing to catch the fault, are mapped on demand, or are of large pages),
    TRUNCATED where a page is missing.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        #: (address, bytes) of the places taken in the window, one after the other.
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
        try:
            self._window = Window(sum(end - start for start, end in spans))
        except MappingFailed:
            raise Broken(Reason.RING_MEMORY, pieces[0].guest) from None
        for piece, (start, end) in zip(pieces, spans, strict=True):
            self._join(piece, start, end - start)
        self.address: int = self._window.base + pieces[0].host % _PAGE

    def _join(self, piece: Piece, start: int, length: int) -> None:
        # What postcopy has not brought yet is waited for at the mapping that is watched for it: a
        # touch of the second one would find zeroes, and the page could not be brought any more.
        byte = ctypes.c_char()
        for page in range(start, start + length, _PAGE):
            if not try_copy(page, ctypes.addressof(byte), 1, False):
                raise Broken(Reason.TRUNCATED, piece.guest)
        try:
            place = self._window.duplicate(start, length, _PAGE)
        except (MappingFailed, WindowFull):
            raise Broken(Reason.RING_MEMORY, piece.guest) from None
        self._held.append((place, length))
        if piece.poison is not None:
            try:
                SigbusGuard.watch_range(place, length, _PAGE, ctypes.addressof(piece.poison))
            except ImportError:
                return  # without the library there is no guard, and this memory needs none
            self._watched.append((place, length))

    def __del__(self) -> None:
        # A forked child does not have it. When the interpreter ends, a daemon thread may be in C
        # with it, and modules may be empty.
        if sys.is_finalizing() or self._owner != os.getpid():
            return
        for place, length in self._watched:
            self._unwatch(place, length)
        # The window goes with this object, and unmaps what is in it once it has all places back.
        for place, length in self._held:
            self._window.give_back(place, length)
