"""The rules of the XEN_MMAP fields of a memory region (vhost-user: "Memory region description")."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from guest_memory import Region

from .abi import DOMID_FIRST_RESERVED, GRANT_ADDRESS_BIT, XEN_PAGE_SIZE
from .errors import XenAlignmentError, XenDomainError, XenFlagsError, XenRegionError

_NO_ADVANCE_MAP_SPECIFICATION: Final = 1 << 8
_REFERENCES: Final = 1 << 32
# A dom0's kernel puts frame numbers into page table entries and drops the upper bits: frame 2**40
# would be mapped as frame 0, without an error.
_FRAMES: Final = 1 << 40


class XenFlags(IntFlag):
    """How to map a region: the field "xen mmap flags".

    No bit set means a plain file mapping. In the specification NO_ADVANCE_MAP is bit 8 (0x100);
    rust-vmm, and front-ends written against it, send the value 8. Both are accepted and mean the
    same.
    """

    FOREIGN = 1
    """Frames of another domain, by privcmd."""
    GRANT = 2
    """Grant references, by gntdev."""
    NO_ADVANCE_MAP = 8
    """Not mapped as a whole: only the pages of a request, while the request lasts."""


_VALID: Final = frozenset((0, 1, 2, 2 | 8))


def check_region(region: Region) -> XenFlags:
    """Return a region's flags, if the region keeps the rules of Xen mappings.

    - FOREIGN and GRANT exclude each other; NO_ADVANCE_MAP goes with GRANT only.
    - A Xen region names a domain that a guest can have, and begins at a page. Its size need not
      be a multiple of the page size.
    - Bit 63 of a GRANT region's address is a mark; the other bits are the reference times the page
      size. A reference has 32 bits. A FOREIGN region's address has no mark; a frame number has 40
      bits.

    These rules do not concern a region without flags.

    Raises:
        guest_memory.InvalidRegion: the region is empty, or runs beyond 64 bits.
        XenFlagsError, XenDomainError, XenAlignmentError, XenRegionError: the region breaks a rule.
    """
    region.check()
    address, size = region.guest_address, region.size
    sent = int(region.flags)  # of any flag type
    value = sent & ~_NO_ADVANCE_MAP_SPECIFICATION
    if value != sent:
        value |= int(XenFlags.NO_ADVANCE_MAP)
    if value not in _VALID:
        raise XenFlagsError(address, size, sent)
    flags = XenFlags(value)
    if not flags:
        return flags
    # The hypervisor's interface has 16 bits, and a longer number would be cut to another domain's.
    # The highest numbers name no single guest (DOMID_SELF, DOMID_XEN, ...).
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
    """The grant reference or frame number of an address."""
    return (address & ~GRANT_ADDRESS_BIT) // XEN_PAGE_SIZE


def page_count(length: int) -> int:
    """The number of pages that `length` bytes from the start of a page touch."""
    return -(-length // XEN_PAGE_SIZE)
