"""Waiting for a driver: look at the rings for a while, then sleep.

Looking costs a processor and saves the driver its kick and us the wake-up; the time it is done
for is adapted to how long the waits are.  The wait happens in C with the GIL released.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from enum import IntFlag
from functools import partial

from .c_engine import library
from .errors import EngineUnavailable, UsageError


class WaitResult(IntFlag):
    """What ended a wait; 0 is the time-out."""

    READY = 1
    """A chain is available."""
    KICK = 2
    """The kick fd was readable."""
    WAKE = 4
    """The wake fd is readable."""
    INTERRUPTED = 8
    """A signal came."""


class WaitBlock(ctypes.Structure):
    """``struct vq_wait`` (48 bytes)."""

    size: int
    queue_count: int
    queues: int
    kick_fd: int
    wake_fd: int
    timeout_ms: int
    drain_kick: int
    spin_ns: int
    spin_max_ns: int
    reserved: int

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("queue_count", ctypes.c_uint32),
        ("queues", ctypes.c_uint64),
        ("kick_fd", ctypes.c_int32),
        ("wake_fd", ctypes.c_int32),
        ("timeout_ms", ctypes.c_int32),
        ("drain_kick", ctypes.c_uint32),
        ("spin_ns", ctypes.c_uint32),
        ("spin_max_ns", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64),
    ]


class Waiter:
    """One worker's wait over queues that the C engine drives.

    ``blocks`` are the host addresses of their blocks (`DeviceQueue`'s engine tells it:
    `CEngine.address`); the queues must stay open, and be this worker's, while it waits.
    ``kick_fd`` is what tells of kicks: an eventfd, whose count is taken when ``drain_kick``, or
    an epoll fd over several.  ``wake_fd`` is for others to end the wait; it is not read.
    ``spin_max`` is the longest time in seconds to look before sleeping; 0 never looks.

    Raises `EngineUnavailable` without the C engine.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        kick_fd: int = -1,
        wake_fd: int = -1,
        *,
        spin_max: float = 0.0,
        drain_kick: bool = True,
    ) -> None:
        if not 0 <= spin_max < 1:
            raise UsageError(f"a worker looks for 0 to 1 s before it sleeps, not {spin_max}")
        try:
            function = library().released.vq_wait
        except ImportError as error:
            raise EngineUnavailable(f"no waiting in C: {error}") from error
        self._queues = (ctypes.c_uint64 * len(blocks))(*blocks)
        self._block = WaitBlock(
            size=ctypes.sizeof(WaitBlock),
            queue_count=len(blocks),
            queues=ctypes.addressof(self._queues),
            kick_fd=kick_fd,
            wake_fd=wake_fd,
            timeout_ms=-1,
            drain_kick=int(drain_kick),
            spin_ns=round(spin_max * 1e9),
            spin_max_ns=round(spin_max * 1e9),
        )
        self._wait = partial(function, ctypes.c_void_p(ctypes.addressof(self._block)))

    def wait(self, timeout: float | None = None) -> WaitResult:
        """Wait for a chain, a kick or a wake-up, at most ``timeout`` seconds.

        Before it sleeps it has asked the drivers for kicks and looked once more.  Raises
        `OSError` when poll(2) fails.
        """
        self._block.timeout_ms = -1 if timeout is None else max(0, -(-int(timeout * 1e6) // 1000))
        result: int = self._wait()
        if result < 0:
            raise OSError(-result - 1000, os.strerror(-result - 1000))
        return WaitResult(result)

    @property
    def spin(self) -> float:
        """How long the next wait looks before it sleeps, in seconds."""
        nanoseconds: int = self._block.spin_ns
        return nanoseconds / 1e9
