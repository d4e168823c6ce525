"""A device queue over guest memory that is laid out as for the C and the Rust loops.

A split ring of 512 entries holds 128 chains of three direct descriptors: a header, 4096 bytes of
data and a status. Each header lies in a page and at an offset of its own, for the reason in
docs/performance-decisions.md. engine.c and ../peers/src/bin/ring.rs have the same layout.
"""

from __future__ import annotations

import mmap
import os
import struct

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress, allocate_memfd
from virtqueue import DeviceQueue, RingConfig

QUEUE = 512
CHAINS = 128
REGION = 2 << 20
STRIDE = 4 << 20
USER = 0x7000_0000_0000
AVAIL = 0x4000
USED = 0x8000
NEXT, WRITE = 1, 2


class Ring:
    """A device queue, and the driver's view of the available index."""

    def __init__(self, regions: int, batch: int) -> None:
        self._maps: list[mmap.mmap] = []
        pairs = []
        for number in range(regions):
            fd = allocate_memfd(REGION)
            self._maps.append(mmap.mmap(fd, REGION))
            guest = number * STRIDE
            pairs.append((Region(GuestAddress(guest), REGION, UserAddress(USER + guest)), fd))
        self.memory = GuestMemory.map(pairs)
        for _, fd in pairs:
            os.close(fd)
        self._fill(regions)
        config = RingConfig(
            QUEUE, USER, USER + AVAIL, USER + USED, event_idx=True, status_byte=True
        )
        self.queue = DeviceQueue(config, self.memory, base=0, engine="c", batch=batch)
        self.index = memoryview(self._maps[0]).cast("H")[AVAIL // 2 : USED // 2]
        self.avail = 0

    def _put(self, guest: int, data: bytes) -> None:
        number, offset = divmod(guest, STRIDE)
        self._maps[number][offset : offset + len(data)] = data

    def _fill(self, regions: int) -> None:
        others = regions - 1
        for chain in range(CHAINS):
            control = (1 + 2 * chain % others) * STRIDE + 0xC0000 + chain * 4096
            data = (1 + (2 * chain + 1) % others) * STRIDE + 0x10000 + chain * 4096
            head = 3 * chain
            for index, descriptor in enumerate(
                (
                    (control, 16, NEXT, head + 1),
                    (data, 4096, NEXT | WRITE, head + 2),
                    (control + 32, 1, WRITE, 0),
                )
            ):
                self._put(16 * (head + index), struct.pack("<QIHH", *descriptor))
        heads = [slot % CHAINS * 3 for slot in range(QUEUE)]
        # used_event, behind the ring, is far off: the driver wants no notification.
        self._put(AVAIL + 4, struct.pack(f"<{QUEUE + 1}H", *heads, 0x8000))
