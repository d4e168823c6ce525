"""Waiting for a device to end its requests: the log lines, and the messages that go first.

A ring is stopped only when the device cannot touch guest memory or its medium any more, however
long that takes. Both kinds of daemon use these classes, and do the I/O themselves.
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

#: The most messages that are read while another one waits; further ones stay in the socket.
AHEAD: Final = 64
#: The most seconds between two log lines about one wait.
LONGEST_SILENCE: Final = 300.0

#: Messages that decide whether an IOTLB entry is valid: no update goes before one of these.
_BEFORE_UPDATES = (vp.SetMemTable, vp.AddMemReg, vp.RemMemReg, vp.SetFeatures, vp.IotlbMsg)


class WaitLog:
    """Log lines about one wait: after `patience` seconds, then after as long again, and so on.

    `what` names the message or event that waits. `working` returns the requests that it waits for,
    and is called for each line.
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
        """Log how long the wait took, if lines were logged."""
        if self._said:
            log.warning("%s waited %.0f s", self._what, time.monotonic() - self._start)


class Remains:
    """The requests that the device still works on for a front-end that has gone.

    `wait_log` makes the log of the wait for them.
    """

    def __init__(self, control: ControlPlane, wait_log: Callable[[], WaitLog]) -> None:
        self._control = control
        self._wait_log = wait_log
        self._report: WaitLog | None = None

    def look(self) -> float | None:
        """Start rings that waited for requests which have ended, and log if it is time.

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

    Only IOTLB updates go first. The requests that the other message waits for may themselves wait
    for such an update, and a front-end that waits for an answer still answers IOTLB misses.
    """

    def __init__(self) -> None:
        self._held: deque[vp.Received] = deque()

    @property
    def full(self) -> bool:
        """Whether reading must stop until a message is taken out."""
        return len(self._held) >= AHEAD

    def goes_first(self, received: vp.Received) -> bool:
        """Whether the message must be served now; otherwise it is kept here."""
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
        """The oldest message that was kept, or None."""
        return self._held.popleft() if self._held else None

    def close(self) -> None:
        """Close the descriptors of the messages that were kept."""
        while self._held:
            self._held.popleft().close()
