"""Virtqueues, split and packed, the device's side and the driver's, a batch at a time.

`DeviceQueue` takes the chains that a driver offers and gives them back; `DriverQueue` is the
other end.  The ring work is done by an engine in C or, where that is not to be had, in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._version import __version__
from .config import RingConfig, RingLayout, ring_layout
from .counters import Counters
from .engine.choose import available_engines, default_engine, load_engine
from .engine.inflight import InflightRegion, inflight_size
from .errors import (
    ChainCompleted,
    EngineUnavailable,
    Need,
    QueueBroken,
    UringUnavailable,
    UsageError,
    VirtqueueError,
)
from .layout import (
    DONE,
    RECORD,
    SEGMENT,
    DoneField,
    DoneFlags,
    Reason,
    RecordField,
    RecordFlags,
    SegmentFlags,
)
from .memory.sigbus_guard import SigbusGuard
from .memory.table import DirtyLog, Memory
from .native.file_handler import FileAction, FileHandler
from .native.handler import CHandler
from .native.server import Server
from .queue.batch import DONE_FIELDS, RECORD_FIELDS, Batch
from .queue.chain import Chain, Segment
from .queue.device import DeviceQueue
from .queue.position import RingState

if _TYPE_CHECKING:
    from .native.transfer import STREAM, Operation, Transfer, TransferFlags
    from .queue.driver import DriverQueue

# What a device that only takes and completes does without: most of all the driver's side, which
# brings the Python engine along.
_LAZY = {
    "DriverQueue": "queue.driver",
    "Operation": "native.transfer",
    "STREAM": "native.transfer",
    "Transfer": "native.transfer",
    "TransferFlags": "native.transfer",
}


def __getattr__(name: str) -> object:
    """Import what is used for the first time."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "DONE",
    "DONE_FIELDS",
    "RECORD",
    "RECORD_FIELDS",
    "SEGMENT",
    "STREAM",
    "Batch",
    "CHandler",
    "Chain",
    "ChainCompleted",
    "Counters",
    "DeviceQueue",
    "DirtyLog",
    "DoneField",
    "DoneFlags",
    "DriverQueue",
    "EngineUnavailable",
    "FileAction",
    "FileHandler",
    "InflightRegion",
    "Memory",
    "Need",
    "Operation",
    "QueueBroken",
    "Reason",
    "RecordField",
    "RecordFlags",
    "RingConfig",
    "RingLayout",
    "RingState",
    "Segment",
    "SegmentFlags",
    "Server",
    "SigbusGuard",
    "Transfer",
    "TransferFlags",
    "UringUnavailable",
    "UsageError",
    "VirtqueueError",
    "__version__",
    "available_engines",
    "default_engine",
    "inflight_size",
    "load_engine",
    "ring_layout",
]
