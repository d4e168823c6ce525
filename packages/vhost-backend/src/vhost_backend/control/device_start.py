"""Starting a device that may be busy: the daemon asks it again, and does not block meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ..errors import DeviceBusy, DeviceRefused
from .context import Context
from .outcome import Outcome, Wait

#: Seconds between two attempts.
ASK_AGAIN: Final = 0.02


def once_started(context: Context, go: Callable[[], None]) -> Outcome:
    """Call `go` once the device runs. Raises `DeviceRefused` when it cannot run."""
    try:
        context.device_started()
    except DeviceBusy as busy:
        attempt = _Attempt(context, go, time.monotonic() + busy.patience)
        return Wait(attempt.ready, attempt.finish, (), every=ASK_AGAIN)
    go()
    return None


class _Attempt:
    def __init__(self, context: Context, go: Callable[[], None], end: float) -> None:
        self._context = context
        self._go = go
        self._end = end
        self._refusal: DeviceRefused | None = None

    def ready(self) -> bool:
        """Ask the device again; True when it runs, or has refused for good."""
        try:
            self._context.device_started()
        except DeviceBusy as error:
            if time.monotonic() < self._end:
                return False
            self._refusal = error
        except DeviceRefused as error:
            self._refusal = error
        return True

    def finish(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        self._go()
