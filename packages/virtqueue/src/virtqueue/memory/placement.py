"""Where a part of a ring lies for the host: in one piece, or in pages mapped side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .table import Piece

if TYPE_CHECKING:
    from .joined import Joined

PAGE: Final = 4096
"""Bytes that a bit of the dirty log stands for."""


class Placement:
    """A part of a ring: `host` is the host address of its first byte, `pieces` what is there.

    The maker of the pieces keeps the snapshot that they come from for as long as this is used.
    `before` is where the part was until now: its mapping is used again if it fits.

    Raises `Broken` (RING_MEMORY, TRUNCATED) for pieces that cannot be had side by side.
    """

    def __init__(self, pieces: Sequence[Piece], before: Placement | None = None) -> None:
        self.pieces: list[Piece] = _merged(pieces)
        self._joined: Joined | None = None
        if len(self.pieces) == 1:
            self.host: int = self.pieces[0].host
        elif before is not None and before._span == self._span:
            self._joined, self.host = before._joined, before.host
        else:
            from .joined import Joined

            self._joined = Joined(self.pieces)
            self.host = self._joined.address

    @property
    def _span(self) -> list[tuple[int, int]]:
        return [(piece.host, piece.length) for piece in self.pieces]


def log_pages(pieces: Sequence[Piece]) -> list[int] | None:
    """Guest addresses of the pages that pieces touch, in their order; None when they do not meet at
    boundaries of pages."""
    pages: list[int] = []
    position = pieces[0].guest % PAGE
    for piece in pieces:
        if (piece.guest - position) % PAGE:
            return None
        first = piece.guest & -PAGE
        if pages and position % PAGE:
            if first != pages[-1]:
                return None
            first += PAGE
        pages += range(first, piece.guest + piece.length, PAGE)
        position += piece.length
    return pages


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours that continue each other for the host and the guest are one."""
    merged = [pieces[0]]
    for piece in pieces[1:]:
        last = merged[-1]
        if (last.host + last.length, last.guest + last.length) == (piece.host, piece.guest):
            merged[-1] = last._replace(length=last.length + piece.length)
        else:
            merged.append(piece)
    return merged
