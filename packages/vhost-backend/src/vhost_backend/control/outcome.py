"""What handling a message comes to."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import vhost_protocol as vp

Descriptors = list[vp.OwnedFd]


class Answer(NamedTuple):
    """A reply of the request's own kind. `fds` are lent; with `close` they are closed once sent."""

    message: vp.Reply
    fds: tuple[int, ...] = ()
    close: bool = False


class Wait(NamedTuple):
    """Not done yet: once `ready()`, however long that takes, `finish()` completes it.

    The connection waits with an eye on hang-ups, where `finish` is not called; workers and other
    connections go on. The thread that makes `ready` true calls the context's `wake`. `what` names
    the message that waits, and `rings` those whose requests it waits for.
    """

    ready: Callable[[], bool]
    finish: Callable[[], Answer | None]
    what: str
    rings: Sequence[int]


Outcome = Answer | Wait | None
"""None: done; acknowledge the request if it asks for that."""
