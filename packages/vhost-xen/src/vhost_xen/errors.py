"""The errors of this package, by whose fault they are, with the facts as attributes.

All derive from `XenError`, which is a `guest_memory.GuestMemoryError`: code that handles the errors
of guest memory handles these, too. The error of a wrong region is also an `InvalidRegion`, that of
a refused mapping also a `MappingFailed`.

- The front-end's or the guest's fault: `XenRegionError` and the classes below it, `XenMapError` and
  the classes below it.
- This machine's: `XenUnavailable`.
- A bug in the calling program or in this package: `XenUsageError`, `XenReleaseError`.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Sequence
from typing import Any

from guest_memory import GuestMemoryError, InvalidRegion, MappingFailed, UsageError


class XenError(GuestMemoryError):
    """Base of every error that this package raises on purpose."""


class XenUnavailable(XenError):
    """This machine offers no Xen mappings. The text is one line that says what is missing."""


class XenRegionError(InvalidRegion, XenError):
    """A region that breaks a rule of Xen mappings.

    Attributes:
        address: guest address of the region.
        length: its size in bytes.
        reason: the rule that it breaks, in words.
    """


class XenFlagsError(XenRegionError):
    """Unknown flags, or flags that exclude each other.

    Attributes:
        flags: the 32-bit field as it was sent.
    """

    def __init__(self, address: int, length: int, flags: int) -> None:
        super().__init__(address, length, f"xen mmap flags {flags:#x} are not valid")
        self.args: tuple[Any, ...] = (address, length, flags)
        self.flags = flags


class XenDomainError(XenRegionError):
    """A domain number that no guest can have.

    Attributes:
        domid: the 32-bit field as it was sent.
    """

    def __init__(self, address: int, length: int, domid: int) -> None:
        super().__init__(address, length, f"{domid:#x} is no guest's domain number")
        self.args: tuple[Any, ...] = (address, length, domid)
        self.domid = domid


class XenAlignmentError(XenRegionError):
    """A region that does not begin at a page.

    Attributes:
        page_size: the address must be a multiple of this, in bytes.
    """

    def __init__(self, address: int, length: int, page_size: int) -> None:
        super().__init__(address, length, f"its address is not a multiple of {page_size:#x}")
        self.args: tuple[Any, ...] = (address, length, page_size)
        self.page_size = page_size


class XenFileError(XenRegionError):
    """A region without a file, with an offset into it, or with a file of another kind.

    Attributes:
        device: the device that the file must be, such as ``/dev/xen/gntdev``.
    """

    def __init__(self, address: int, length: int, device: str, reason: str) -> None:
        super().__init__(address, length, reason)
        self.args: tuple[Any, ...] = (address, length, device, reason)
        self.device = device


class XenMapError(MappingFailed, XenError):
    """The kernel or the hypervisor refused to map pages of another domain; none is mapped.

    Attributes:
        errno: the error number, positive.
        call: the step that failed.
        domid: the domain that owns the pages.
        count: the number of pages to map.
    """

    def __init__(self, errno: int | None, call: str, domid: int, count: int) -> None:
        super().__init__(errno or errnos.EIO, call)
        self.args: tuple[Any, ...] = (self.errno, call, domid, count)
        self.domid = domid
        self.count = count


class GrantMapError(XenMapError):
    """Grant references that cannot be mapped: never given, revoked, or given for reading only.

    Attributes (besides those of `XenMapError`):
        reference: the first of `count` consecutive references. The kernel does not say which of
            them was wrong.
        writable: whether the mapping was for writing, too.
    """

    def __init__(
        self, errno: int | None, call: str, domid: int, reference: int, count: int, writable: bool
    ) -> None:
        super().__init__(errno, call, domid, count)
        self.args: tuple[Any, ...] = (self.errno, call, domid, reference, count, writable)
        self.reference = reference
        self.writable = writable

    def __str__(self) -> str:
        last = self.reference + self.count - 1
        kind = "writable" if self.writable else "read-only"
        return (
            f"grants {self.reference}..{last} of domain {self.domid} ({kind}): "
            f"{self.call}: {os.strerror(self.errno)}"
        )


class ForeignMapError(XenMapError):
    """Frames that cannot be mapped: holes, or of a domain that does not exist.

    Attributes (besides those of `XenMapError`):
        frame: the first of `count` consecutive frame numbers.
        failed: the number of frames that failed; 0 when the request failed as a whole.
        failures: the first 64 failed frames, each as (frame number, errno).
    """

    def __init__(
        self,
        errno: int | None,
        call: str,
        domid: int,
        frame: int,
        count: int,
        failed: int = 0,
        failures: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(errno, call, domid, count)
        self.frame = frame
        self.failed = failed
        self.failures: tuple[tuple[int, int], ...] = tuple(failures)
        self.args: tuple[Any, ...] = (
            self.errno,
            call,
            domid,
            frame,
            count,
            failed,
            self.failures,
        )

    def __str__(self) -> str:
        what = f"{self.failed} of {self.count}" if self.failed else f"{self.count}"
        first = self.failures[0][0] if self.failures else self.frame
        return (
            f"{what} frames of domain {self.domid} from {first:#x}: "
            f"{self.call}: {os.strerror(self.errno)}"
        )


class XenUsageError(UsageError, XenError):
    """The calling program broke a rule of this package: a bug in the program, not the peer's."""


class XenReleaseError(XenError):
    """The kernel refused to release a mapping: a bug in this package, or in the kernel.

    Attributes:
        errno: the error number.
        call: the step that failed.
    """

    def __init__(self, errno: int | None, call: str) -> None:
        super().__init__(errno, call)
        self.errno: int = errno or errnos.EIO
        self.call = call

    def __str__(self) -> str:
        return f"{self.call}: {os.strerror(self.errno)}"
