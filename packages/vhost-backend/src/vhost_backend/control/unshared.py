"""Noticing guest memory that is not shared.

A front-end may hand over the file of its guest's memory although it has mapped that file privately
(QEMU without `share=on`). The guest then writes to private pages, and its requests never appear
here. No message tells this; the sign is that rings are still blank some seconds after their start.
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
    """Looks once at a connection's rings, some seconds after the first one has started."""

    def __init__(self, name: str, vrings: Sequence[Vring], memory: MemoryHolder) -> None:
        self._name = name
        self._vrings = vrings
        self._memory = memory
        #: When to look; None before a ring has started, and afterwards.
        self._due: float | None = None
        self._looked = False

    def ring_started(self) -> None:
        """Begin the wait at the connection's first ring. Called with the ring's lock held."""
        if not self._looked and self._due is None:
            self._due = time.monotonic() + DELAY

    @property
    def left(self) -> float | None:
        """Seconds until the look; None when none is due."""
        return None if self._due is None else max(0.0, self._due - time.monotonic())

    def look(self) -> None:
        """Look at the rings if it is time, and log a warning if all are blank."""
        if self._due is None or time.monotonic() < self._due:
            return
        self._due = None
        self._looked = True
        if self.is_likely():
            log.warning("%s: no request has come, and its rings are blank: %s", self._name, ADVICE)

    def postcopy(self) -> None:
        """Cancel the look: in postcopy, reading a ring could wait for its page."""
        self._due = None
        self._looked = True

    def disconnect(self) -> None:
        """Be ready for the next front-end."""
        self._due = None
        self._looked = False

    def is_likely(self) -> bool:
        """Whether rings run, and a driver has written to none of them."""
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
        return False  # these addresses are IOVAs
    descriptors, driver, _ = settings.addresses
    try:
        return not any(
            any(memory.read(memory.user_to_guest(UserAddress(address)), length))
            # A driver first writes the available index (behind the flags) or a descriptor.
            for address, length in ((descriptors, 16 * settings.size), (driver, 4))
        )
    except GuestMemoryError:
        return False  # the ring itself reports that, and more exactly
