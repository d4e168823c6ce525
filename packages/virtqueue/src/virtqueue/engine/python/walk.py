"""From a chain's descriptors to pieces of host memory; every rule about buffers is checked here."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

from ...layout import CHAIN_LIMIT, MAX_CHAIN_LENGTH, Features, QueueBlock, Reason
from ...memory import access
from ...memory.table import READ, WRITE, Broken, Piece, Table
from .taken import Taken

# Flags of a descriptor (virtio 2.7.5, 2.8.6).
NEXT: Final = 1
WRITABLE: Final = 2
INDIRECT: Final = 4

Descriptor = tuple[int, int, int, int]
"""(address, length, flags, next) of a split ring, (address, length, id, flags) of a packed one."""


class Walk:
    """How the chains of one ring are walked."""

    def __init__(self, block: QueueBlock, table: Table, provisions: Any) -> None:
        features = Features(block.features)
        self._indirect = Features.INDIRECT in features
        self._iommu = Features.IOMMU in features
        self._status_byte = Features.STATUS_BYTE in features
        self._capacity: int = block.segment_capacity
        self._provisions = provisions
        big_endian = Features.BIG_ENDIAN in features
        self.descriptor: struct.Struct = struct.Struct(">QIHH" if big_endian else "<QIHH")
        self.limit: int = max(CHAIN_LIMIT, block.queue_size)
        """Descriptors of a chain with an indirect table."""
        self.table: Table = table
        """The snapshot that chains are resolved with."""

    def resolve(
        self, taken: Taken, descriptors: Iterable[tuple[int, int, bool]]
    ) -> list[tuple[Piece, bool]]:
        """The pieces of a chain, with every rule about its buffers checked."""
        total = 0
        writable_seen = False
        pieces: list[tuple[Piece, bool]] = []
        for address, length, writable in descriptors:
            if not length:
                raise Broken(Reason.ZERO_LENGTH, address)
            if writable:
                writable_seen = True
            elif writable_seen:
                raise Broken(Reason.READABLE_AFTER_WRITABLE, address)
            total += length
            if total > MAX_CHAIN_LENGTH:
                raise Broken(Reason.TOTAL_LENGTH, total)
            # Without crossing regions the longest chain always fits; more crossings than the
            # whole buffer holds will not fit later either.
            if len(pieces) > self._capacity:
                raise Broken(Reason.CHAIN_TOO_LONG, len(pieces))
            found = self.table.pieces(
                address, length, WRITE if writable else READ, self._iommu, self._provisions
            )
            for piece in found:
                pieces.append((piece, writable))
                if writable:
                    taken.writable.append(piece)
                    taken.writable_length += piece.length
                if piece.provision:
                    taken.kept.append(piece.provision - 1)
                if piece.poison is None:
                    continue
                if piece.poison.value:
                    raise Broken(Reason.TRUNCATED, piece.guest)
                if piece.poison not in taken.poison:
                    taken.poison.append(piece.poison)
        if len(pieces) > self._capacity:
            raise Broken(Reason.CHAIN_TOO_LONG, len(pieces))
        if self._status_byte and not writable_seen:
            raise Broken(Reason.STATUS_BYTE, taken.head)
        taken.room = len(taken.writable) + len(taken.kept)
        return pieces

    def indirect_table(self, address: int, length: int) -> list[Descriptor]:
        """The descriptors of an indirect table, copied."""
        if not self._indirect:
            raise Broken(Reason.INDIRECT_NOT_NEGOTIATED, address)
        if not length or length % 16 or length > 16 * self.limit:
            raise Broken(Reason.INDIRECT_LENGTH, length)
        pieces = self.table.pieces(address, length, READ, self._iommu, self._provisions)
        raw = b"".join(access.read(piece, piece.length) for piece in pieces)
        return list(self.descriptor.iter_unpack(raw))
