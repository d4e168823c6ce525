"""The engine in C behind the interface of all engines: calls bound to one queue's block."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

from ..c_library import library
from ..errors import EngineUnavailable
from ..layout import QueueBlock
from ..memory.table import Memory
from .interface import EngineName

Call = Callable[[], int]


class CEngine:
    """One queue's engine in C.  Not thread-safe: its owner makes one call at a time.

    The calls are bound to the block once, so that each costs one call into C and no conversion.
    """

    name: EngineName = "c"

    def __init__(self, block: QueueBlock) -> None:
        loaded = library()
        self._block = block
        self.address: int = ctypes.addressof(block)
        """Host address of the block."""
        self._released: bool | None = None
        argument = ctypes.c_void_p(self.address)
        result = loaded.held.vq_create(argument)
        if result < 0:
            raise EngineUnavailable(f"the C engine refuses the queue's block ({result})")
        self._close: Callable[[], None] = partial(loaded.held.vq_close, argument)
        self._bind(release_gil=False)

    def _bind(self, release_gil: bool) -> None:
        if release_gil is self._released:
            return
        self._released = release_gil
        loaded, argument = library(), ctypes.c_void_p(self.address)
        functions = loaded.released if release_gil else loaded.held
        self.attach: Call = partial(functions.vq_attach, argument)
        self.recover: Call = partial(functions.vq_recover, argument)
        self.take: Call = partial(functions.vq_take, argument)
        self.publish: Call = partial(functions.vq_publish, argument)
        self.cycle: Call = partial(functions.vq_cycle, argument)
        self.rewind: Call = partial(functions.vq_rewind, argument)
        self._untake: Callable[..., int] = partial(functions.vq_untake, argument)
        self.arm: Call = partial(functions.vq_arm, argument)
        self.disarm: Call = partial(functions.vq_disarm, argument)
        self.ready: Call = partial(functions.vq_ready, argument)

    def untake(self, heads: ctypes.Array[ctypes.c_uint16]) -> int:
        return self._untake(heads, ctypes.c_uint32(len(heads)))

    def set_memory(self, memory: Memory) -> None:
        """Keep the GIL in calls as long as an access to the new snapshot is bounded.

        The table itself is read from ``block.table`` when the engine attaches.
        """
        self._bind(release_gil=not getattr(memory, "bounded", True))

    def close(self) -> None:
        """Release the records of all chains in flight and the engine's memory."""
        self._close()


def create(block: QueueBlock) -> CEngine:
    """An engine for the ring that the block describes.

    Its calls keep the GIL, since they are short and bounded, as long as guest memory cannot make a
    thread wait.  `CEngine.set_memory` chooses anew for each snapshot: memory under userfaultfd
    (postcopy), behind FUSE, or mapped from Xen makes the calls release it.
    """
    return CEngine(block)


def check() -> None:
    """Raise ImportError, with the reason, where there is no library to serve with."""
    library()
