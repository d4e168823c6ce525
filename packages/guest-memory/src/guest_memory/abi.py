"""The structures that C engines read: exact layouts, owned by Python.

All fields are in native byte order with natural alignment; addresses are 64-bit. A consumer must
check the magic number, the ABI number and the size before it reads anything else. `ABI_VERSION`
grows when the meaning of a field changes.
"""

import ctypes
import struct
from typing import ClassVar

ABI_VERSION = 1
TABLE_MAGIC = 0x4D454D47  # "GMEM" in memory on little-endian machines
LOG_MAGIC = 0x474F4C47  # "GLOG"

REGION_ON_DEMAND = 1
REGION_READ_ONLY = 2
REGION_UNGUARDED = 4  # may vanish without a handler for the fault: must not be touched directly
TABLE_IOMMU = 1

REGION_RECORD = struct.Struct("=QQQQQII16x")
"""One ``gm_region``: guest address, size, user address, host address, poison, page size, flags."""

IOTLB_RECORD = struct.Struct("=QQQI4x")
"""One ``gm_iotlb_entry``: iova, size, user address, access."""

_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64


class GmRegion(ctypes.Structure):
    """``struct gm_region``: 64 bytes; an array of them is sorted by guest address."""

    guest_address: int
    size: int
    user_address: int
    host_address: int
    poison: int
    page_size: int
    flags: int
    reserved: "ctypes.Array[ctypes.c_uint64]"

    _fields_: ClassVar = [
        ("guest_address", _u64),
        ("size", _u64),
        ("user_address", _u64),
        ("host_address", _u64),
        ("poison", _u64),
        ("page_size", _u32),
        ("flags", _u32),
        ("reserved", _u64 * 2),
    ]


class GmIotlbEntry(ctypes.Structure):
    """``struct gm_iotlb_entry``: 32 bytes; an array of them is sorted by iova, without overlaps."""

    iova: int
    size: int
    user_address: int
    access: int
    reserved: int

    _fields_: ClassVar = [
        ("iova", _u64),
        ("size", _u64),
        ("user_address", _u64),
        ("access", _u32),
        ("reserved", _u32),
    ]


class GmTable(ctypes.Structure):
    """``struct gm_table``: 80 bytes; one for each snapshot. Only ``pins`` ever changes."""

    magic: int
    abi: int
    size: int
    region_count: int
    regions: int
    by_user: int
    iotlb: int
    iotlb_count: int
    flags: int
    window_base: int
    window_size: int
    pins: int
    reserved: int

    _fields_: ClassVar = [
        ("magic", _u32),
        ("abi", _u32),
        ("size", _u32),
        ("region_count", _u32),
        ("regions", _u64),
        ("by_user", _u64),
        ("iotlb", _u64),
        ("iotlb_count", _u32),
        ("flags", _u32),
        ("window_base", _u64),
        ("window_size", _u64),
        ("pins", _u64),
        ("reserved", _u64),
    ]


class GmLog(ctypes.Structure):
    """``struct gm_log``: 48 bytes; one for each connection that logs dirty pages."""

    magic: int
    abi: int
    size: int
    page_shift: int
    bitmap: int
    bitmap_size: int
    enabled: int
    reserved: int
    poison: int

    _fields_: ClassVar = [
        ("magic", _u32),
        ("abi", _u32),
        ("size", _u32),
        ("page_shift", _u32),
        ("bitmap", _u64),
        ("bitmap_size", _u64),
        ("enabled", _u32),
        ("reserved", _u32),
        ("poison", _u64),
    ]
