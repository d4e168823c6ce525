"""The Python loops that are measured: each takes and completes `turns` batches.

They get the queue, the driver's available ring, the available index and the size of a batch, and
return the new available index.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from virtqueue import DONE, Batch, DeviceQueue

CAPACITY = 1 << 40
# A request that begins up to SAFE and is no longer than LONGEST ends inside the disk, so most
# requests need no arithmetic. `refuse` looks at the others again.
LONGEST = 1 << 20
SAFE = (CAPACITY - LONGEST) // 512

# The fields of virtqueue.RECORD that a block device needs: the header's type and sector,
# readable_length, writable_length. Skipped fields cost nothing.
BLOCK_RECORD = struct.Struct("=I4xQ24xII16x")

Loop = Callable[[DeviceQueue, memoryview, int, int, int], int]


def batches(queue: DeviceQueue, index: memoryview, avail: int, batch: int, turns: int) -> int:
    """Take and complete with one call a batch, as a device in C does."""
    cycle = queue.cycle
    for _ in range(turns):
        avail = avail + batch & 0xFFFF
        index[1] = avail
        cycle()
    return avail


def records(queue: DeviceQueue, index: memoryview, avail: int, batch: int, turns: int) -> int:
    """Look at each record in Python, and write only the failures."""
    cycle, unpack = queue.cycle, BLOCK_RECORD.iter_unpack
    for _ in range(turns):
        avail = avail + batch & 0xFFFF
        index[1] = avail
        taken = cycle()
        for kind, sector, readable_length, writable_length in unpack(taken.records):
            if kind > 1 or sector > SAFE or readable_length > LONGEST or writable_length > LONGEST:
                break
        else:
            continue
        refuse(taken)
    return avail


def refuse(batch: Batch) -> None:
    """Fail the wrong requests of a batch. This is rare, so it need not be fast."""
    for position, (kind, sector, out, into) in enumerate(BLOCK_RECORD.iter_unpack(batch.records)):
        if kind > 1 or sector * 512 + (out if kind else into - 1) > CAPACITY:
            head = DONE.unpack_from(batch.done, position * 8)[0]
            DONE.pack_into(batch.done, position * 8, head, 1, 1, 1)


def chains(queue: DeviceQueue, index: memoryview, avail: int, batch: int, turns: int) -> int:
    """Read each header through a chain object."""
    cycle = queue.cycle
    for _ in range(turns):
        avail = avail + batch & 0xFFFF
        index[1] = avail
        for chain in cycle():
            chain.read(16)
    return avail
