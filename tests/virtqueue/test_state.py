"""Base, saved state, ring reset, new memory, IOMMU, dirty log, memory mapped on demand."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from virtqueue_rig import GUEST, USER, Rig, logged_pages

from guest_memory import (
    DirtyLog,
    GuestAddress,
    GuestMemory,
    Iotlb,
    Iova,
    Region,
    UserAddress,
    abi,
    allocate_memfd,
)
from virtqueue import DONE, DoneFlags, Need, QueueBroken, Reason, UsageError
from virtqueue.memory.table import Table


def serve(rig: Rig, device: Any = None, count: int = 1) -> None:
    device = device or rig.device
    ids = rig.offer_many(count)
    batch = device.take()
    assert [chain.head for chain in batch] == ids
    device.cycle()
    assert [head for head, _ in rig.driver.collect()] == ids


def test_a_base_goes_on_where_the_last_queue_stopped(make_rig: Any, packed: bool) -> None:
    for size in (2, 4, 5) if packed else (2, 4):
        rig: Rig = make_rig(size=size, packed=packed)
        for _ in range(3 * size + 2):
            serve(rig)
            base = rig.device.base
            rig.device.close()
            rig.device = rig.new_device(base=base)
            assert rig.device.base == base


def test_a_base_that_cannot_be_meant_gives_way_to_the_used_index(make_rig: Any) -> None:
    """DPDK's virtio-user starts a split ring at 0 for the successor of a device that has died."""
    rig: Rig = make_rig(size=4, packed=False)
    for _ in range(7):
        serve(rig)
    ids = rig.offer_many(3)
    assert [chain.head for chain in rig.device.take()] == ids  # with these it dies
    rig.device = rig.new_device(base=0)
    assert rig.device.base == 7
    assert [chain.head for chain in rig.device.take()] == ids
    rig.device.cycle()
    assert [head for head, _ in rig.driver.collect()] == ids
    serve(rig)
    # A ring of its own length behind may be meant: it is served again from there.
    assert rig.new_device(base=11 - 4).base == 7


def test_2_8_the_packed_base_holds_both_positions(make_rig: Any) -> None:
    rig: Rig = make_rig(size=4, packed=True)
    assert rig.device.base == 0x8000_8000
    rig.offer_many(3)
    rig.device.take()
    assert rig.device.base == 0x8000_8003
    rig.device.cycle()
    assert rig.device.base == 0x8003_8003
    rig.driver.collect()
    serve(rig)
    assert rig.device.base == 0


def test_2_7_the_split_base_is_free_running(make_rig: Any) -> None:
    rig: Rig = make_rig(size=4, device=False)
    device = rig.new_device(base=0xFFFF)
    assert device.base == 0xFFFF


def test_a_base_outside_of_the_ring_is_refused(make_rig: Any) -> None:
    rig: Rig = make_rig(size=4, packed=True, device=False)
    for base in (4, 0x8004, 4 << 16):
        with pytest.raises(UsageError):
            rig.new_device(base=base)


def test_saved_state_goes_on(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, event_idx=True)
    for _ in range(11):
        serve(rig)
        state = rig.device.save()
        rig.device.close()
        rig.device = rig.new_device(state=state)
        assert rig.device.save() == state
    rig.offer_many(1)
    rig.device.take()
    with pytest.raises(UsageError):
        rig.device.save()


def test_2_6_1_a_reset_ring_starts_over_and_old_completions_touch_nothing(
    make_rig: Any, packed: bool
) -> None:
    rig: Rig = make_rig(packed=packed)
    rig.offer_many(3)
    old = rig.device
    chain = old.take()[0]
    old.stop()
    rig.memory.write(rig.ring, bytes(rig.layout.size))
    fresh: Rig = make_rig(packed=packed, memory=rig.memory)
    serve(fresh)
    before = rig.memory.read(rig.ring, rig.layout.size)
    old.complete(chain)
    assert not old.publish()
    old.close()
    assert rig.memory.read(rig.ring, rig.layout.size) == before
    with pytest.raises(UsageError):
        old.take()
    old.close()


# Memory.


def region(offset: int, size: int = 1 << 20) -> tuple[Region, int]:
    where = Region(GuestAddress(GUEST + offset), size, UserAddress(USER + offset))
    return where, allocate_memfd(size)


@pytest.fixture
def two() -> Iterator[tuple[GuestMemory, Region, int]]:
    """The ring's region, with another 1 GiB above it to add and remove."""
    first, fd = region(0)
    second, other = region(1 << 30)
    memory = GuestMemory.map([(first, fd), (second, other)])
    os.close(fd)
    yield memory, second, other
    os.close(other)


def test_a_new_table_serves_later_takes(
    make_rig: Any, packed: bool, two: tuple[GuestMemory, Region, int]
) -> None:
    memory, second, _ = two
    rig: Rig = make_rig(packed=packed, memory=memory)
    far = second.guest_address
    memory.write(far, b"before")
    for _ in range(4):
        rig.driver.add([(far, 6)], [(far + 64, 8)])
    rig.driver.publish()
    (chain,) = rig.device.take(1)
    smaller = memory.remove(second)
    rig.device.set_memory(smaller)
    with pytest.raises(QueueBroken) as caught:
        rig.device.take()
    assert caught.value.reason == Reason.ADDRESS
    # What was taken before still has its memory.
    assert chain.read() == b"before"
    assert chain.write(b"after") == 5
    rig.device.complete(chain)
    rig.device.publish()
    assert memory.read(GuestAddress(far + 64), 5) == b"after"
    assert len(rig.driver.collect()) == 1


def test_a_snapshot_lives_as_long_as_a_chain_in_flight(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    ids = rig.offer_many(2)
    rig.device.take()
    memory = rig.memory
    assert memory.pins == 2
    rig.device.set_memory(memory.with_postcopy(False))
    gone = weakref.ref(memory)
    rig.memory = None
    del rig.driver
    del memory
    gc.collect()
    assert gone() is not None
    for head in ids:
        rig.device.complete(head)
    rig.device.publish()
    gc.collect()
    assert gone() is None


def test_a_ring_that_appears_later_is_found(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, device=False)
    rig.offer_many(1)
    whole, rig.memory = rig.memory, GuestMemory()
    device = rig.new_device()
    with pytest.raises(QueueBroken) as caught:
        device.take()
    assert caught.value.reason == Reason.RING_MEMORY
    rig.memory = whole
    device.set_memory(whole)
    assert len(device.take()) == 1


def test_a_snapshot_of_another_abi_is_refused(make_rig: Any) -> None:
    rig: Rig = make_rig(device=False)

    class Strange:
        table_address = 0
        window = None

    table = abi.GmTable()
    ctypes.memmove(ctypes.addressof(table), rig.memory.table_address, ctypes.sizeof(table))
    for field in ("magic", "abi", "size"):
        changed = abi.GmTable.from_buffer_copy(table)
        setattr(changed, field, 7)
        strange = Strange()
        strange.table_address = ctypes.addressof(changed)
        rig.memory = strange
        with pytest.raises(UsageError):
            rig.new_device()


def test_a_buffer_may_cross_regions(make_rig: Any, packed: bool) -> None:
    first, fd = region(0)
    second, other = region(1 << 20)
    memory = GuestMemory.map([(first, fd), (second, other)])
    os.close(fd)
    os.close(other)
    rig: Rig = make_rig(packed=packed, memory=memory)
    edge = GUEST + (1 << 20)
    memory.write(GuestAddress(edge - 3), b"abcdef")
    rig.driver.add([(edge - 3, 6)], [(edge - 2, 4)])
    rig.driver.publish()
    (chain,) = rig.device.take()
    assert chain.read() == b"abcdef"
    assert chain.write(b"wxyz") == 4
    assert [(s.guest, s.length) for s in chain.segments] == [
        (edge - 3, 3),
        (edge, 3),
        (edge - 2, 2),
        (edge, 2),
    ]
    assert memory.read(GuestAddress(edge - 3), 6) == b"awxyzf"


def test_509_regions_are_searched(make_rig: Any, packed: bool) -> None:
    size = 1 << 16
    fd = allocate_memfd(509 * size)
    regions = [
        (
            Region(
                GuestAddress(GUEST + 2 * n * size),
                size,
                UserAddress(USER + 2 * n * size),
                mmap_offset=n * size,
            ),
            fd,
        )
        for n in range(509)
    ]
    memory = GuestMemory.map(regions)
    os.close(fd)
    rig: Rig = make_rig(packed=packed, memory=memory)
    for number in range(1, 509):
        address = GUEST + 2 * number * size
        memory.write(GuestAddress(address), number.to_bytes(2, "little"))
        rig.driver.add([(address, 2)])
        rig.driver.publish()
        (chain,) = rig.device.take()
        assert chain.read() == number.to_bytes(2, "little")
        rig.device.cycle()
        rig.driver.collect()
    rig.driver.add([(GUEST + size, 1)])
    rig.driver.publish()
    with pytest.raises(QueueBroken):
        rig.device.take()


# IOMMU.


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_miss_is_needed_and_then_goes_on(make_rig: Any, packed: bool, indirect: bool) -> None:
    """Ring, table and buffers, each in its own page of I/O virtual addresses."""
    base: Rig = make_rig(packed=packed, device=False)
    plain = base.memory
    tlb = Iotlb()
    config = base.config._replace(
        descriptor_address=base.layout.descriptor,
        driver_address=base.layout.driver,
        device_address=base.layout.device,
        iommu=True,
    )
    everything = Iotlb()
    everything.insert(Iova(0), 1 << 20, UserAddress(USER), 3)
    from virtqueue import DriverQueue

    driver = DriverQueue(config, plain.with_iotlb(everything), tables=0x8000)
    base.memory = plain.with_iotlb(tlb)
    device = base.new_device(config=config)
    plain.write(GUEST + 0x10FFE, b"abcd")
    head = driver.add([(0x10FFE, 4)], [(0x20FFF, 2)], indirect)
    driver.publish()

    needs: list[tuple[int, int]] = []
    for _ in range(20):
        try:
            batch = device.take()
            break
        except Need as need:
            needs.append((need.address & ~0xFFF, need.access))
            page = need.address & ~0xFFF
            tlb.insert(Iova(page), 0x1000, UserAddress(USER + page), need.access)
            device.set_memory(plain.with_iotlb(tlb))
    (chain,) = batch
    assert needs[0][0] == 0
    assert needs[-4:] == [(0x10000, 1), (0x11000, 1), (0x20000, 2), (0x21000, 2)]
    assert ((0x8000, 1) in needs) == indirect
    assert chain.read() == b"abcd"
    assert [s.guest for s in chain.segments if s.writable] == [GUEST + 0x20FFF, GUEST + 0x21000]
    chain.write(b"xy")
    device.complete(chain)
    assert device.publish()
    assert driver.collect() == [(head, 2)]
    assert plain.read(GUEST + 0x20FFF, 2) == b"xy"


def test_completions_reach_the_ring_after_its_translation_is_gone(
    make_rig: Any, packed: bool
) -> None:
    rig: Rig = make_rig(packed=packed, device=False)
    tlb = Iotlb()
    tlb.insert(Iova(USER), 1 << 20, UserAddress(USER), 3)
    tlb.insert(Iova(GUEST), 1 << 20, UserAddress(USER), 3)
    plain = rig.memory
    rig.memory = plain.with_iotlb(tlb)
    device = rig.new_device(config=rig.config._replace(iommu=True))
    rig.memory = plain
    ids = rig.offer_many(3)
    device.take(2)
    tlb.clear()
    device.set_memory(plain.with_iotlb(tlb))
    with pytest.raises(Need) as caught:
        device.cycle()
    assert caught.value.address == USER
    assert caught.value.notify
    assert [head for head, _ in rig.driver.collect()] == ids[:2]


# Dirty log.


USED_PAGE = 0x100_0000 >> 12
PAGE = GUEST >> 12


class Logged:
    """A rig with a dirty log, and the pages that it shows as written."""

    def __init__(self, make_rig: Any, packed: bool, enabled: bool = True, **config: Any) -> None:
        self.log_fd = allocate_memfd(64 << 10)
        self.log = DirtyLog(self.log_fd, 64 << 10, enabled=enabled)
        config.setdefault("log_used", USED_PAGE << 12)
        # A packed ring is logged where it is.
        self.used_page = PAGE if packed else USED_PAGE
        self.rig: Rig = make_rig(packed=packed, device=False, **config)
        self.device = self.rig.new_device(log=self.log)

    def pages(self) -> set[int]:
        return logged_pages(self.log)

    def close(self) -> None:
        self.device.close()
        self.log.close()
        os.close(self.log_fd)


@pytest.fixture
def logged(make_rig: Any, packed: bool) -> Iterator[Any]:
    made: list[Logged] = []

    def make(**settings: Any) -> Logged:
        made.append(Logged(make_rig, packed, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_what_is_written_is_logged(logged: Any) -> None:
    one: Logged = logged()
    rig, device = one.rig, one.device
    far = GUEST + 0x40000
    rig.driver.add([rig.text(b"in")], [(far, 0x1000), (far + 0x3000, 0x3000)])
    rig.driver.publish()
    assert not one.pages()
    (chain,) = device.take()
    chain.write(b"z" * 0x1800)
    device.complete(chain)
    device.publish()
    first = PAGE + 0x40
    assert one.pages() - {one.used_page} == {first, first + 3}


def test_the_used_ring_is_logged_at_its_own_address(logged: Any) -> None:
    one: Logged = logged(enabled=False)
    one.rig.offer_many(1)
    one.device.take()
    one.device.cycle()
    assert one.pages() == {one.used_page}


@pytest.mark.parametrize("status", [0, 1])
def test_a_status_is_logged_and_a_failure_logs_all(logged: Any, status: int) -> None:
    one: Logged = logged(status_byte=True)
    rig, device = one.rig, one.device
    far = GUEST + 0x40000
    rig.driver.add([rig.text(b"in")], [(far, 0x3000), (far + 0x8000, 1)])
    rig.driver.publish()
    batch = device.take()
    head = batch[0].head
    DONE.pack_into(batch.done, 0, head, status, DoneFlags.STATUS, 1)
    device.cycle()
    first = PAGE + 0x40
    expected = {first, first + 8} | ({first + 1, first + 2} if status else set())
    assert one.pages() - {one.used_page} == expected


def test_views_that_were_handed_out_count_as_written(logged: Any) -> None:
    one: Logged = logged()
    rig, device = one.rig, one.device
    far = GUEST + 0x40000
    for _ in range(2):
        rig.driver.add([], [(far, 0x3000)])
    rig.driver.publish()
    first, second = device.take()
    first.writable[0][:1] = b"x"
    device.complete(first, written=0)
    device.publish()
    page = PAGE + 0x40
    assert one.pages() - {one.used_page} == {page, page + 1, page + 2}
    second.writable[0][:1] = b"x"
    device.cycle()
    assert one.pages() - {one.used_page} == {page, page + 1, page + 2}


def test_a_log_that_comes_while_chains_are_in_flight_is_used(logged: Any) -> None:
    one: Logged = logged()
    rig = one.rig
    device = rig.new_device(base=rig.devices[0].base)
    far = GUEST + 0x40000
    head = rig.driver.add([], [(far, 4)])
    rig.driver.publish()
    device.take()
    device.set_log(one.log, 0x100_0000)
    device.complete(head, written=4)
    device.publish()
    assert one.pages() == {one.used_page, PAGE + 0x40}
    device.set_log(None)
    rig.driver.add([], [(far, 4)])
    rig.driver.publish()
    device.take()
    device.cycle()
    assert not one.pages()


def test_a_page_beyond_the_log_has_no_bit(make_rig: Any, packed: bool) -> None:
    fd = allocate_memfd(4096)
    with DirtyLog(fd, 4096, enabled=True) as log:
        rig: Rig = make_rig(packed=packed, device=False, log_used=(1 << 64) - 0x10000)
        device = rig.new_device(log=log)
        rig.offer_many(2)
        device.take()
        device.cycle()
        assert not any(log.view)
        device.close()
    os.close(fd)


# Memory that is mapped on demand.


def test_memory_on_demand_is_needed_provided_and_released(make_rig: Any, packed: bool) -> None:
    first, fd = region(0)
    second, other = region(1 << 30)
    memory = GuestMemory.map([(first, fd), (second, other)])
    table = abi.GmTable.from_address(memory.table_address)
    row = abi.GmRegion.from_address(table.regions + ctypes.sizeof(abi.GmRegion))
    host, row.host_address, row.flags = row.host_address, 0, 1
    far = second.guest_address
    rig: Rig = make_rig(packed=packed, memory=memory)
    rig.driver.add([(far + 0xFFE, 4)], [(far + 0x3000, 8)])
    rig.driver.publish()
    ctypes.memmove(host + 0xFFE, b"abcd", 4)
    released: list[int] = []
    needs: list[tuple[int, int]] = []
    while True:
        try:
            batch = rig.device.take()
            break
        except Need as need:
            needs.append((need.address, need.access))
            page = need.address & ~0xFFF
            rig.device.provide(
                page,
                0x1000,
                need.access,
                host + page - far,
                partial(released.append, page),
            )
    (chain,) = batch
    assert needs == [(far + 0xFFE, 1), (far + 0x1000, 1), (far + 0x3000, 2)]
    assert chain.read() == b"abcd"
    chain.write(b"12345678")
    assert rig.device.reclaim() == 0
    rig.device.complete(chain)
    rig.device.publish()
    assert rig.device.reclaim() == 3
    assert released == [far, far + 0x1000, far + 0x3000]
    assert ctypes.string_at(host + 0x3000, 8) == b"12345678"
    rig.device.provide(far, 0x1000, 1, host, lambda: released.append(0))
    rig.close()
    assert released[-1] == 0
    os.close(fd)
    os.close(other)


def test_provisions_are_bounded_and_reused(make_rig: Any) -> None:
    rig: Rig = make_rig()
    released: list[int] = []
    for number in range(3000):
        assert rig.device.provide(number, 1, 1, 4096, partial(released.append, number))
    assert released == list(range(len(released)))
    assert len(released) >= 1024


def test_tables_are_parsed_once_for_all_queues(make_rig: Any) -> None:
    rig: Rig = make_rig()
    assert Table.of(rig.memory) is Table.of(rig.memory)
