"""Virtqueues, split and packed, the device's side and the driver's, a batch at a time.

`DeviceQueue` takes the chains that a driver offers and gives them back; `DriverQueue` is the
other end.  The ring work is done by an engine in C or, where that is not to be had, in Python.
"""

from __future__ import annotations

from ._version import __version__
from .batch import DONE_FIELDS, RECORD_FIELDS, Batch, Chain, Segment
from .config import RingConfig, RingLayout, ring_layout
from .device_queue import DeviceQueue, DirtyLog, RingState
from .driver_queue import DriverQueue
from .engines import available_engines, default_engine
from .errors import (
    ChainCompleted,
    EngineUnavailable,
    Need,
    QueueBroken,
    UringUnavailable,
    UsageError,
    VirtqueueError,
)
from .guard import SigbusGuard
from .inflight import InflightRegion, inflight_size
from .layout import DONE, RECORD, SEGMENT, DoneFlags, Reason, RecordFlags, SegmentFlags
from .table import Memory
from .transfer import STREAM, Operation, Transfer, TransferFlags
from .waiting import Waiter, WaitResult

__all__ = [
    "DONE",
    "DONE_FIELDS",
    "RECORD",
    "RECORD_FIELDS",
    "SEGMENT",
    "STREAM",
    "Batch",
    "Chain",
    "ChainCompleted",
    "DeviceQueue",
    "DirtyLog",
    "DoneFlags",
    "DriverQueue",
    "EngineUnavailable",
    "InflightRegion",
    "Memory",
    "Need",
    "Operation",
    "QueueBroken",
    "Reason",
    "RecordFlags",
    "RingConfig",
    "RingLayout",
    "RingState",
    "Segment",
    "SegmentFlags",
    "SigbusGuard",
    "Transfer",
    "TransferFlags",
    "UringUnavailable",
    "UsageError",
    "VirtqueueError",
    "WaitResult",
    "Waiter",
    "__version__",
    "available_engines",
    "default_engine",
    "inflight_size",
    "ring_layout",
]
