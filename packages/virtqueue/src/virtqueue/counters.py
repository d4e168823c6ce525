"""What a queue has done, in numbers that C and Python add to."""

from __future__ import annotations

import ctypes


class Counters(ctypes.Structure):
    """Counters of one queue (``struct vq_counters``, 48 bytes), from zero; reading needs no lock.

    requests: chains taken; batches: takes that returned any; bytes: readable ones of chains taken
    and those that completions report as written, status bytes included; kicks: wake-ups by the
    driver; notifications_sent and notifications_suppressed: completions that the driver was
    signalled for, or did not want to be.
    """

    requests: int
    batches: int
    bytes: int
    kicks: int
    notifications_sent: int
    notifications_suppressed: int

    _fields_ = [
        ("requests", ctypes.c_uint64),
        ("batches", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("kicks", ctypes.c_uint64),
        ("notifications_sent", ctypes.c_uint64),
        ("notifications_suppressed", ctypes.c_uint64),
    ]
