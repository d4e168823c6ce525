"""Choosing the ring format of an engine in Python."""

from __future__ import annotations

from .layout import Features, QueueBlock
from .packed_engine import PackedEngine
from .python_engine import RingEngine
from .split_engine import SplitEngine
from .table import Memory


def create(block: QueueBlock, memory: Memory) -> RingEngine:
    """An engine for the ring that the block describes."""
    if Features.PACKED in Features(block.features):
        return PackedEngine(block, memory)
    return SplitEngine(block, memory)
