"""The rules of the XEN_MMAP fields of a memory region (vhost-user: "Memory region description")."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from guest_memory import Region

from .abi import DOMID_FIRST_RESERVED, GRANT_ADDRESS_BIT, XEN_PAGE_SIZE
from .errors import XenAlignmentError, XenDomainError, XenFlagsError, XenRegionError

_NO_ADVANCE_MAP_SPECIFICATION: Final = 1 << 8
_REFERENCES: Final = 1 << 32
# A dom0's kernel puts frame numbers into page table entries, and cuts off what is too large for
# these: frame 2**40 would be mapped as frame 0, without an error.
_FRAMES: Final = 1 << 40


class XenFlags(IntFlag):
    """How a region is to be mapped: the field "xen mmap flags".

    No bit set means a plain file mapping. The specification writes NO_ADVANCE_MAP as bit 8
    (0x100); rust-vmm and the front-ends written against it send the value 8. Both are accepted
    and read as one.
    """

    FOREIGN = 1
    """Frames of another domain, by privcmd."""
    GRANT = 2
    """Grant references, by gntdev."""
    NO_ADVANCE_MAP = 8
    """Not to be mapped as a whole: only what a request touches, and only while it does."""


_VALID: Final = frozenset((0, 1, 2, 2 | 8))


def check_region(region: Region) -> XenFlags:
    """Return what a region's flags mean, when the region keeps the rules of Xen mappings.

    - FOREIGN and GRANT exclude each other; NO_ADVANCE_MAP goes with GRANT only.
    - A Xen region names a domain that a guest can have, and begins at a page. Its size need not
      be a multiple of the page size.
    - Bit 63 of a GRANT region's address is a mark; the rest is reference times page size. A
      reference has 32 bits. A FOREIGN region's address has no mark; a frame number has 40 bits.

    Nothing is asked of a region with no flags here.

    Raises:
        guest_memory.InvalidRegion: the region is empty, or runs beyond 64 bits.
        XenFlagsError, XenDomainError, XenAlignmentError, XenRegionError: the rule that is broken.
    """
    region.check()
    address, size = region.guest_address, region.size
    sent = int(region.flags)  # whatever flag type it comes as
    value = sent & ~_NO_ADVANCE_MAP_SPECIFICATION
    if value != sent:
        value |= int(XenFlags.NO_ADVANCE_MAP)
    if value not in _VALID:
        raise XenFlagsError(address, size, sent)
    flags = XenFlags(value)
    if not flags:
        return flags
    # The hypervisor's interface holds 16 bits, of which the upper numbers name no single guest
    # (DOMID_SELF, DOMID_XEN, ...); a number cut off would name another domain.
    if not 0 <= region.domid < DOMID_FIRST_RESERVED:
        raise XenDomainError(address, size, region.domid)
    if address % XEN_PAGE_SIZE:
        raise XenAlignmentError(address, size, XEN_PAGE_SIZE)
    if flags & XenFlags.GRANT:
        if first_page(address) + page_count(size) > _REFERENCES:
            raise XenRegionError(address, size, "grant references have 32 bits")
    elif address & GRANT_ADDRESS_BIT:
        raise XenRegionError(address, size, "a foreign mapping's address has the grant mark")
    elif first_page(address) + page_count(size) > _FRAMES:
        raise XenRegionError(address, size, "frame numbers have 40 bits")
    return flags


def first_page(address: int) -> int:
    """The grant reference, or the frame number, that an address lies in."""
    return (address & ~GRANT_ADDRESS_BIT) // XEN_PAGE_SIZE


def page_count(length: int) -> int:
    """How many pages `length` bytes from the begin of a page touch."""
    return -(-length // XEN_PAGE_SIZE)
