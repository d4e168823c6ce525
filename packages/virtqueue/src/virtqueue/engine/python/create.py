"""Which Python engine a ring gets: the one of its format."""

from __future__ import annotations

from collections.abc import Callable

from ...layout import Features, QueueBlock
from ...memory.table import Memory
from .packed import PackedEngine
from .ring import RingEngine
from .split import SplitEngine


def create(block: QueueBlock, memory: Memory) -> RingEngine:
    """An engine for the ring that the block describes."""
    kind: Callable[[QueueBlock, Memory], RingEngine]
    kind = PackedEngine if Features.PACKED in Features(block.features) else SplitEngine
    return kind(block, memory)
