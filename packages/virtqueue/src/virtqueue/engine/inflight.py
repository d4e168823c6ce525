"""The in-flight region of a queue (vhost-user specification, "Inflight I/O tracking").

The region is memory shared with the front-end, which keeps it while the back-end is away.  It
says which chains were taken and not yet used, so that a new process can take them again.  Here are
its place and its layouts; `python.split_inflight`, `python.packed_inflight` and ``inflight.c``
store in it.
"""

from __future__ import annotations

import ctypes
from typing import Final

from ..errors import UsageError

SPLIT_HEADER: Final = 16
SPLIT_ENTRY: Final = 16
PACKED_HEADER: Final = 32
PACKED_ENTRY: Final = 32


def inflight_size(size: int, packed: bool) -> int:
    """Bytes of one queue's region, aligned to 64 as front-ends expect from the back-end."""
    header, entry = (PACKED_HEADER, PACKED_ENTRY) if packed else (SPLIT_HEADER, SPLIT_ENTRY)
    return -(-(header + entry * size) // 64) * 64


class InflightRegion:
    """Where one queue's region is: ``address`` in this process, ``size`` in bytes.

    ``owner`` keeps the mapping alive.  ``poison`` is the host address of a 32-bit word that becomes
    not 0 when a thread touches a page that the front-end has truncated; 0 when that cannot happen.
    ``direct`` says that the memory may be touched directly: its file cannot shrink, or a
    `SigbusGuard` watches it.  Otherwise only the Python engine takes the region, and every access
    is a system call.
    """

    __slots__ = ("address", "direct", "owner", "poison", "size")

    def __init__(
        self,
        address: int,
        size: int,
        owner: object = None,
        *,
        poison: int = 0,
        direct: bool = True,
    ) -> None:
        if address % 8:
            raise UsageError(f"in-flight region at {address:#x} is not aligned to 8")
        self.address: int = address
        self.size: int = size
        self.owner: object = owner
        self.poison: int = poison
        self.direct: bool = direct


class SplitRegion(ctypes.Structure):
    """``QueueRegionSplit`` without its array."""

    features: int
    version: int
    desc_num: int
    last_batch_head: int
    used_idx: int

    _fields_ = [
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("last_batch_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
    ]


class SplitState(ctypes.Structure):
    """``DescStateSplit``."""

    inflight: int
    padding: ctypes.Array[ctypes.c_uint8]
    next: int
    counter: int

    _fields_ = [
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 5),
        ("next", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
    ]


class PackedRegion(ctypes.Structure):
    """``QueueRegionPacked`` without its array."""

    features: int
    version: int
    desc_num: int
    free_head: int
    old_free_head: int
    used_idx: int
    old_used_idx: int
    used_wrap_counter: int
    old_used_wrap_counter: int
    padding: ctypes.Array[ctypes.c_uint8]

    _fields_ = [
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("free_head", ctypes.c_uint16),
        ("old_free_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
        ("old_used_idx", ctypes.c_uint16),
        ("used_wrap_counter", ctypes.c_uint8),
        ("old_used_wrap_counter", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 7),
    ]


class PackedState(ctypes.Structure):
    """``DescStatePacked``."""

    inflight: int
    padding: int
    next: int
    last: int
    num: int
    counter: int
    id: int
    flags: int
    len: int
    addr: int

    _fields_ = [
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
        ("next", ctypes.c_uint16),
        ("last", ctypes.c_uint16),
        ("num", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
        ("id", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("len", ctypes.c_uint32),
        ("addr", ctypes.c_uint64),
    ]
