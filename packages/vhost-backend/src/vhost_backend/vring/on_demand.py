"""Guest memory that is only mapped while a request uses it (Xen grants, NO_ADVANCE_MAP).

A queue that meets an address in such memory raises `Need`. The pages are then pinned, lent to the
queue, and released once no request uses them. Pages that cannot be mapped are replaced by private
zeroes, so that the queue can take the request. The caller fails that request without showing it to
the device.
"""

from __future__ import annotations

import ctypes
import logging
import mmap

from guest_memory import GuestAddress, GuestMemory, GuestMemoryError
from virtqueue import Chain, DeviceQueue, Need

from ..rate_limited_log import RateLimited

log: logging.Logger = logging.getLogger("vhost_backend")

_PAGE = mmap.PAGESIZE


class OnDemand:
    """The pages that one queue has been lent."""

    def __init__(self) -> None:
        self._lent = False
        self._faults = RateLimited(log)
        #: (guest address, length) of the zeroes that stand in for pages that cannot be mapped.
        self._stand_ins: list[tuple[int, int]] = []

    @property
    def lent(self) -> bool:
        """Whether there is something to `reclaim`."""
        return self._lent

    @property
    def has_stand_ins(self) -> bool:
        """Whether some pages are stand-ins; chains are then taken one at a time."""
        return bool(self._stand_ins)

    def provide(self, queue: DeviceQueue, memory: GuestMemory, need: Need) -> bool:
        """Lend the queue the pages that it needs; False when it must complete something first."""
        start = need.address // _PAGE * _PAGE
        length = -(-(need.address + need.length) // _PAGE) * _PAGE - start
        try:
            address = GuestAddress(need.address)
            pinned = memory.with_pins([(address, need.length, need.access)])
            host = pinned.translate(address, need.length, need.access) - (address - start)
            keep: object = pinned
        except GuestMemoryError as error:
            self._faults.warning("a request cannot be mapped: %s", error)
            zeroes = mmap.mmap(-1, length)
            host = ctypes.addressof(ctypes.c_char.from_buffer(zeroes))
            self._stand_ins.append((start, length))
            keep = zeroes
        self._lent = True
        return queue.provide(start, length, need.access, host, lambda: keep)

    def reclaim(self, queue: DeviceQueue) -> None:
        """Release the pages that no request uses any more."""
        if self._lent:
            queue.reclaim()
            if not queue.in_flight:
                self._lent = False
                self._stand_ins.clear()

    def usable(self, chain: Chain) -> bool:
        """Whether none of the chain's pages is a stand-in."""
        return not any(
            segment.guest < start + length and start < segment.guest + segment.length
            for segment in chain.segments
            for start, length in self._stand_ins
        )
