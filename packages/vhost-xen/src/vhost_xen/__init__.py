"""Xen mappings for guest-memory: foreign frames and grants, at once and on demand."""

from ._version import __version__
from .calls import LinuxCalls, SystemCalls
from .devices import check_devices
from .errors import (
    ForeignMapError,
    GrantMapError,
    XenAlignmentError,
    XenDomainError,
    XenError,
    XenFileError,
    XenFlagsError,
    XenMapError,
    XenRegionError,
    XenReleaseError,
    XenUnavailable,
    XenUsageError,
)
from .flags import XenFlags, check_region
from .mapper import XenMapper

__all__ = [
    "ForeignMapError",
    "GrantMapError",
    "LinuxCalls",
    "SystemCalls",
    "XenAlignmentError",
    "XenDomainError",
    "XenError",
    "XenFileError",
    "XenFlags",
    "XenFlagsError",
    "XenMapError",
    "XenMapper",
    "XenRegionError",
    "XenReleaseError",
    "XenUnavailable",
    "XenUsageError",
    "__version__",
    "check_devices",
    "check_region",
]
