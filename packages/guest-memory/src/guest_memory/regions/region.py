"""One region of guest memory, as a front-end describes it."""

from typing import NamedTuple

from ..addresses import ADDRESS_SPACE, GuestAddress, UserAddress, fits
from ..errors import InvalidRegion

MAX_MEM_SLOTS = 509
"""The most regions of a table (the number of user memory slots that KVM first had)."""


class Region(NamedTuple):
    """A memory region description (vhost-user: "Memory region description").

    Attributes:
        guest_address: guest-physical address of the first byte.
        size: size in bytes; not zero.
        user_address: the front-end's virtual address of the first byte.
        mmap_offset: where the region begins in its file, in bytes.
        flags: Xen mmap flags; 0 without Xen.
        domid: Xen domain; 0 without Xen.
    """

    guest_address: GuestAddress
    size: int
    user_address: UserAddress
    mmap_offset: int = 0
    flags: int = 0
    domid: int = 0

    @property
    def guest_end(self) -> int:
        """First guest-physical address after the region; may be 2**64."""
        return self.guest_address + self.size

    @property
    def user_end(self) -> int:
        """First user address after the region; may be 2**64."""
        return self.user_address + self.size

    def check(self) -> None:
        """Raise `InvalidRegion` unless every address of the region is a 64-bit address."""
        address, size = self.guest_address, self.size
        if not 0 < size < ADDRESS_SPACE:
            raise InvalidRegion(address, size, "its size is not in 1 .. 2**64-1")
        if not fits(address, size):
            raise InvalidRegion(address, size, "guest addresses run beyond 64 bits")
        if not fits(self.user_address, size):
            raise InvalidRegion(address, size, "user addresses run beyond 64 bits")
        if not fits(self.mmap_offset, size):
            raise InvalidRegion(address, size, "the offset in the file runs beyond 64 bits")
