"""Noticing guest memory that is not shared.

A front-end hands over the file of its guest's memory also when it has mapped the file privately
(QEMU without `share=on`): the guest then writes to pages of its own, the file stays empty, and no
request ever shows. No message tells; an empty file under a ring without requests does.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Sequence

from ..vring_locks import Vring

log: logging.Logger = logging.getLogger("vhost_backend")

#: Seconds from the first ring's start to the word about it.
DELAY = 3.0
ADVICE = (
    "guest memory has to be shared: for QEMU -object memory-backend-memfd,id=mem,size=SIZE,share=on"
    " -machine memory-backend=mem, with SIZE as after -m"
)


class UnsharedMemory:
    """What the memory tables of one connection have shown."""

    def __init__(self, name: str, vrings: Sequence[Vring]) -> None:
        self._name = name
        self._vrings = vrings
        self._empty = False
        #: Requests that earlier connections have brought.
        self._before = 0
        self._timer: threading.Timer | None = None

    def table(self, fds: Sequence[int]) -> None:
        """A new table: the files of its regions."""
        self._begin(bool(fds) and all(map(_is_empty, fds)))

    def more(self, fd: int, first: bool) -> None:
        """One more region, which may be the first."""
        if first:
            self._begin(_is_empty(fd))
        else:
            self._empty = self._empty and _is_empty(fd)

    def _begin(self, empty: bool) -> None:
        self._empty = empty
        if empty:
            self._before = self._requests()

    def ring_started(self) -> None:
        """Look again after a while, if there is a doubt. Called with the ring's lock held."""
        if not self._empty or self._timer is not None:
            return
        self._timer = threading.Timer(DELAY, self._look)
        self._timer.daemon = True
        try:
            self._timer.start()
        except RuntimeError:  # no more threads: then without the word
            self._timer = None

    def disconnect(self) -> None:
        """The front-end is gone."""
        self._empty = False
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _look(self) -> None:
        if self._empty and self._requests() == self._before:
            log.warning(
                "%s: no request has come, and the guest's memory was empty when it was shared: %s",
                self._name,
                ADVICE,
            )

    def _requests(self) -> int:
        """Those that came, and those that were wrong."""
        total = 0
        for vring in self._vrings:
            with vring.get_ref() as state:
                total += state.counters.requests + state.counters.guest_errors + state.in_flight
        return total


def _is_empty(fd: int) -> bool:
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and not status.st_blocks
