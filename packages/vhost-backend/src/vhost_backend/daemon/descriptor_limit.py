"""File descriptors: how many serving takes, and the limit that has to allow for them."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterable
from typing import Final

from ..backend import VhostUserBackend

log: logging.Logger = logging.getLogger("vhost_backend")

#: A ring's kick, call and error descriptor, and one that is new before the old one is closed.
_PER_QUEUE: Final = 4
#: A worker's epoll and wake-up, and what its event loop or its handler in C has (io_uring, files).
_PER_WORKER: Final = 8
#: A daemon's listener, connection, channel, log and wake-ups, and a message's descriptors while it
#: is handled. Regions keep none.
_PER_DAEMON: Final = 32
#: For whatever the program does beside.
_SPARE: Final = 64


def needed(backends: Iterable[VhostUserBackend]) -> int:
    """How many descriptors this process may have open at a time with a daemon for each of these."""
    count = len(os.listdir("/proc/self/fd")) + _SPARE
    for backend in backends:
        count += _PER_DAEMON + _PER_QUEUE * backend.num_queues()
        count += _PER_WORKER * len(backend.queues_per_thread())
    return count


def raise_limit(backends: Iterable[VhostUserBackend]) -> None:
    """Raise the soft limit to what their daemons may need, and say so when that is not allowed.

    Before they are made: their workers have descriptors from then on.
    """
    try:
        count = needed(backends)
    except OSError:  # no /proc here
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):
        allowed = soft
    if allowed < count:
        log.warning(
            "up to %d file descriptors may be needed, and %d are allowed (ulimit -n, LimitNOFILE):"
            " front-ends may have to wait",
            count,
            allowed,
        )
