"""Logging of faults that a guest or front-end can cause as often as it likes."""

from __future__ import annotations

import logging
import time


class RateLimited:
    """Passes the first `burst` messages of each `period` seconds on and counts the rest."""

    __slots__ = ("_burst", "_left", "_log", "_period", "_suppressed", "_until")

    def __init__(self, log: logging.Logger, burst: int = 5, period: float = 30.0) -> None:
        self._log = log
        self._burst = burst
        self._period = period
        self._left = burst
        self._until = 0.0
        self._suppressed = 0

    def warning(self, message: str, *args: object) -> None:
        """Log at WARNING unless this period's share is used up."""
        self._pass_on(logging.WARNING, message, args, None)

    def error(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Log at ERROR, with a traceback if given one, unless this period's share is used up."""
        self._pass_on(logging.ERROR, message, args, exc_info)

    def _pass_on(
        self, level: int, message: str, args: tuple[object, ...], exc_info: BaseException | None
    ) -> None:
        now = time.monotonic()
        if now >= self._until:
            if self._suppressed:
                self._log.log(level, "%d similar messages were left out", self._suppressed)
            self._until = now + self._period
            self._left = self._burst
            self._suppressed = 0
        if self._left:
            self._left -= 1
            self._log.log(level, message, *args, exc_info=exc_info)
        else:
            self._suppressed += 1
