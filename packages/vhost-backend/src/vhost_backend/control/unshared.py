"""Noticing guest memory that is not shared.

A front-end hands over the file of its guest's memory also when it has mapped the file privately
(QEMU without `share=on`): the guest then writes to pages of its own, and no request ever shows. No
message tells; rings that are blank a while after they were started do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from guest_memory import GuestMemory, GuestMemoryError, MemoryHolder, UserAddress

from ..features import VirtioFeature
from ..vring.locks import Vring
from ..vring.state import VringState

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds from the first ring's start to the look at it.
DELAY = 3.0
ADVICE = (
    "if the guest hangs, its memory is not shared: for QEMU"
    " -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem,"
    " with SIZE as after -m"
)


class UnsharedMemory:
    """The doubt about one connection's memory, and the look that settles it."""

    def __init__(self, name: str, vrings: Sequence[Vring], memory: MemoryHolder) -> None:
        self._name = name
        self._vrings = vrings
        self._memory = memory
        #: When to look; None before a ring has started, and afterwards.
        self._due: float | None = None
        self._looked = False

    def ring_started(self) -> None:
        """The first ring of the connection begins the wait. Called with the ring's lock held."""
        if not self._looked and self._due is None:
            self._due = time.monotonic() + DELAY

    @property
    def left(self) -> float | None:
        """Seconds until the look; None when there is no doubt.

        A front-end that still sends messages may be about to set up the next ring.
        """
        return None if self._due is None else max(0.0, self._due - time.monotonic())

    def look(self) -> None:
        """Look if it is time."""
        if self._due is None or time.monotonic() < self._due:
            return
        self._due = None
        self._looked = True
        if self.is_likely():
            log.warning("%s: no request has come, and its rings are blank: %s", self._name, ADVICE)

    def postcopy(self) -> None:
        """No look: it could have to wait for the page."""
        self._due = None
        self._looked = True

    def disconnect(self) -> None:
        """The front-end is gone."""
        self._due = None
        self._looked = False

    def is_likely(self) -> bool:
        """Whether there are rings that run, and not one that a driver has written to."""
        memory = self._memory.current
        blank = []
        for vring in self._vrings:
            with vring.get_ref() as state:
                if state.running:
                    blank.append(_is_blank(state, memory))
        return bool(blank) and all(blank)


def _is_blank(state: VringState, memory: GuestMemory) -> bool:
    settings = state.settings
    if settings.addresses is None or settings.features & VirtioFeature.ACCESS_PLATFORM:
        return False  # behind an IOMMU the addresses are others
    descriptors, driver, _ = settings.addresses
    try:
        return not any(
            any(memory.read(memory.user_to_guest(UserAddress(address)), length))
            # An index is what a driver writes first: behind the flags, or in the first descriptor.
            for address, length in ((descriptors, 16 * settings.size), (driver, 4))
        )
    except GuestMemoryError:
        return False  # which the ring's own look says better
