"""Counters of one queue."""

from __future__ import annotations

import ctypes
from typing import ClassVar

from virtqueue import Counters


class QueueCounters(Counters):
    """The counters of one queue since the device was created; reading them needs no lock.

    They are those of `virtqueue.Counters` (requests, batches, bytes, kicks, notifications_sent,
    notifications_suppressed) and two more: `errors` counts requests that a handler failed,
    `guest_errors` counts how often the guest broke the queue.
    """

    errors: int
    guest_errors: int

    _fields_: ClassVar = [
        ("errors", ctypes.c_uint64),
        ("guest_errors", ctypes.c_uint64),
    ]

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        names = [name for kind in (Counters, QueueCounters) for name, *_ in kind._fields_]
        return {name: getattr(self, name) for name in names}
