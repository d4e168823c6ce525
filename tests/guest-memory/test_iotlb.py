# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""The IOTLB's own rules: bounds, replacement, what a miss calls."""

import os

import pytest

from guest_memory import GuestMemory, Iotlb, IotlbEntry, IotlbMiss, Iova, OutOfBounds, UserAddress

TOP = 1 << 64


def insert(iotlb: Iotlb, iova: int, size: int, user: int, access: int = 3) -> None:
    iotlb.insert(Iova(iova), size, UserAddress(user), access)


def test_the_oldest_makes_room() -> None:
    iotlb = Iotlb(limit=3)
    for n in (5, 1, 9, 4):
        insert(iotlb, n * 0x1000, 0x1000, n << 20)
    assert [entry.iova for entry in iotlb.entries] == [0x1000, 0x4000, 0x9000]
    insert(iotlb, 0x1000, 0x1000, 0)  # replaced, and young again
    insert(iotlb, 0x2000, 0x1000, 0)
    assert [entry.iova for entry in iotlb.entries] == [0x1000, 0x2000, 0x4000]


def test_holes_cannot_push_it_over_its_limit() -> None:
    iotlb = Iotlb(limit=2)
    insert(iotlb, 0, 0x3000, 0)
    insert(iotlb, 0x8000, 0x1000, 0)
    iotlb.invalidate(Iova(0x1000), 0x1000)
    assert len(iotlb) == 2
    assert len(iotlb.entries) == 2


def test_a_cut_entry_keeps_its_translation() -> None:
    iotlb = Iotlb()
    insert(iotlb, 0x1000, 0x5000, 0x100000, 1)
    insert(iotlb, 0x2800, 0x1000, 0x900000, 2)
    assert iotlb.entries == (
        IotlbEntry(Iova(0x1000), 0x1800, UserAddress(0x100000), 1),
        IotlbEntry(Iova(0x2800), 0x1000, UserAddress(0x900000), 2),
        IotlbEntry(Iova(0x3800), 0x2800, UserAddress(0x102800), 1),
    )


def test_invalidating_everything() -> None:
    iotlb = Iotlb()
    insert(iotlb, 0, 1, 0)
    insert(iotlb, TOP - 1, 1, 0)
    iotlb.invalidate(Iova(0), 0)
    assert len(iotlb) == 2
    iotlb.invalidate(Iova(0), TOP - 1)
    assert len(iotlb) == 1
    iotlb.invalidate(Iova(1), TOP - 1)
    assert len(iotlb) == 0
    insert(iotlb, 0, TOP - 1, 0)
    assert iotlb.lookup(Iova(5), 10, 3) == [(5, 10)]
    iotlb.clear()
    assert iotlb.entries == ()
    with pytest.raises(OutOfBounds):
        iotlb.invalidate(Iova(-1), 4)


def test_lookup_of_nothing_is_nothing() -> None:
    assert Iotlb().lookup(Iova(0x1000), 0, 1) == []


def test_a_miss_is_reported_and_looked_up_again() -> None:
    calls: list[tuple[int, int, int]] = []

    def provide(iova: Iova, length: int, access: int) -> bool:
        calls.append((iova, length, access))
        if iova >= 0x3000:
            return False
        insert(iotlb, iova & -0x1000, 0x1000, 0x700000 + (iova & -0x1000))
        return True

    iotlb = Iotlb(on_miss=provide)
    assert iotlb.lookup(Iova(0x1800), 0x1000, 1) == [(0x701800, 0x1000)]
    assert calls == [(0x1800, 0x1000, 1), (0x2000, 0x800, 1)]
    with pytest.raises(IotlbMiss):
        iotlb.lookup(Iova(0x2FFF), 2, 1)


def test_a_miss_that_nobody_answers_ends() -> None:
    calls: list[int] = []

    def promise(iova: Iova, length: int, access: int) -> bool:
        calls.append(iova)
        return True

    with pytest.raises(IotlbMiss):
        Iotlb(on_miss=promise).lookup(Iova(0x1000), 4, 1)
    assert calls == [0x1000]


def test_snapshots_do_not_change() -> None:
    memory, fd = GuestMemory.allocate(0x3000)
    os.close(fd)
    user = memory.regions[0].user_address
    iotlb = Iotlb()
    insert(iotlb, 0x10000, 0x1000, user + 0x1000)
    early = memory.with_iotlb(iotlb)
    iotlb.invalidate(Iova(0x10000), 0x1000)
    insert(iotlb, 0x20000, 0x1000, user + 0x1000)
    late = memory.with_iotlb(iotlb)
    memory.write(0x1000, b"same bytes")
    assert early.read(0x10000, 10) == late.read(0x20000, 10) == b"same bytes"
    for snapshot, iova in ((early, 0x20000), (late, 0x10000)):
        with pytest.raises(IotlbMiss):
            snapshot.read(iova, 1)
    assert late.with_iotlb(None).read(0x1000, 10) == b"same bytes"
    assert late.segments(0x20000, 16)[0].guest == 0x1000
