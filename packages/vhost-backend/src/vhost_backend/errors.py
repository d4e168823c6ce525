"""What goes wrong in a back-end, by whose fault it is.

The front-end's and the guest's faults never surface as a traceback: they are a refused message
(`Refused`), a closed connection (the protocol package's `RemoteProtocolError`) or a broken queue
(the virtqueue package's `QueueBroken`). A device's hook refuses what it is asked with
`DeviceRefused`. What is raised to the caller is either a fact of this machine (`ListenError`,
`DeviceError`) or a mistake in the program (`BackendUsageError`).
"""

from __future__ import annotations

import errno
from typing import Final

#: What the system answers when this machine, or this process, has no more of something.
_SHORTAGES: Final = frozenset(
    (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EDQUOT,
    )
)

#: What a kernel or a file system without a call or its flags answers, and a seccomp filter.
REFUSALS: Final = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES))


class VhostBackendError(Exception):
    """Base of every error that this package raises."""


class BackendUsageError(VhostBackendError):
    """The program that uses this package broke one of its rules."""


class ListenError(VhostBackendError):
    """The socket cannot be listened on. `path` is the socket's, `reason` a sentence."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot listen on {path}: {reason}")
        self.path = path
        self.reason = reason


class DeviceError(VhostBackendError):
    """A device cannot be set up from what it was given (an image that cannot be opened, ...)."""


class Refused(VhostBackendError):
    """A message is well-formed but not acceptable in the present state.

    The connection answers it with a failure where the protocol has a way to say so, and is closed
    where it has none. `request` names the message, `reason` says which rule it breaks.
    """

    def __init__(self, request: str, reason: str) -> None:
        super().__init__(f"{request} refused: {reason}")
        self.request = request
        self.reason = reason


class DeviceRefused(VhostBackendError):
    """A device, or a back-end, cannot do now what a hook of it is asked for.

    Raised by a hook, it refuses the message that the hook was called for, which is named then:
    see `Refused`. `reason` says why, for the log.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DeviceBusy(DeviceRefused):
    """A device cannot start yet, because of something that may pass.

    The daemon asks `VirtioDevice.started` again, until `patience` seconds are over. Then it refuses
    the message for `reason`.

    Meanwhile the front-end waits for its answer; other front-ends and an event loop go on.
    """

    def __init__(self, reason: str, patience: float = 3.0) -> None:
        super().__init__(reason)
        self.patience = patience


def is_shortage(error: BaseException) -> bool:
    """Whether we ran out of something (descriptors, memory, threads, room), or what is under
    `error` did: then neither peer nor device has done anything wrong.
    """
    from vhost_protocol import OutOfResources  # the command line's --help needs no protocol

    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:  # what is raised from itself is its cause
        seen.add(id(found))
        if isinstance(found, MemoryError | OutOfResources):
            return True
        if getattr(found, "errno", None) in _SHORTAGES:
            return True
        # What `threading` raises; it has no class of its own.
        if type(found) is RuntimeError and "start new thread" in str(found):
            return True
        found = found.__cause__
    return False


def kept(error: BaseException) -> BaseException:
    """`error`, to be raised later: its traceback stays, but what its frames referred to goes.

    That could be a guest's memory, for as long as the error is kept.
    """
    from traceback import clear_frames

    links: list[BaseException | None] = [error]
    seen: set[int] = set()
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        clear_frames(link.__traceback__)
        links += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            links += link.exceptions
    return error
