"""What code that makes the engine's calls itself needs of a queue: `Server`, and `CHandler`."""

from __future__ import annotations

from collections.abc import Callable

from ..memory.table import Memory
from .batch import Batch
from .device import DeviceQueue


class NativeSide:
    """A queue as its server in C sees it.  Not thread-safe, like the queue itself."""

    __slots__ = ("_queue", "begin", "block_address")

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self.block_address: int = queue.block_address
        """Host address of the block that the engine works on."""
        self.begin: Callable[..., Batch] = queue._batch._begin
        """``begin(count, left)``: the batch of ``count`` chains that the engine took, of which
        ``left`` (all when None) are for the caller."""

    @property
    def memory(self) -> Memory:
        """The snapshot that takes use."""
        return self._queue._memory

    def adopt(self) -> Batch:
        """Before a server goes on, after others may have changed the queue: the batch it uses."""
        queue = self._queue
        batch = queue._batch
        batch._memory = queue._memory
        batch.notify = False
        queue._drop_former()
        return batch

    def leave_batch(self) -> bool:
        """Before the engine completes the batch: what became of its chains as objects.

        Publishes what was staged; true when the driver wants to be signalled for that.
        """
        queue = self._queue
        if queue._batch.built:
            queue._objects.leave_batch(completing=True)
        return bool(queue._staged.count) and queue.publish()

    def note_left(self, left: int) -> None:
        """A handler in C has worked on the batch and left this many requests."""
        self._queue._batch._left = left
