"""The number of file descriptors that serving needs, and the limit that must allow them."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterable
from typing import Final

from ..backend import VhostUserBackend

log: logging.Logger = logging.getLogger("vhost_backend")

#: A ring's kick, call and error descriptor, and a new one that comes before the old one is closed.
_PER_QUEUE: Final = 4
#: A worker's epoll and wake-up, and those of its event loop or its handler in C (io_uring, files).
_PER_WORKER: Final = 8
#: A daemon's listener, connection, channel, log and wake-ups, and the descriptors of the message
#: that it handles. Memory regions keep none.
_PER_DAEMON: Final = 32
#: For the rest of the program.
_SPARE: Final = 64


def needed(backends: Iterable[VhostUserBackend]) -> int:
    """The most descriptors that this process may have open with a daemon for each back-end."""
    count = len(os.listdir("/proc/self/fd")) + _SPARE
    for backend in backends:
        count += _PER_DAEMON + _PER_QUEUE * backend.num_queues()
        count += _PER_WORKER * len(backend.queues_per_thread())
    return count


def raise_limit(backends: Iterable[VhostUserBackend]) -> None:
    """Raise the soft limit to the need of their daemons, or log that this is not allowed.

    Call it before the daemons are made: from then on their workers have descriptors.
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
