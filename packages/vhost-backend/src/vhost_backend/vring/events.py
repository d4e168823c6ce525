"""The callbacks by which a ring tells the rest of the daemon of events."""

from __future__ import annotations

from collections.abc import Callable

from virtqueue import Batch

from .wanted import Wanted


class RingEvents:
    """The callbacks of one ring, each called with the ring's lock held. They survive a reset."""

    def __init__(self) -> None:
        #: A back-end has taken a batch. Arguments: the ring's generation, and the batch.
        self.on_take: Callable[[int, Batch], None] | None = None
        #: Requests were completed. Set only while a thread waits for that.
        self.on_progress: Callable[[], None] | None = None
        #: The IOTLB lacks an entry (see `control.iommu`). Arguments: the ring's index, and the
        #: memory that it waits for. Returns whether the front-end was asked for the entry.
        self.on_miss: Callable[[int, Wanted], bool] | None = None
        #: The front-end has taken away guest memory that it had shared.
        self.on_truncated: Callable[[], None] | None = None
        #: No request is in flight any more; called once (`VringState.begin_drain`, `leave`).
        self.on_drained: Callable[[], None] | None = None

    def truncated(self) -> None:
        """Call `on_truncated`."""
        if self.on_truncated is not None:
            self.on_truncated()

    def drained(self) -> None:
        """Call `on_drained` and forget it."""
        if self.on_drained is not None:
            callback, self.on_drained = self.on_drained, None
            callback()
