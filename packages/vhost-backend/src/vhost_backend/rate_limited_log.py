"""Logging of faults that a guest or front-end can cause as often as it likes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time


class RateLimited:
    """Passes the first `burst` messages of each `period` seconds on and counts the rest.

    How many were left out is said when the period ends, or at `flush`. From any thread.
    """

    __slots__ = ("_burst", "_left", "_lock", "_log", "_period", "_suppressed", "_timer", "_until")

    def __init__(self, log: logging.Logger, burst: int = 5, period: float = 30.0) -> None:
        self._log = log
        self._burst = burst
        self._period = period
        self._lock = threading.Lock()
        self._left = burst
        self._until = 0.0
        self._suppressed = 0
        self._timer: threading.Timer | None = None

    def warning(self, message: str, *args: object) -> None:
        """Log at WARNING unless this period's share is used up."""
        self._pass_on(logging.WARNING, message, args, None)

    def error(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Log at ERROR, with a traceback if given one, unless this period's share is used up."""
        self._pass_on(logging.ERROR, message, args, exc_info)

    def flush(self) -> None:
        """Say how many messages were left out, if any; the next ones are passed on again."""
        with self._lock:
            left_out, self._suppressed = self._suppressed, 0
            timer, self._timer = self._timer, None
            self._until = 0.0
        if timer is not None:
            timer.cancel()
        if left_out:
            self._log.warning("%d similar messages were left out", left_out)

    def _pass_on(
        self, level: int, message: str, args: tuple[object, ...], exc_info: BaseException | None
    ) -> None:
        now = time.monotonic()
        if now >= self._until:
            self.flush()
        with self._lock:
            if now >= self._until:
                self._until = now + self._period
                self._left = self._burst
            passes = self._left > 0
            if passes:
                self._left -= 1
            else:
                self._suppressed += 1
                if self._timer is None:
                    self._begin_timer(self._until - now)
        if passes:
            self._log.log(level, message, *args, exc_info=exc_info)

    def _begin_timer(self, seconds: float) -> None:
        timer = self._timer = threading.Timer(seconds, self.flush)
        timer.daemon = True
        # Where there can be no thread, the next message says it.
        with contextlib.suppress(RuntimeError):
            timer.start()
