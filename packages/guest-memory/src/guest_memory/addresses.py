"""Addresses: three spaces that must never be mixed up, and arithmetic that cannot wrap around.

Besides its own pointers a vhost-user back-end has three kinds of addresses: guest-physical ones (a
driver writes them into descriptors), the front-end's virtual ones (SET_VRING_ADDR has them) and I/O
virtual ones (in descriptors and for rings with VIRTIO_F_ACCESS_PLATFORM). They are plain integers
at run time, and different types for a type checker.
"""

from enum import IntEnum
from typing import Final, NewType, TypeAlias

GuestAddress = NewType("GuestAddress", int)
"""A guest-physical address, in bytes from 0."""

UserAddress = NewType("UserAddress", int)
"""A virtual address in the front-end's process ("user address" in the specification)."""

Iova = NewType("Iova", int)
"""An I/O virtual address: the device's address of memory behind an IOMMU."""

BusAddress: TypeAlias = GuestAddress | Iova
"""An address in a descriptor: guest-physical, or I/O virtual behind an IOMMU."""

ADDRESS_SPACE = 1 << 64
"""The first number that is no 64-bit address. A range may end here, and must not go beyond."""


class Access(IntEnum):
    """The kind of an access to guest memory; the values are those of the IOTLB messages."""

    READ = 1
    WRITE = 2
    READ_WRITE = 3


# The same as plain numbers: arithmetic on enumeration members is too slow for some paths.
READ: Final = 1
WRITE: Final = 2


def fits(address: int, length: int) -> bool:
    """Tell whether ``length`` bytes from ``address`` lie in the 64-bit address space."""
    return 0 <= address < ADDRESS_SPACE and 0 <= length <= ADDRESS_SPACE - address


def align_down(value: int, alignment: int) -> int:
    """Round down to a multiple of ``alignment``, a power of two."""
    return value & -alignment


def align_up(value: int, alignment: int) -> int:
    """Round up to a multiple of ``alignment``, a power of two."""
    return -(-value & -alignment)
