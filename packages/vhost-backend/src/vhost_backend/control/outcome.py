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
    connections go on. The thread that makes `ready` true calls the context's `wake`. `rings` are
    those whose requests it waits for. `what` names the message that waits, for the log: the control
    plane puts the message's name in front of what a section says ("vring 0").
    """

    ready: Callable[[], bool]
    finish: Callable[[], Answer | None]
    rings: Sequence[int]
    what: str = ""
    #: Seconds between two looks at what comes true without a `wake`.
    every: float | None = None


Outcome = Answer | Wait | None
"""None: done; acknowledge the request if it asks for that."""
