"""Choosing the ring format of an engine in Python."""

from __future__ import annotations

from ...layout import Features, QueueBlock
from ...memory.table import Memory
from .packed import PackedEngine
from .ring import RingEngine
from .split import SplitEngine


def create(block: QueueBlock, memory: Memory) -> RingEngine:
    """An engine for the ring that the block describes."""
    if Features.PACKED in Features(block.features):
        return PackedEngine(block, memory)
    return SplitEngine(block, memory)
