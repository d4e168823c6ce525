"""The buffers that a queue and its engine share, byte for byte.

A queue owns one `QueueBlock` and five arrays that the block points to; an engine touches nothing
else of the queue.  Both engines read and write these same buffers, so `DeviceQueue`, `Batch` and
`Chain` are the same code over either engine.  The C header mirrors this file; a test compares
sizes and offsets.

All fields are in native byte order and naturally aligned.  Addresses of host memory are u64.
"""

from __future__ import annotations

import ctypes
import struct
from enum import IntEnum, IntFlag
from typing import Final

ABI: Final = 2
MAGIC: Final = 0x45555156  # "VQUE" in little-endian memory

RECORD: Final = struct.Struct("=16sQQQIIHHHxxIxxxx")
"""One taken chain (64 bytes): header, readable, writable, status, readable_length,
writable_length, head, flags, segment_count, first_segment."""

SEGMENT: Final = struct.Struct("=QQIIQ")
"""One piece of a chain (32 bytes): host address, guest address, length, flags, provision.

The pieces of a chain lie in a row, the readable ones first; a descriptor that crosses regions
gives several.  ``provision`` is 0, or 1 + the index of the `Provision` that maps the piece."""

DONE: Final = struct.Struct("=HBBI")
"""One completion (8 bytes): head, status, flags, written."""


class RecordField:
    """Where each field is in what unpacking a `RECORD` gives."""

    HEADER: Final = 0
    READABLE: Final = 1
    WRITABLE: Final = 2
    STATUS: Final = 3
    READABLE_LENGTH: Final = 4
    WRITABLE_LENGTH: Final = 5
    HEAD: Final = 6
    FLAGS: Final = 7
    SEGMENT_COUNT: Final = 8
    FIRST_SEGMENT: Final = 9


class DoneField:
    """Where each field is in what unpacking a `DONE` gives."""

    HEAD: Final = 0
    STATUS: Final = 1
    FLAGS: Final = 2
    WRITTEN: Final = 3


RECORD_SIZE: Final = 64
SEGMENT_SIZE: Final = 32
DONE_SIZE: Final = 8
DONE_FLAGS_OFFSET: Final = 3
"""Bytes before the flags of a `DONE`."""
HEADER_SIZE: Final = 16
MAX_QUEUE_SIZE: Final = 32768
CHAIN_LIMIT: Final = 1024
"""Descriptors that a chain with an indirect table may have, or the queue size if that is more.

The specification allows the queue size.  Linux builds tables as long as the device's limits (a
disk's ``seg_max``) allow, whatever the ring's size, and other devices take them.
"""
MAX_CHAIN_LENGTH: Final = 0xFFFFFFFF
"""A chain's bytes, readable and writable together, have to fit in 32 bits."""


class RecordFlags(IntFlag):
    """Flags of a `RECORD`."""

    READABLE_CONTIGUOUS = 1
    """The readable bytes after the header are one piece inside the window."""
    WRITABLE_CONTIGUOUS = 2
    """The writable bytes (all but the last with a status byte) are one piece in the window."""
    EXTERNAL = 4
    """Some piece lies outside the window: offsets mean nothing, use the `Chain`."""
    RESUBMITTED = 8
    """Taken again after a restart: the request may have been executed before."""
    SHORT_HEADER = 16
    """There are fewer than 16 readable bytes; those missing are zero in the header."""


class SegmentFlags(IntFlag):
    """Flags of a `SEGMENT`."""

    WRITABLE = 1


class DoneFlags(IntFlag):
    """Flags of a `DONE` entry."""

    STATUS = 1
    """Write the status into the last writable byte."""
    KEEP = 2
    """Do not complete this one now: it stays in flight and is completed by head later."""
    WROTE_ALL = 4
    """Any writable byte may have been written: log them all, whatever ``written`` says.
    Implied when a status other than 0 is written."""
    LEFT = 8
    """A handler in C left this request to its caller."""


class Features(IntFlag):
    """How a ring works (`QueueBlock.features`)."""

    PACKED = 1
    EVENT_IDX = 2
    INDIRECT = 4
    IN_ORDER = 8
    BIG_ENDIAN = 16
    """Split rings only: ring fields and descriptors are big-endian (legacy guests)."""
    IOMMU = 32
    STATUS_BYTE = 64
    LOG_USED = 128
    """Writes to the device's ring are logged at `QueueBlock.log_used`."""


class QueueFlags(IntFlag):
    """What an engine has to know of its queue (`QueueBlock.flags`)."""

    INFLIGHT_UNGUARDED = 1
    """The in-flight region may vanish and nothing catches the fault: not to be touched directly."""


class Result(IntEnum):
    """What an engine call returns when it is negative."""

    BROKEN = -1
    """The ring is wrong: `QueueBlock.reason` and `detail` say how.  It stays so."""
    NEED = -2
    """`QueueBlock.need_address`, `need_length`, `need_access` have to be provided first.
    The ring has not advanced past the chain that needs them.  Chains already taken by the same
    call are returned first: NEED is only returned when there are none."""
    USAGE = -3
    """The caller is wrong: a head that is not in flight, a written length over the chain's."""
    ABI = -4
    """A shared structure has another magic, version or size."""
    NO_MEMORY = -5


class Reason(IntEnum):
    """Why a queue is broken (`QueueBlock.reason`)."""

    NONE = 0
    AVAIL_JUMP = 1
    """The available index ran ahead by more than the queue size."""
    HEAD_OUT_OF_RANGE = 2
    NEXT_OUT_OF_RANGE = 3
    CHAIN_TOO_LONG = 4
    """A loop, or a chain of more descriptors than the queue size, or with a table `CHAIN_LIMIT`."""
    INDIRECT_NOT_NEGOTIATED = 5
    INDIRECT_NESTED = 6
    INDIRECT_WITH_NEXT = 7
    INDIRECT_LENGTH = 8
    """The table's length is zero or not a multiple of 16, or the table is too long."""
    INDIRECT_NEXT_OUT_OF_RANGE = 9
    READABLE_AFTER_WRITABLE = 10
    TOTAL_LENGTH = 11
    """The chain's bytes do not fit in 32 bits."""
    ADDRESS = 12
    """An address outside every region, or one that wraps."""
    ACCESS = 13
    """A writable descriptor in memory that may not be written."""
    HEAD_IN_FLIGHT = 14
    """A head (packed: a buffer id) offered again before it was used."""
    ZERO_LENGTH = 15
    """A descriptor of no bytes."""
    STATUS_BYTE = 16
    """The chain has no writable byte for the status."""
    RING_MEMORY = 17
    """The ring is not in guest memory, or misaligned there."""
    TRUNCATED = 18
    """Memory was taken away under us (a bus error was survived in it)."""
    USED_RING = 20
    """Packed: the slot to be used next does not belong to a taken chain."""
    INFLIGHT = 21
    """The in-flight region contradicts itself or the ring."""
    UNFINISHED_CHAIN = 22
    """Packed: a head is available but a later descriptor of its chain is not."""


class More(IntFlag):
    """What is left after a take (`QueueBlock.more`)."""

    AVAILABLE = 1
    """At least one more chain is known to be available: take again before sleeping."""
    STALLED = 2
    """An available chain waits for room that completions will free: take after completing."""


class QueueBlock(ctypes.Structure):
    """Everything one queue and its engine share (``struct vq_queue``)."""

    magic: int
    abi: int
    size: int
    queue_size: int
    features: int
    flags: int
    descriptors: int
    driver: int
    device: int
    table: int
    log: int
    log_used: int
    log_pages: int
    inflight: int
    inflight_size: int
    inflight_poison: int
    records: int
    segments: int
    done: int
    staged: int
    provisions: int
    private: int
    record_capacity: int
    segment_capacity: int
    staged_capacity: int
    provision_capacity: int
    limit: int
    count: int
    segment_count: int
    staged_count: int
    notify: int
    more: int
    reason: int
    need_access: int
    need_address: int
    need_length: int
    detail: int
    taken: int
    completed: int
    counters: int
    in_flight: int
    resubmit: int
    next_avail: int
    next_used: int
    signalled_used: int
    avail_wrap: int
    used_wrap: int
    signalled_valid: int
    stopped: int
    reserved: ctypes.Array[ctypes.c_uint8]

    _fields_ = [
        # Set by the queue before the engine is created.
        ("magic", ctypes.c_uint32),
        ("abi", ctypes.c_uint32),
        ("size", ctypes.c_uint32),  # of this structure
        ("queue_size", ctypes.c_uint32),  # descriptors; split: a power of two
        ("features", ctypes.c_uint32),  # Features
        ("flags", ctypes.c_uint32),  # QueueFlags
        # Host addresses, set anew before each `attach`; 0 while the ring is not in memory.
        ("descriptors", ctypes.c_uint64),  # split: table; packed: ring
        ("driver", ctypes.c_uint64),  # split: available ring; packed: driver event structure
        ("device", ctypes.c_uint64),  # split: used ring; packed: device event structure
        ("table", ctypes.c_uint64),  # gm_table of the current snapshot
        ("log", ctypes.c_uint64),  # gm_log, or 0
        # Guest address of what `device` (packed: `descriptors`) maps. Where that is several pieces,
        # `log_pages` is the host address of its 4 KiB pages' guest addresses (u64), and `log_used`
        # the offset in the first of them.
        ("log_used", ctypes.c_uint64),
        ("log_pages", ctypes.c_uint64),  # or 0
        ("inflight", ctypes.c_uint64),  # this queue's in-flight region, or 0
        ("inflight_size", ctypes.c_uint64),  # bytes
        # u32 that is not 0 once a page of the region was found missing, or 0
        ("inflight_poison", ctypes.c_uint64),
        # The arrays, set once.
        ("records", ctypes.c_uint64),  # RECORD[record_capacity]
        ("segments", ctypes.c_uint64),  # SEGMENT[segment_capacity]
        ("done", ctypes.c_uint64),  # DONE[record_capacity], of the current batch
        ("staged", ctypes.c_uint64),  # DONE[staged_capacity], completions by head
        ("provisions", ctypes.c_uint64),  # Provision[provision_capacity]
        ("private", ctypes.c_uint64),  # the engine's own
        ("record_capacity", ctypes.c_uint32),
        ("segment_capacity", ctypes.c_uint32),  # room for the longest chain, at least
        ("staged_capacity", ctypes.c_uint32),
        ("provision_capacity", ctypes.c_uint32),
        # Arguments and results of calls.
        ("limit", ctypes.c_uint32),  # in: chains to take at most
        ("count", ctypes.c_uint32),  # out: chains in the current batch; cycle reads it first
        ("segment_count", ctypes.c_uint32),  # out
        ("staged_count", ctypes.c_uint32),  # in: entries in staged; publish sets it to 0
        ("notify", ctypes.c_uint32),  # out of publish and cycle: 1 signal the driver
        ("more", ctypes.c_uint32),  # out of take and cycle: More
        ("reason", ctypes.c_uint32),  # Reason; not 0 means broken for good
        ("need_access", ctypes.c_uint32),  # 1 read, 2 write, 3 both
        ("need_address", ctypes.c_uint64),  # guest address, or IOVA with Features.IOMMU
        ("need_length", ctypes.c_uint64),  # bytes
        ("detail", ctypes.c_uint64),  # the wrong value that goes with reason
        # Counters and position; the engine writes, the queue reads.
        ("taken", ctypes.c_uint64),  # chains, ever
        ("completed", ctypes.c_uint64),  # chains, ever
        ("counters", ctypes.c_uint64),  # host address of `Counters`, or 0
        ("in_flight", ctypes.c_uint32),  # chains taken and not completed
        ("resubmit", ctypes.c_uint32),  # chains of the in-flight region still to be taken again
        ("next_avail", ctypes.c_uint16),  # split: free-running; packed: slot
        ("next_used", ctypes.c_uint16),  # split: free-running; packed: slot
        ("signalled_used", ctypes.c_uint16),  # split: used index at the last signal
        ("avail_wrap", ctypes.c_uint8),  # packed
        ("used_wrap", ctypes.c_uint8),  # packed
        ("signalled_valid", ctypes.c_uint8),  # the driver has been told since the queue began
        ("stopped", ctypes.c_uint8),  # set by the queue: completions only release
        ("reserved", ctypes.c_uint8 * 6),
    ]


class Provision(ctypes.Structure):
    """A piece of guest memory that was mapped on demand (``struct vq_provision``, 32 bytes).

    The queue fills a free entry (``length`` 0) after NEED; the engine looks here for addresses
    in regions without a host address, counts in ``uses`` the pieces of taken chains that rest on
    the entry, and never moves it.  The queue frees an entry whose ``uses`` is 0.
    """

    guest_address: int
    length: int
    host_address: int
    access: int
    uses: int

    _fields_ = [
        ("guest_address", ctypes.c_uint64),  # guest physical, after the IOMMU
        ("length", ctypes.c_uint64),
        ("host_address", ctypes.c_uint64),
        ("access", ctypes.c_uint32),
        ("uses", ctypes.c_uint32),
    ]
