"""Guest memory for vhost-user back-ends."""

from . import abi
from ._version import __version__
from .addresses import Access, BusAddress, GuestAddress, Iova, UserAddress
from .dirty_log import DirtyLog
from .errors import (
    AccessDenied,
    AccessError,
    GuestMemoryError,
    InvalidRegion,
    IotlbMiss,
    MappingFailed,
    Misaligned,
    Missing,
    NoSuchRegion,
    NotContiguous,
    NotMapped,
    OutOfBounds,
    Overlap,
    Poisoned,
    PostcopyError,
    RangeError,
    TooManyRegions,
    Unguarded,
    UsageError,
)
from .iotlb import Iotlb, IotlbEntry
from .linux.atomics import atomic_add, atomic_flip, atomic_or, store_halfword
from .linux.copies import try_copy
from .regions.mapping import Mapper, Mapping, WindowMapper, WindowMapping
from .regions.mmap_mapper import MmapMapper, MmapMapping
from .regions.region import MAX_MEM_SLOTS, Region
from .regions.shared import SharedMapping, allocate_memfd
from .regions.window import Window, WindowFull
from .snapshot.holder import MemoryHolder
from .snapshot.memory import GuestMemory
from .snapshot.translation import Segment
from .userfault import Userfault

__all__ = [
    "MAX_MEM_SLOTS",
    "Access",
    "AccessDenied",
    "AccessError",
    "BusAddress",
    "DirtyLog",
    "GuestAddress",
    "GuestMemory",
    "GuestMemoryError",
    "InvalidRegion",
    "Iotlb",
    "IotlbEntry",
    "IotlbMiss",
    "Iova",
    "Mapper",
    "Mapping",
    "MappingFailed",
    "MemoryHolder",
    "Misaligned",
    "Missing",
    "MmapMapper",
    "MmapMapping",
    "NoSuchRegion",
    "NotContiguous",
    "NotMapped",
    "OutOfBounds",
    "Overlap",
    "Poisoned",
    "PostcopyError",
    "RangeError",
    "Region",
    "Segment",
    "SharedMapping",
    "TooManyRegions",
    "Unguarded",
    "UsageError",
    "UserAddress",
    "Userfault",
    "Window",
    "WindowFull",
    "WindowMapper",
    "WindowMapping",
    "__version__",
    "abi",
    "allocate_memfd",
    "atomic_add",
    "atomic_flip",
    "atomic_or",
    "store_halfword",
    "try_copy",
]
