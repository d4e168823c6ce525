"""Rate-limited logging, for faults that a guest or front-end can cause as often as it likes."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time


class _Alarm:
    """One thread that flushes each limiter at the end of its period; it ends when none is due.

    With a thread for each limiter, a guest with many queues could make as many threads.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._due: dict[RateLimited, float] = {}
        self._running = False

    def set(self, limited: RateLimited, when: float) -> None:
        """Flush `limited` at `when` (time.monotonic).

        If no thread can start, the next message flushes it.
        """
        with self._condition:
            self._due[limited] = when
            if self._running:
                self._condition.notify()
                return
            thread = threading.Thread(target=self._run, name="left-out messages", daemon=True)
            with contextlib.suppress(RuntimeError):  # there can be no more threads
                thread.start()
                self._running = True

    def _run(self) -> None:
        while True:
            with self._condition:
                now = time.monotonic()
                ready = [limited for limited, when in self._due.items() if when <= now]
                for limited in ready:
                    del self._due[limited]
                if not ready:
                    if not self._due:
                        self._running = False
                        return
                    self._condition.wait(min(self._due.values()) - now)
            for limited in ready:
                limited.flush()


_alarm = _Alarm()


def _forked() -> None:
    global _alarm
    _alarm = _Alarm()


os.register_at_fork(after_in_child=_forked)


class RateLimited:
    """Logs the first `burst` messages of each `period` seconds, and counts the rest.

    When the period ends, or at `flush`, it logs how many were left out. Any thread may use it.
    """

    __slots__ = ("_burst", "_left", "_lock", "_log", "_period", "_suppressed", "_until")

    def __init__(self, log: logging.Logger, burst: int = 5, period: float = 30.0) -> None:
        self._log = log
        self._burst = burst
        self._period = period
        self._lock = threading.Lock()
        self._left = burst
        self._until = 0.0
        self._suppressed = 0

    def warning(self, message: str, *args: object) -> None:
        """Log at WARNING unless this period's share is used up."""
        self._pass_on(logging.WARNING, message, args, None)

    def error(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Log at ERROR, with a traceback if given one, unless this period's share is used up."""
        self._pass_on(logging.ERROR, message, args, exc_info)

    def flush(self) -> None:
        """Log how many messages were left out, if any; the next messages are logged again."""
        with self._lock:
            left_out, self._suppressed = self._suppressed, 0
            self._until = 0.0
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
            first, until = self._suppressed == 1, self._until
        if passes:
            self._log.log(level, message, *args, exc_info=exc_info)
        elif first:
            _alarm.set(self, until)
