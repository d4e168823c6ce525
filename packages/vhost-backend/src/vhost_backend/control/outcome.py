"""The outcome of handling a message."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import vhost_protocol as vp

Descriptors = list[vp.OwnedFd]


class Answer(NamedTuple):
    """A reply of the request's own kind.

    The sender only borrows `fds`; with `close` it closes them once they are sent.
    """

    message: vp.Reply
    fds: tuple[int, ...] = ()
    close: bool = False


class Wait(NamedTuple):
    """A message that is not done yet: `finish()` completes it once `ready()` is true.

    The wait has no limit; workers and other connections go on meanwhile. When the front-end hangs
    up, the wait ends and `finish` is not called. The thread that makes `ready` true calls the
    context's `wake`. `rings` are the rings whose requests the message waits for. `what` names the
    wait in the log: a section says "vring 0", and the control plane puts the message's name before
    it.
    """

    ready: Callable[[], bool]
    finish: Callable[[], Answer | None]
    rings: Sequence[int]
    what: str = ""
    #: Seconds between two calls of `ready`, where no thread calls `wake`; None where one does.
    every: float | None = None


Outcome = Answer | Wait | None
"""None means done: the request is acknowledged if it asks for that."""
