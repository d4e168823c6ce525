"""The errors of this package, with the facts as attributes.

All derive from `GuestMemoryError`. `UsageError` is a mistake of the calling program. The others are
the fault of a front-end or a guest, or the system refused a call.
"""

import os


class GuestMemoryError(Exception):
    """Base of every error that this package raises on purpose."""


class UsageError(GuestMemoryError, ValueError):
    """The calling program broke a rule of this package: a bug in the program, not the peer's."""


class RangeError(GuestMemoryError):
    """Base of the errors about one range of addresses.

    Attributes:
        address: first byte of the range, in the address space of the call that failed.
        length: length in bytes.
    """

    _words = "bad range"

    def __init__(self, address: int, length: int, *more: object) -> None:
        super().__init__(address, length, *more)
        self.address = address
        self.length = length

    def __str__(self) -> str:
        return f"{self._words}: {self.length:#x} bytes at {self.address:#x}"


class OutOfBounds(RangeError):
    """A part of the range, or all of it, belongs to no region."""

    _words = "outside of guest memory"


class NotContiguous(OutOfBounds):
    """The range lies in guest memory but in more than one piece of the host's address space."""

    _words = "not in one piece"


class Overlap(RangeError):
    """The new region shares addresses, guest-physical or user ones, with one that is there.

    Attributes:
        space: ``"guest"`` or ``"user"``: where they overlap.
    """

    _words = "overlaps another region"

    def __init__(self, address: int, length: int, space: str) -> None:
        super().__init__(address, length, space)
        self.space = space

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.space} addresses)"


class InvalidRegion(RangeError):
    """A region that cannot exist: empty, beyond the address space, or larger than its file.

    Attributes:
        reason: what is wrong with it, in words.
    """

    _words = "invalid region"

    def __init__(self, address: int, length: int, reason: str) -> None:
        super().__init__(address, length, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.reason}"


class NoSuchRegion(RangeError):
    """The region to be removed is not in the table."""

    _words = "no such region"


class Misaligned(RangeError):
    """An atomic access that is not aligned to its size."""

    _words = "misaligned atomic access"


class Poisoned(RangeError):
    """The memory behind the range is gone: the front-end shrank the file that it had shared."""

    _words = "memory taken away by its owner"


class Unguarded(RangeError):
    """A zero-copy view of memory that its owner can take away, without a guard for the fault.

    Views exist for files sealed against shrinking. For other files they exist only when the mapper
    was told that a SIGBUS guard is installed (``MmapMapper(guarded=True)``). Copies always work.
    """

    _words = "zero-copy access to memory that may vanish"


class AccessError(RangeError):
    """Base of the errors about a range and a kind of access.

    Attributes:
        access: 1 read, 2 write, 3 both.
    """

    def __init__(self, address: int, length: int, access: int) -> None:
        super().__init__(address, length, int(access))
        self.access: int = int(access)

    def __str__(self) -> str:
        kind = {1: "read", 2: "write"}.get(self.access, "read and write")
        return f"{super().__str__()} ({kind})"


class AccessDenied(AccessError):
    """An IOTLB entry or a read-only mapping does not allow this access."""

    _words = "access denied"


class Missing(AccessError):
    """Base of the errors after which the caller can provide something and try again.

    It provides an IOTLB entry, or pins pages that are mapped on demand.
    """

    _words = "not there yet"


class IotlbMiss(Missing):
    """The IOTLB has no entry for a part of the range; the address is an IOVA."""

    _words = "IOTLB miss"


class NotMapped(Missing):
    """The region is mapped on demand, and this (guest-physical) range is not pinned."""

    _words = "mapped on demand only"


class TooManyRegions(GuestMemoryError):
    """More regions than a table may hold.

    Attributes:
        count: how many there would have been.
        limit: how many there may be.
    """

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(count, limit)
        self.count = count
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.count} regions, {self.limit} are allowed"


class MappingFailed(GuestMemoryError):
    """The system refused to map memory.

    Attributes:
        errno: the system's error number.
        call: the system call that failed.
    """

    def __init__(self, errno: int, call: str = "mmap") -> None:
        super().__init__(errno, call)
        self.errno = errno
        self.call = call

    def __str__(self) -> str:
        return f"{self.call}: {os.strerror(self.errno)}"


class PostcopyError(GuestMemoryError):
    """The system refused a step of user-space fault handling.

    Attributes:
        errno: the system's error number, or 0 when the kernel lacks the feature.
        call: the system call or ioctl that failed.
    """

    def __init__(self, errno: int, call: str) -> None:
        super().__init__(errno, call)
        self.errno = errno
        self.call = call

    def __str__(self) -> str:
        return f"{self.call}: {os.strerror(self.errno) if self.errno else 'not supported'}"
