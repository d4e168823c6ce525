"""Whether a ring is used for the first time, and what an in-flight region of its past is worth.

A front-end keeps an in-flight region while the guest resets its device and sets the ring up anew.
A back-end that dies leaves the same region, and a front-end may send a base as at reset for a ring
that is in use (QEMU does for a packed one).  Neither tells the two apart.  The ring itself does,
because drivers begin with zeroes.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from guest_memory import try_copy

from ..engine.inflight import (
    PACKED_ENTRY,
    PACKED_HEADER,
    SPLIT_ENTRY,
    SPLIT_HEADER,
    InflightRegion,
    PackedRegion,
    SplitRegion,
)
from ..layout import QueueBlock

# In the lower byte of a packed descriptor's flags, and (USED) in the upper one.
_NEXT: Final = 1
_INDIRECT: Final = 4
_AVAIL: Final = 0x80
_USED: Final = 0x80


def has_no_past(block: QueueBlock, packed: bool, region: InflightRegion | None) -> bool:
    """Whether a ring that was just found begins anew, and so its in-flight region, if it has one.

    A region of an earlier life in which nothing is in flight becomes a new one.
    """
    fresh = _at_reset(block, packed)
    if region is not None and _in_use(region):
        if fresh:
            _forget(block, region, packed)
        return False
    return fresh and _never_used(block, packed)


def _at_reset(block: QueueBlock, packed: bool) -> bool:
    """Whether the position is the one of a ring that was never used."""
    if packed:
        used = (block.next_used, block.used_wrap)
        return (block.next_avail, block.avail_wrap) == used == (0, 1)
    return block.next_avail == block.next_used == 0


def _never_used(block: QueueBlock, packed: bool) -> bool:
    """Whether the memory of a ring, whose position is as at reset, shows no completion.

    The driver may be filling the ring meanwhile.
    """
    if packed:
        return _first_lap(_copy(block.descriptors, 16 * block.queue_size))
    return not any(_copy(block.device + 4, 8 * block.queue_size) or b"?")


def _first_lap(ring: bytes) -> bool:
    if not ring or any(high & _USED for high in ring[15::16]):
        return False
    # Used descriptors of the first lap have USED set, and those of the second have filled the ring.
    return not any(ring[-16:]) or all(low & _AVAIL for low in ring[14::16])


def _in_use(region: InflightRegion) -> bool:
    """Whether a back-end has initialised the region."""
    header = _copy(region.address, min(region.size, SPLIT_HEADER))
    return len(header) < SPLIT_HEADER or SplitRegion.from_buffer_copy(header).version != 0


def _forget(block: QueueBlock, region: InflightRegion, packed: bool) -> None:
    """Make a region in use a new one when nothing is in flight in it and the ring was set up anew.

    The ring's position is as at reset.
    """
    header, entry = (PACKED_HEADER, PACKED_ENTRY) if packed else (SPLIT_HEADER, SPLIT_ENTRY)
    raw = _copy(region.address, region.size)
    if len(raw) < header or any(raw[header::entry]):
        return
    # A split ring's own used index says where it stands.
    if packed and not _set_up_anew(block, PackedRegion.from_buffer_copy(raw)):
        return
    # One store is enough: the other fields of a new region mean nothing.
    zero = ctypes.c_uint16()
    place: Any = SplitRegion.version
    try_copy(region.address + place.offset, ctypes.addressof(zero), 2, to_guest=True)


def _set_up_anew(block: QueueBlock, region: PackedRegion) -> bool:
    """Whether a packed ring cannot stand where its region says."""
    slot, wrap = region.used_idx, region.used_wrap_counter & 1
    if (slot, wrap) != (region.old_used_idx, region.old_used_wrap_counter & 1):
        return False  # a chain was being returned when the process died
    ring = _copy(block.descriptors, 16 * block.queue_size)
    if not _first_lap(ring):
        return False
    if not any(ring[-16:]) or not wrap or not slot:
        return True
    # Only what a chain across the end of the ring leaves at its start looks like this, too.
    flags = ring[14 : 16 * slot : 16]
    tail = all(each & _NEXT for each in flags[:-1]) and not (flags and flags[-1] & _NEXT)
    return not tail or any(each & _INDIRECT for each in flags)


def _copy(address: int, length: int) -> bytes:
    """The bytes at a host address; none when a page is missing."""
    data = (ctypes.c_char * length)()
    if not try_copy(address, ctypes.addressof(data), length, to_guest=False):
        return b""
    return data.raw
