"""The errors of a back-end, ordered by whose fault they are.

A fault of the front-end or the guest never shows as a traceback. It becomes a refused message
(`Refused`), a closed connection (the protocol package's `RemoteProtocolError`) or a broken queue
(the virtqueue package's `QueueBroken`). A device's hook refuses a message with `DeviceRefused`. The
caller gets two kinds of errors: a problem of this machine (`ListenError`, `DeviceError`), or a
mistake in the program (`BackendUsageError`).
"""

from __future__ import annotations

import errno
from typing import Final

#: The system's errors when this machine, or this process, has used up a resource.
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

#: The errors of a kernel or file system that lacks a call or its flags, and of a seccomp filter.
REFUSALS: Final = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES))


class VhostBackendError(Exception):
    """Base of every error that this package raises."""


class BackendUsageError(VhostBackendError):
    """The program that uses this package broke one of its rules."""


class ListenError(VhostBackendError):
    """The socket cannot be listened on. `path` is the socket's, `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot listen on {path}: {reason}")
        self.path = path
        self.reason = reason


class DeviceError(VhostBackendError):
    """A device cannot be set up with its arguments (an image that cannot be opened, ...)."""


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
    """Raised by a hook of a device or back-end to refuse the message that it was called for.

    It becomes a `Refused` that names the message. `reason` says why, for the log.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DeviceBusy(DeviceRefused):
    """A device cannot start yet, for a reason that may pass.

    The daemon asks `VirtioDevice.started` again, until `patience` seconds are over. Then it refuses
    the message for `reason`.

    Meanwhile the front-end waits for its answer; other front-ends and an event loop go on.
    """

    def __init__(self, reason: str, patience: float = 3.0) -> None:
        super().__init__(reason)
        self.patience = patience


def is_shortage(error: BaseException) -> bool:
    """Whether `error`, or one of its causes, means that this machine has used up a resource.

    Such resources are descriptors, memory, threads and disk space. Neither the peer nor the device
    is at fault then.
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
        # `threading` raises this when a thread cannot start; it has no class of its own.
        if type(found) is RuntimeError and "start new thread" in str(found):
            return True
        found = found.__cause__
    return False


def kept(error: BaseException) -> BaseException:
    """Prepare `error` to be raised later: its traceback stays, but its frames' objects go.

    Otherwise the error could keep a guest's memory mapped.
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
