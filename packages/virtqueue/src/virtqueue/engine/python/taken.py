"""A chain between its take and its completion, as the Python engine remembers it."""

from __future__ import annotations

import sys
from typing import Any

from guest_memory import atomic_add

from ...memory.table import PINS_OFFSET, Piece, Table


class Room(Exception):
    """A chain does not fit: into the batch's segments, or with what is in flight."""

    def __init__(self, stalled: bool) -> None:
        super().__init__(stalled)
        self.stalled: bool = stalled


class Taken:
    """The record of a chain from its take to its completion."""

    __slots__ = (
        "done",
        "entry",
        "flags",
        "head",
        "kept",
        "number",
        "poison",
        "resubmitted",
        "room",
        "slots",
        "status",
        "table",
        "writable",
        "writable_length",
        "written",
    )

    def __init__(self, head: int, slots: int, table: Table, number: int) -> None:
        self.head: int = head
        self.number: int = number
        """Chains that were taken before it, ever."""
        self.slots: int = slots
        """Descriptors of the ring that the chain covers."""
        self.table: Table = table
        self.writable: list[Piece] = []
        self.writable_length: int = 0
        self.kept: list[int] = []
        """Provisions whose use counts were raised."""
        self.poison: list[Any] = []
        self.room: int = 0
        self.entry: int = 0
        """Entry of the in-flight region (packed)."""
        self.done: bool = False
        self.written: int = 0
        self.status: int = 0
        self.flags: int = 0
        self.resubmitted: Any = None
        """What offers the chain again after a rewind when it came from the in-flight region."""


def add_pins(table: int, count: int) -> None:
    """Add to a table's 64-bit counter, which stays below 2**31, by its low word.

    The atomic operation takes 12-bit numbers.
    """
    address = table + PINS_OFFSET + (4 if sys.byteorder == "big" else 0)
    while count:
        step = max(-2048, min(2047, count))
        atomic_add(address, step)
        count -= step
