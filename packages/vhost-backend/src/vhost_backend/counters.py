"""Counters of one queue: plain integers that only the queue's worker adds to."""

from __future__ import annotations


class QueueCounters:
    """What one queue has done since the device was created; reading them needs no lock.

    requests: chains taken; batches: takes that returned at least one chain; bytes: readable
    bytes of requests taken and bytes written by completions, of rings that were stopped (`report`
    adds those of the present ones); notifications_sent / _suppressed: call
    signals given, or not wanted by the driver; kicks: wake-ups by the driver; errors: requests
    that a handler failed; guest_errors: times the queue was broken by the guest.
    """

    __slots__ = (
        "batches",
        "bytes",
        "errors",
        "guest_errors",
        "kicks",
        "notifications_sent",
        "notifications_suppressed",
        "requests",
    )

    def __init__(self) -> None:
        self.requests: int = 0
        self.batches: int = 0
        self.bytes: int = 0
        self.kicks: int = 0
        self.notifications_sent: int = 0
        self.notifications_suppressed: int = 0
        self.errors: int = 0
        self.guest_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}
