"""What a memory region must tell to be put into a message."""

from __future__ import annotations

from typing import Protocol

from ..messages.constants import XenMapFlags
from ..messages.values import MemoryRegion


class RegionLike(Protocol):
    """What a memory region must tell; ``MemoryRegion`` and ``guest_memory.Region`` do."""

    @property
    def guest_address(self) -> int:
        """Guest-physical address."""
        ...

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...

    @property
    def user_address(self) -> int:
        """The front-end's virtual address."""
        ...

    @property
    def mmap_offset(self) -> int:
        """Offset in the descriptor, in bytes."""
        ...

    @property
    def flags(self) -> int:
        """Xen mapping flags."""
        ...

    @property
    def domid(self) -> int:
        """Xen domain."""
        ...


def as_region(region: RegionLike) -> MemoryRegion:
    """Return ``region`` as a message value."""
    if isinstance(region, MemoryRegion):
        return region
    return MemoryRegion(
        region.guest_address,
        region.size,
        region.user_address,
        region.mmap_offset,
        XenMapFlags(region.flags),
        region.domid,
    )
