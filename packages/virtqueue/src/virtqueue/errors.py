"""The errors of this package, by whose fault they are."""

from __future__ import annotations

import errno as error_numbers
import os
from typing import Final

from .layout import Reason

_URING_REASONS: Final = {
    error_numbers.ENOSYS: " (needs Linux 5.6)",
    error_numbers.EPERM: " (sysctl kernel.io_uring_disabled, or a seccomp filter)",
    error_numbers.ENOMEM: " (RLIMIT_MEMLOCK)",
}


class VirtqueueError(Exception):
    """Base of every error that this package raises."""


class QueueBroken(VirtqueueError):
    """The other side of the ring broke its rules; the queue takes nothing more.

    ``reason`` says which rule, ``detail`` is the wrong value (an index, an address or a length;
    0 when there is none).  ``notify`` is true when the same call published completions that the
    driver wants to be signalled for.
    """

    def __init__(self, reason: Reason, detail: int = 0, notify: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail: int = detail
        self.notify: bool = notify

    def __str__(self) -> str:
        return f"queue broken: {self.reason.name.lower().replace('_', ' ')} ({self.detail:#x})"


class Need(VirtqueueError):
    """A take cannot go on before guest memory is provided; the ring has not advanced.

    ``address`` is a guest physical address (an IOVA when the ring works behind an IOMMU),
    ``length`` is in bytes, ``access`` is 1 for read, 2 for write, 3 for both.  Provide it (an
    IOTLB entry: `DeviceQueue.set_memory` with the new snapshot; a page that is mapped on demand:
    `DeviceQueue.provide`) and take again.  ``notify`` is true when the same call published
    completions that the driver wants to be signalled for.
    """

    def __init__(self, address: int, length: int, access: int, notify: bool = False) -> None:
        super().__init__(address, length, access)
        self.notify: bool = notify
        self.address: int = address
        self.length: int = length
        self.access: int = access

    def __str__(self) -> str:
        return f"need {self.length} bytes at {self.address:#x} (access {self.access})"


class EngineUnavailable(VirtqueueError):
    """The engine that was asked for cannot be loaded; the message says why."""


class UringUnavailable(VirtqueueError):
    """The kernel gives no io_uring.

    ``errno`` is its answer: ENOSYS (it has none, or an older one than 5.6), EPERM (the sysctl
    ``kernel.io_uring_disabled`` or a seccomp filter, which may answer otherwise, too), ENOMEM
    (RLIMIT_MEMLOCK, before 5.12), EMFILE or ENFILE.
    """

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno: int = errno

    def __str__(self) -> str:
        return f"no io_uring: {os.strerror(self.errno)}{_URING_REASONS.get(self.errno, '')}"


class UsageError(VirtqueueError):
    """The caller broke the rules of this package: a bug on our side of the ring."""


class ChainCompleted(UsageError):
    """A chain was used after its completion, or a batch after the next take."""
