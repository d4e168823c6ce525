"""Handlers in C: functions that work on a batch without Python."""

from __future__ import annotations

import ctypes
from typing import Any, Final

from ..queue.device import DeviceQueue
from ..queue.native_side import NativeSide

_PROTOTYPE: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class CHandler:
    """A function in C that works on batches: ``vq_handler`` in ``virtqueue.h``.

    ``function`` is its host address.  The first argument of a call is ``context``, the second the
    queue's block (``struct vq_queue`` of `virtqueue.h`: records, segments, done, count).  The
    function marks each request that it leaves to Python with ``DoneFlags.LEFT``, and returns their
    number.  It runs without the GIL, must not keep anything of the queue, and must not touch the
    ring.  The maker of the object keeps function and context alive as long as it is used.

    ``batch`` is the host address of a 32-bit number: how many requests the function wants at once.
    The function may change it in each call.  0 as the number, or as the address, means as many as
    there are.
    """

    def __init__(self, function: int, context: int = 0, batch: int = 0) -> None:
        self.function: int = function
        self.context: int = context
        self.batch: int = batch
        self._call: Any = _PROTOTYPE(function)

    def handle(self, queue: DeviceQueue) -> int:
        """Work on the batch that was taken from ``queue`` last; how many requests are left.

        `Batch.left` names them.
        """
        side = NativeSide(queue)
        left: int = self._call(self.context, side.block_address)
        side.note_left(left)
        return left
