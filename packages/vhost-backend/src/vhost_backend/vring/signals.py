"""The descriptors and messages by which a ring and its driver notify each other."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

from vhost_protocol import BackendChannel, BackendVringCall, BackendVringErr, ProtocolError
from virtqueue import QueueBroken, Reason

from ..counters import QueueCounters
from ..fds import eventfd
from ..rate_limited_log import RateLimited

log: logging.Logger = logging.getLogger("vhost_backend")

_NEW_START: Final = (
    "the driver has broken the ring, which is left alone until the driver sets it up anew"
    " (reset the device or restart the guest)"
)
_ADVICE: Final = {
    Reason.RING_MEMORY: "the ring is not in the memory that the front-end shares: guest memory has"
    " to be shared, for QEMU -object memory-backend-memfd,id=mem,size=SIZE,share=on"
    " -machine memory-backend=mem, with SIZE as after -m",
    Reason.TRUNCATED: "the front-end has taken memory away that it had shared: its connection ends",
}


class RingSignals:
    """Kick, call and error descriptor of ring number `index`, or the messages in their place.

    The object owns its descriptors; each is -1 where there is none.
    """

    def __init__(self, index: int, counters: QueueCounters) -> None:
        self._index = index
        self._counters = counters
        self._guest_errors = RateLimited(log)
        self.kick_fd: int = -1
        self.call_fd: int = -1
        self.err_fd: int = -1
        #: Signalled when a page was logged. Borrowed, so `close` does not touch it.
        self.log_fd: int = -1
        #: The channel for notifications by messages, where they were negotiated.
        self.channel: BackendChannel | None = None
        #: Whether the call descriptor is an eventfd, or there is none.
        self.plain_call: bool = True

    def set_kick(self, fd: int) -> None:
        """See `VringState.set_kick`."""
        _close(self.kick_fd)
        self.kick_fd = eventfd.adopt(fd) if fd >= 0 else -1

    def set_call(self, fd: int) -> None:
        """See `VringState.set_call`."""
        _close(self.call_fd)
        self.call_fd = eventfd.adopt(fd) if fd >= 0 else -1
        self.plain_call = fd < 0 or eventfd.is_eventfd(fd)

    def set_err(self, fd: int) -> None:
        """See `VringState.set_err`."""
        _close(self.err_fd)
        self.err_fd = eventfd.adopt(fd) if fd >= 0 else -1

    def close(self) -> None:
        """Close the descriptors and forget the channel."""
        self.set_kick(-1)
        self.set_call(-1)
        self.set_err(-1)
        self.channel = None

    def call(self) -> None:
        """Signal the driver, by the call descriptor or a message."""
        if self.call_fd >= 0:
            self._counters.notifications_sent += 1
            eventfd.signal(self.call_fd)
        elif self.channel is not None:
            self._counters.notifications_sent += 1
            self._send(self.channel, BackendVringCall(self._index))

    def suppressed(self) -> None:
        """Count a signal that the driver did not want."""
        self._counters.notifications_suppressed += 1

    def logged(self) -> None:
        """Tell the front-end that pages were logged. There must be a `log_fd`."""
        eventfd.signal(self.log_fd)

    def error(self) -> None:
        """Signal the error descriptor, or send the message that stands for it."""
        if self.err_fd >= 0:
            eventfd.signal(self.err_fd)
        elif self.channel is not None:
            self._send(self.channel, BackendVringErr(self._index))

    def guest_error(self, name: str, error: QueueBroken) -> None:
        """Log (rate-limited) a driver's fault at device `name`, and signal an error."""
        self._counters.guest_errors += 1
        self._guest_errors.warning(
            "%s: queue %d: %s; %s",
            name or "vring",
            self._index,
            error,
            _ADVICE.get(error.reason, _NEW_START),
        )
        self.error()

    @staticmethod
    def _send(channel: BackendChannel, message: BackendVringCall | BackendVringErr) -> None:
        with contextlib.suppress(ProtocolError, OSError):
            # Without an acknowledgement: no thread may wait for the front-end with the ring's lock.
            channel.request(message, need_reply=False)


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)
