"""Waiting for a device to end what it works on: what the log says, and which messages go first.

A ring is stopped when nothing of the device can touch guest memory or the device's medium any more,
however long that takes. Both kinds of daemon wait with these classes; the I/O is theirs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import vhost_protocol as vp

from ..control import ControlPlane

log: logging.Logger = logging.getLogger("vhost_backend")

#: Messages that are read while another one waits; a front-end that sends more is left waiting.
AHEAD: Final = 64
#: The most seconds between two log lines about one wait.
LONGEST_SILENCE: Final = 300.0

#: What decides which IOTLB entries are good: no update goes before one of these.
_BEFORE_UPDATES = (vp.SetMemTable, vp.AddMemReg, vp.RemMemReg, vp.SetFeatures, vp.IotlbMsg)


class WaitLog:
    """Log lines about one wait: after `patience` seconds, then after as long again, and so on.

    `what` waits, and `working` tells for which requests; it is asked for each line.
    """

    def __init__(self, what: str, working: Callable[[], Sequence[str]], patience: float) -> None:
        self._what = what
        self._working = working
        self._start = time.monotonic()
        self._next = self._start + patience
        self._step = patience
        self._said = False

    @property
    def left(self) -> float:
        """Seconds until the next line."""
        return max(0.0, self._next - time.monotonic())

    def look(self) -> None:
        """Log a line if it is time."""
        now = time.monotonic()
        if now < self._next:
            return
        log.warning(
            "%s waits for requests that the device has had for more than %.0f s: %s",
            self._what,
            now - self._start,
            "; ".join(self._working()) or "the device is about to end them",
        )
        self._said = True
        self._next = now + self._step
        self._step = min(2 * self._step, LONGEST_SILENCE)

    def end(self) -> None:
        """The wait is over."""
        if self._said:
            log.warning("%s waited %.0f s", self._what, time.monotonic() - self._start)


class Remains:
    """What the device still works on for a front-end that has gone.

    `wait_log` makes the log of that wait.
    """

    def __init__(self, control: ControlPlane, wait_log: Callable[[], WaitLog]) -> None:
        self._control = control
        self._wait_log = wait_log
        self._report: WaitLog | None = None

    def look(self) -> float | None:
        """Start what waited for requests that have ended, and log if it is time.

        Returns the seconds until the next line, or None when nothing remains.
        """
        self._control.settle()
        if not self._control.remains:
            self._report = None
            return None
        if self._report is None:
            self._report = self._wait_log()
        self._report.look()
        return self._report.left


class ReadAhead:
    """Messages that came while another one waited for the device, in their order.

    Only updates of the IOTLB go first: what the other message waits for may wait for them, and
    front-ends that wait for an answer on the main socket answer an IOTLB miss meanwhile.
    """

    def __init__(self) -> None:
        self._held: deque[vp.Received] = deque()

    @property
    def full(self) -> bool:
        """Whether no more may be read."""
        return len(self._held) >= AHEAD

    def goes_first(self, received: vp.Received) -> bool:
        """Whether the message is to be served now; otherwise it is kept."""
        message = received.message
        if (
            isinstance(message, vp.IotlbMsg)
            and message.type is vp.IotlbType.UPDATE
            and not any(isinstance(held.message, _BEFORE_UPDATES) for held in self._held)
        ):
            return True
        self._held.append(received)
        return False

    def next(self) -> vp.Received | None:
        """The first message that was kept, or None."""
        return self._held.popleft() if self._held else None

    def close(self) -> None:
        """Close the descriptors of what was kept."""
        while self._held:
            self._held.popleft().close()
