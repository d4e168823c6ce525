"""The C structures are exactly what the engines' header says, and hold what the snapshot says."""

import ctypes
import inspect
from typing import Any

import pytest
from guest_memory_support import SEALED, memfd, region

from guest_memory import GuestMemory, Iotlb, Iova, MmapMapper, UserAddress, abi

LAYOUTS: dict[type[ctypes.Structure], tuple[int, dict[str, tuple[int, int]]]] = {
    abi.GmRegion: (
        64,
        {
            "guest_address": (0, 8),
            "size": (8, 8),
            "user_address": (16, 8),
            "host_address": (24, 8),
            "poison": (32, 8),
            "page_size": (40, 4),
            "flags": (44, 4),
            "reserved": (48, 16),
        },
    ),
    abi.GmIotlbEntry: (
        32,
        {
            "iova": (0, 8),
            "size": (8, 8),
            "user_address": (16, 8),
            "access": (24, 4),
            "reserved": (28, 4),
        },
    ),
    abi.GmTable: (
        80,
        {
            "magic": (0, 4),
            "abi": (4, 4),
            "size": (8, 4),
            "region_count": (12, 4),
            "regions": (16, 8),
            "by_user": (24, 8),
            "iotlb": (32, 8),
            "iotlb_count": (40, 4),
            "flags": (44, 4),
            "window_base": (48, 8),
            "window_size": (56, 8),
            "pins": (64, 8),
            "reserved": (72, 8),
        },
    ),
    abi.GmLog: (
        48,
        {
            "magic": (0, 4),
            "abi": (4, 4),
            "size": (8, 4),
            "page_shift": (12, 4),
            "bitmap": (16, 8),
            "bitmap_size": (24, 8),
            "enabled": (32, 4),
            "reserved": (36, 4),
            "poison": (40, 8),
        },
    ),
}


@pytest.mark.parametrize("structure", LAYOUTS, ids=lambda s: s.__name__)
def test_layout(structure: Any) -> None:
    size, fields = LAYOUTS[structure]
    assert ctypes.sizeof(structure) == size
    assert [name for name, _ in structure._fields_] == list(fields)
    for name, (offset, width) in fields.items():
        field = getattr(structure, name)
        assert (field.offset, field.size) == (offset, width), name


@pytest.mark.parametrize("structure", LAYOUTS, ids=lambda s: s.__name__)
def test_annotations_are_the_fields(structure: Any) -> None:
    annotations = dict(inspect.get_annotations(structure))
    assert annotations.pop("_fields_")
    assert list(annotations) == [name for name, _ in structure._fields_]


def test_records_have_the_size_of_the_structures() -> None:
    assert abi.REGION_RECORD.size == ctypes.sizeof(abi.GmRegion)
    assert abi.IOTLB_RECORD.size == ctypes.sizeof(abi.GmIotlbEntry)


def test_the_table_says_what_the_snapshot_says() -> None:
    with memfd(0x8000, SEALED) as fd:
        memory = GuestMemory.map(
            [
                (region(0x4000, 0x1000, 0x1800, user=0x10000), fd),
                (region(0x1000, 0x2000, 0x4000, user=0x90000), fd),
            ]
        )
    table = memory.table
    assert ctypes.addressof(table) == memory.table_address
    assert (table.magic, table.abi, table.size) == (0x4D454D47, 1, 80)
    assert bytes(table)[:4] == b"GMEM"
    assert (table.region_count, table.flags, table.iotlb, table.iotlb_count) == (2, 0, 0, 0)
    rows = (abi.GmRegion * 2).from_address(table.regions)
    assert [row.guest_address for row in rows] == [0x1000, 0x4000]
    assert [row.size for row in rows] == [0x2000, 0x1000]
    assert [row.user_address for row in rows] == [0x90000, 0x10000]
    assert tuple(row.host_address for row in rows) == memory.host_addresses
    assert [row.flags for row in rows] == [0, 0]
    assert [row.page_size for row in rows] == [4096, 4096]
    assert list((ctypes.c_uint32 * 2).from_address(table.by_user)) == [1, 0]
    assert memory.window is not None
    assert (table.window_base, table.window_size) == (memory.window_base, len(memory.window))
    poison = ctypes.c_uint32.from_address(rows[1].poison)
    for value in (0, 1):
        poison.value = value
        assert memory.poisoned is bool(value)
    assert memory.remove(region(0x1000, 0x2000, user=0x90000)).poisoned
    assert not memory.remove(region(0x4000, 0x1000, user=0x10000)).poisoned
    table.pins = 3
    assert memory.pins == 3


@pytest.mark.parametrize(
    ("seals", "mapper", "flags"),
    [
        (SEALED, MmapMapper(), 0),
        (SEALED, MmapMapper(read_only=True), abi.REGION_READ_ONLY),
        (0, MmapMapper(), abi.REGION_UNGUARDED),
        (0, MmapMapper(guarded=True), 0),
        (0, MmapMapper(read_only=True), abi.REGION_READ_ONLY | abi.REGION_UNGUARDED),
    ],
)
def test_flags_of_a_region(seals: int, mapper: MmapMapper, flags: int) -> None:
    with memfd(0x1000, seals) as fd:
        memory = GuestMemory.map([(region(0, 0x1000), fd)], mapper)
    assert abi.GmRegion.from_address(memory.table.regions).flags == flags


def test_iotlb_records() -> None:
    iotlb = Iotlb()
    iotlb.insert(Iova(0x2000), 0x1000, UserAddress(0x7000), 2)
    iotlb.insert(Iova(0x1000), 0x1000, UserAddress(0x9000), 3)
    memory = GuestMemory().with_iotlb(iotlb)
    table = memory.table
    assert memory.iommu
    assert (table.flags, table.iotlb_count) == (abi.TABLE_IOMMU, 2)
    rows = (abi.GmIotlbEntry * 2).from_address(table.iotlb)
    assert [(r.iova, r.size, r.user_address, r.access) for r in rows] == [
        (0x1000, 0x1000, 0x9000, 3),
        (0x2000, 0x1000, 0x7000, 2),
    ]
    assert memory.with_iotlb(None).table.flags == 0


def test_an_empty_snapshot() -> None:
    memory = GuestMemory()
    assert memory.window is None
    assert (memory.window_base, memory.pins, memory.poisoned) == (0, 0, False)
    assert (memory.table.region_count, memory.table.window_size) == (0, 0)
    assert (memory.regions, memory.host_addresses, memory.ranges) == ((), (), ())
