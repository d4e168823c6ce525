# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""Regions that are mapped only while somebody uses them (the Xen grants' way)."""

import gc
import os
from collections.abc import Iterator

import pytest
from guest_memory_support import USER, DemandMapper, memfd, region

from guest_memory import (
    GuestMemory,
    Mapper,
    Mapping,
    MappingFailed,
    MmapMapper,
    NotMapped,
    OutOfBounds,
    Region,
    UsageError,
    UserAddress,
    WindowMapper,
    WindowMapping,
    abi,
)

MIB = 1 << 20


@pytest.fixture
def mapper() -> Iterator[DemandMapper]:
    mapper = DemandMapper()
    yield mapper
    gc.collect()
    assert mapper.pins == 0


def test_protocols_fit() -> None:
    demand: Mapper = DemandMapper()
    mapping: Mapping = demand.map(region(0, 1), None)
    assert mapping.host_address is None
    assert isinstance(MmapMapper(), WindowMapper)
    assert not isinstance(demand, WindowMapper)
    with memfd(4096) as fd:
        assert isinstance(MmapMapper().map(region(0, 4096), fd), WindowMapping)


def test_copies_pin_for_their_own_time(mapper: DemandMapper) -> None:
    memory = GuestMemory.map([(region(0x1000, 0x3000), None)], mapper)
    assert memory.host_addresses == (None,)
    assert memory.window is None
    assert not memory.bounded
    assert memory.write(0x1FFE, b"pinned") == 6
    assert memory.read(0x1FFE, 6) == b"pinned"
    memory.store(0x2008, 2, 0xABCD)
    assert memory.load(0x2008, 2) == 0xABCD
    assert mapper.pins == 0
    assert (0x1FFE, 6, 2) in mapper.history
    assert (0x1FFE, 6, 1) in mapper.history
    with memfd(16) as fd:
        os.pwrite(fd, b"from a file", 0)
        assert memory.copy_from_fd(0x3000, fd, 16, 0) == 16
        assert memory.copy_to_fd(0x3000, fd, 4, 8) == 4
        assert os.pread(fd, 16, 0) == b"from a ffrom\0\0\0\0"
    assert mapper.pins == 0


def test_large_copies_pin_a_little_at_a_time(mapper: DemandMapper) -> None:
    memory = GuestMemory.map([(region(0x1000, 4 * MIB), None)], mapper)
    data = os.urandom(3 * MIB + 5)
    memory.write(0x1234, data)
    assert memory.read(0x1234, len(data)) == data
    assert max(length for _, length, _ in mapper.history) <= MIB
    assert mapper.pins == 0


def test_a_range_over_both_kinds(mapper: DemandMapper) -> None:
    with memfd(0x1000) as fd:
        memory = GuestMemory.map([(region(0, 0x1000), fd)]).add(
            region(0x1000, 0x1000), None, mapper
        )
    memory.write(0xFFC, b"in twain")
    assert memory.read(0xFFC, 8) == b"in twain"
    first, second = memory.segments(0xFFC, 8)
    assert first.host
    assert (second.host, second.guest, second.length) == (0, 0x1000, 4)
    rows = (abi.GmRegion * 2).from_address(memory.table.regions)
    assert [row.flags for row in rows] == [abi.REGION_UNGUARDED, abi.REGION_ON_DEMAND]
    assert rows[1].host_address == 0
    for call in (memory.pieces, memory.translate):
        with pytest.raises(NotMapped) as caught:
            call(0x1004, 8)
        assert (caught.value.address, caught.value.length, caught.value.access) == (0x1004, 8, 3)
    with pytest.raises(NotMapped):
        memory.translate_user(UserAddress(USER + 0x1004), 8)


def test_a_view_keeps_its_pin(mapper: DemandMapper) -> None:
    memory = GuestMemory.map([(region(0, 0x2000), None)], mapper)
    view = memory.view(0x10, 4)
    assert mapper.pins == 1
    view[:] = b"seen"
    del memory
    assert mapper.closed == 0
    assert bytes(view) == b"seen"
    del view
    assert (mapper.pins, mapper.closed) == (0, 1)


def test_engines_get_a_snapshot_with_what_they_need(mapper: DemandMapper) -> None:
    memory = GuestMemory.map([(region(0x10000, 0x8000), None)], mapper)
    pinned = memory.with_pins(
        [
            (memory.regions[0].guest_address + 0x1010, 8, 1),
            (memory.regions[0].guest_address + 0x1FFF, 2, 2),
            (memory.regions[0].guest_address + 0x5000, 0x1000, 3),
        ]
    )
    assert mapper.history == [(0x11000, 0x2000, 3), (0x15000, 0x1000, 3)]
    assert pinned.regions == memory.regions
    assert len(pinned) == 1
    rows = (abi.GmRegion * pinned.table.region_count).from_address(pinned.table.regions)
    assert [(row.guest_address, row.size, bool(row.host_address)) for row in rows] == [
        (0x10000, 0x1000, False),
        (0x11000, 0x2000, True),
        (0x13000, 0x2000, False),
        (0x15000, 0x1000, True),
        (0x16000, 0x2000, False),
    ]
    assert [row.user_address - row.guest_address for row in rows] == [USER] * 5
    pinned.write(0x10FFE, b"across the edge")
    assert memory.read(0x10FFE, 15) == b"across the edge"
    assert pinned.translate(0x11000, 0x2000)
    assert pinned.translate_user(UserAddress(USER + 0x15000), 0x1000)
    with pytest.raises(NotMapped):
        pinned.pieces(0x12FFF, 2)
    view = pinned.view(0x15000, 4)
    with memfd(0x1000) as fd:
        bigger = pinned.add(region(0, 0x1000), fd, MmapMapper())
    assert len(bigger) == 2
    with pytest.raises(NotMapped):
        bigger.translate(0x11000, 1)  # pins are the snapshot's own
    assert mapper.pins == 2
    again = pinned.with_pins([(0x10000, 1, 1), (0x11000, 0x3000, 3), (0x10000, 0, 1)])
    assert mapper.history[-2:] == [(0x10000, 0x1000, 1), (0x13000, 0x1000, 3)]
    assert mapper.pins == 4, "two kept, two new"
    assert again.translate(0x11000, 0x2000) == pinned.translate(0x11000, 0x2000)
    assert again.translate(0x15000, 1, 2)
    with pytest.raises(NotMapped):
        again.translate(0x10000, 1, 2)  # pinned for reading
    with pytest.raises(NotMapped):
        again.write(0x10FFF, b"x")
    writable = again.with_pins([(0x10010, 4, 2)])
    assert mapper.history[-1] == (0x10000, 0x1000, 3)
    assert writable.translate(0x10000, 1, 2)
    assert writable.with_pins([(0x10010, 4, 2)]).regions == memory.regions
    assert mapper.pins == 5
    del pinned, bigger, again, writable
    assert mapper.pins == 1, "the view's"
    del memory
    assert mapper.closed == 0
    view[0] = 1
    del view
    assert (mapper.pins, mapper.closed) == (0, 1)


def test_pins_that_fail(mapper: DemandMapper) -> None:
    memory = GuestMemory.map([(region(0, 0x8000), None)], mapper)
    start = memory.regions[0].guest_address
    with pytest.raises(OutOfBounds):
        memory.with_pins([(start, 0x8001, 1)])
    with pytest.raises(UsageError):
        memory.with_pins([(start, -1, 1)])
    assert memory.with_pins([]).regions == memory.regions
    mapper.refuse = MappingFailed(22)
    for call in (
        lambda: memory.read(0, 4),
        lambda: memory.write(0, b"four"),
        lambda: memory.load(0, 4),
        lambda: memory.store(0, 4, 4),
        lambda: memory.view(0, 4),
        lambda: memory.copy_to_fd(0, -1, 4),
        lambda: memory.with_pins([(start, 1, 1)]),
    ):
        with pytest.raises(MappingFailed):
            call()
    assert mapper.pins == 0


def test_a_table_that_fails_closes_what_it_made() -> None:
    mapper = DemandMapper()
    real = mapper.map

    def second_fails(region: Region, fd: int | None) -> Mapping:
        if mapper.count:
            raise MappingFailed(22)
        return real(region, fd)

    mapper.map = second_fails  # type: ignore[method-assign]
    with pytest.raises(MappingFailed):
        GuestMemory.map([(region(0, 0x1000), None), (region(0x1000, 0x1000), None)], mapper)
    assert mapper.closed == 1


def test_everything_up_to_the_top_of_the_address_space(mapper: DemandMapper) -> None:
    """Grant regions begin at 2**63 and may be as large as what lies above."""
    top = 1 << 64
    memory = GuestMemory.map([(region(top - 0x4000, 0x4000, user=0), None)], mapper)
    memory.write(top - 5, b"final")
    assert memory.read(top - 5, 5) == b"final"
    pinned = memory.with_pins([(memory.regions[0].guest_address, 0x4000, 3)])
    assert pinned.translate(top - 1, 1)
    with pytest.raises(OutOfBounds):
        pinned.read(top - 5, 6)
