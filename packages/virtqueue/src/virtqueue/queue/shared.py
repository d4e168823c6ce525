"""What a queue shares with its engine: the block and its arrays, made for a ring."""

from __future__ import annotations

import ctypes
import mmap

from ..config import RingConfig
from ..counters import Counters
from ..engine.inflight import InflightRegion
from ..layout import (
    ABI,
    CHAIN_LIMIT,
    DONE_SIZE,
    MAGIC,
    RECORD_SIZE,
    SEGMENT_SIZE,
    QueueBlock,
    QueueFlags,
)
from .provisions import PROVISIONS, ProvisionArray, Provisions


class _Arrays:
    """Zeroed arrays that a queue shares with its engine, in pages of which untouched ones cost
    nothing: a chain can be long, and few are.
    """

    def __init__(self, *sizes: int) -> None:
        rounded = [-(-size // 64) * 64 for size in sizes]
        whole = memoryview(mmap.mmap(-1, sum(rounded), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        address = ctypes.addressof(ctypes.c_uint8.from_buffer(whole))
        self.views: list[memoryview] = []
        self.addresses: list[int] = []
        start = 0
        for size, step in zip(sizes, rounded, strict=True):
            self.views.append(whole[start : start + size])
            self.addresses.append(address + start)
            start += step


class Shared:
    """A block with its arrays, for batches of up to ``batch`` chains.

    Neither ring nor memory table is set: both come when the ring is placed.
    """

    def __init__(
        self,
        config: RingConfig,
        batch: int,
        inflight: InflightRegion | None,
        counters: Counters | None,
    ) -> None:
        size = config.size
        # Room for the longest chain and the regions it may cross, and for usual batches.
        segments = max(max(CHAIN_LIMIT, size) + 1024, 16 * batch)
        block = QueueBlock()
        arrays = _Arrays(
            batch * RECORD_SIZE,
            segments * SEGMENT_SIZE,
            batch * DONE_SIZE,
            size * DONE_SIZE,
            ctypes.sizeof(ProvisionArray),
        )
        block.magic, block.abi, block.size = MAGIC, ABI, ctypes.sizeof(QueueBlock)
        block.queue_size = size
        block.features = config.features
        block.records, block.segments, block.done, block.staged, block.provisions = arrays.addresses
        block.record_capacity = batch
        block.segment_capacity = segments
        block.staged_capacity = size
        block.provision_capacity = PROVISIONS
        block.limit = batch
        if inflight is not None:
            block.inflight, block.inflight_size = inflight.address, inflight.size
            block.inflight_poison = inflight.poison
            if not inflight.direct:
                block.flags |= QueueFlags.INFLIGHT_UNGUARDED
        if counters is not None:
            block.counters = ctypes.addressof(counters)
        self.block: QueueBlock = block
        self.records: memoryview
        self.segments: memoryview
        self.done: memoryview
        self.staged: memoryview
        self.records, self.segments, self.done, self.staged, provisions = arrays.views
        self.provisions: Provisions = Provisions(block, ProvisionArray.from_buffer(provisions))
