"""Addresses: three spaces that must never be mixed up, and arithmetic that cannot wrap around.

A vhost-user back-end meets three kinds of addresses besides its own pointers: guest-physical ones
(what a driver writes into descriptors), the front-end's virtual ones (how ring addresses travel in
SET_VRING_ADDR) and I/O virtual ones (descriptors and rings when VIRTIO_F_ACCESS_PLATFORM is on).
They are plain integers at run time and different types for a type checker.
"""

from enum import IntEnum
from typing import Final, NewType, TypeAlias

GuestAddress = NewType("GuestAddress", int)
"""A guest-physical address, in bytes from 0."""

UserAddress = NewType("UserAddress", int)
"""A virtual address in the front-end's process ("user address" in the specification)."""

Iova = NewType("Iova", int)
"""An I/O virtual address: what the device sees when an IOMMU sits between it and the memory."""

BusAddress: TypeAlias = GuestAddress | Iova
"""What a driver writes into descriptors: guest-physical, or I/O virtual behind an IOMMU."""

ADDRESS_SPACE = 1 << 64
"""The first number that is no 64-bit address. A range may end here, never go beyond."""


class Access(IntEnum):
    """What an access does to guest memory; the values are those of the IOTLB messages."""

    READ = 1
    WRITE = 2
    READ_WRITE = 3


# The same as plain numbers, for paths where the arithmetic of enumeration members takes too long.
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
