"""Rings that begin: with or without a past, at odd bases, beside regions of other sizes."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from virtqueue_rig import GUEST, Rig

from guest_memory import GuestMemory
from virtqueue import DONE, InflightRegion, QueueBroken, Reason, inflight_size
from virtqueue.engine.inflight import PackedState, SplitState


def serve(rig: Rig, count: int = 1) -> bool:
    """Offer and complete ``count`` chains; whether the driver was to be signalled."""
    ids = rig.offer_many(count)
    assert [chain.head for chain in rig.device.take()] == ids
    for head in ids:
        rig.device.complete(head)
    notify = rig.device.publish()
    assert [head for head, _ in rig.driver.collect()] == ids
    return notify


def set_up_anew(make_rig: Any, before: Rig, size: int, region: InflightRegion | None) -> Rig:
    """After a guest's reset: a ring of zeroes at the same place, and the region of before."""
    before.device.close()
    before.memory.write(before.ring, bytes(max(before.layout.size, 1 << 16)))
    rig: Rig = make_rig(
        size=size, packed=before.config.packed, memory=before.memory, device=False, table_length=1
    )
    rig.inflight = region
    rig.device = rig.new_device(base=0x8000_8000 if rig.config.packed else 0)
    return rig


# Bases.


def test_2_8_a_base_without_a_used_half_is_one_position(make_rig: Any) -> None:
    """DPDK sends the available half only."""
    rig: Rig = make_rig(packed=True, size=8, device=False)
    for half in (0x8000, 0x8003, 0x0003, 0x0000):
        device = rig.new_device(base=half)
        assert device.base == half << 16 | half
        device.close()
    rig.device = rig.new_device(base=0x8000)
    for _ in range(11):
        serve(rig)
        base = rig.device.base
        rig.device.close()
        rig.device = rig.new_device(base=base & 0xFFFF)


# Whether there was anything that the driver may not have been told of.


def test_a_ring_that_was_never_used_is_fresh(make_rig: Any, packed: bool) -> None:
    for offered in (0, 3, 8):
        for inflight in (False, True):
            rig: Rig = make_rig(packed=packed, size=8, device=False, inflight=inflight)
            rig.offer_many(offered, indirect=True)
            assert rig.new_device().fresh
            assert rig.new_device(base=0x8000_8000 if packed else 0).fresh is not inflight


def test_a_ring_with_a_past_is_not_fresh(make_rig: Any, packed: bool) -> None:
    for size in (4, 8):
        rig: Rig = make_rig(packed=packed, size=size)
        assert rig.device.fresh
        for _ in range(2 * size + 3):
            serve(rig)
            base = rig.device.base
            rig.device.close()
            # At the position, and at the one that a front-end may believe in.
            assert not rig.new_device(base=None).fresh
            rig.device = rig.new_device(base=base)
            assert not rig.device.fresh
    state = rig.device.save()
    assert not rig.new_device(state=state).fresh


def test_a_ring_that_is_not_in_memory_is_not_fresh_yet(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, device=False)
    whole, rig.memory = rig.memory, GuestMemory()
    device = rig.new_device()
    assert not device.fresh
    device.set_memory(whole)
    assert device.fresh


def test_a_fresh_ring_asks_nothing_of_its_driver_before_its_event(
    make_rig: Any, packed: bool
) -> None:
    rig: Rig = make_rig(packed=packed, size=16, event_idx=True)
    rig.driver.disable_notification()
    # With event indices that is an event which comes after a whole round.
    assert not serve(rig)
    rig.driver.enable_notification()
    assert serve(rig)


def test_a_queue_after_another_announces_its_first_completion(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, size=16, event_idx=True)
    serve(rig)
    rig.driver.enable_notification()
    serve(rig)
    base = rig.device.base
    rig.device = rig.new_device(base=base)
    rig.offer_many(1)
    rig.device.take()
    assert rig.device.cycle().notify
    rig.driver.collect()
    assert not serve(rig)


# In-flight regions.


@pytest.mark.parametrize("sizes", [(8, 8), (16, 8), (8, 16)], ids=["same", "smaller", "larger"])
def test_a_region_with_nothing_in_flight_does_not_hold_a_new_ring_back(
    make_rig: Any, packed: bool, sizes: tuple[int, int]
) -> None:
    first, second = sizes
    room = inflight_size(32, packed)
    for served in (1, first - 1, first, first + 3, 3 * first + 1):
        for offered in (0, 1, second):
            rig: Rig = make_rig(packed=packed, size=first, device=False)
            owner = (ctypes.c_uint64 * (room // 8))()
            region = InflightRegion(ctypes.addressof(owner), room, owner)
            rig.inflight = region
            rig.device = rig.new_device()
            for _ in range(served):
                serve(rig)
            again = set_up_anew(make_rig, rig, second, region)
            again.device.close()
            ids = [again.driver.add([(GUEST + 0x80000, 1)]) for _ in range(offered)]
            again.driver.publish()
            again.device = again.new_device(base=0x8000_8000 if packed else 0)
            assert [chain.head for chain in again.device.take()] == ids
            again.device.cycle()
            assert [head for head, _ in again.driver.collect()] == ids
            for _ in range(2 * second + 1):
                serve(again)
            rig.close()


def test_a_base_as_at_reset_does_not_undo_what_the_ring_shows(make_rig: Any, packed: bool) -> None:
    """A front-end whose back-end died may know no better."""
    for size in (3, 5, 8) if packed else (4, 8):
        for length in (1, 2, 3):
            rig: Rig = make_rig(packed=packed, size=size, inflight=True)
            buffers = [rig.text(b"x") for _ in range(length)]
            for step in range(3 * size):
                ids = []
                while rig.driver.free >= length:
                    ids.append(rig.driver.add(buffers))
                rig.driver.publish()
                found = [chain.head for chain in rig.device.take(1)]
                rig.device.cycle(0)
                found += [chain.head for chain in rig.device.take()] if step % 2 else []
                rig.device.cycle(0)
                assert [head for head, _ in rig.driver.collect()] == found
                rig.device.close()
                rig.device = rig.new_device(base=0x8000_8000 if packed else 0)


def make_larger(rig: Rig, entries: int) -> InflightRegion:
    """The rig's region as a back-end makes it that goes by what the region was asked for."""
    packed = rig.config.packed
    room = inflight_size(entries, packed)
    owner = (ctypes.c_uint64 * (room // 8))()
    region = InflightRegion(ctypes.addressof(owner), room, owner)
    rig.inflight = region
    rig.new_device().close()
    ctypes.c_uint16.from_address(region.address + 10).value = entries
    if packed:
        states: Any = (PackedState * entries).from_address(region.address + 32)
        for index, state in enumerate(states):
            state.next = index + 1
    return region


def test_a_region_for_more_descriptors_than_the_ring_has(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, size=8, device=False)
    make_larger(rig, 20)
    # Two in flight all the time: the position is not the one of a new ring.
    rig.offer_many(2, indirect=True)
    rig.device = rig.new_device()
    held = [chain.head for chain in rig.device.take()]
    for _ in range(30):
        ids = rig.offer_many(1, indirect=True)
        device = rig.new_device(base=rig.device.base)
        batch = device.take()
        assert [chain.head for chain in batch] == held + ids
        assert [chain.resubmitted for chain in batch] == [True, True, False]
        device.complete(held[0])
        device.publish()
        assert [head for head, _ in rig.driver.collect()] == held[:1]
        held = held[1:] + ids
        rig.device = device


def test_a_region_for_fewer_descriptors_than_the_ring_has_is_refused(
    make_rig: Any, packed: bool
) -> None:
    rig: Rig = make_rig(packed=packed, size=8, inflight=True)
    rig.offer_many(1)
    rig.device.take()
    assert rig.inflight is not None
    ctypes.c_uint16.from_address(rig.inflight.address + 10).value = 7
    with pytest.raises(QueueBroken) as caught:
        rig.new_device().take()
    assert caught.value.reason == Reason.INFLIGHT


def test_a_mark_behind_the_ring_is_no_chain(make_rig: Any) -> None:
    rig: Rig = make_rig(size=8, device=False)
    region = make_larger(rig, 20)
    states: Any = (SplitState * 20).from_address(region.address + 16)
    states[8].inflight = 1
    with pytest.raises(QueueBroken) as caught:
        rig.new_device().take()
    assert caught.value.reason == Reason.INFLIGHT


@pytest.mark.parametrize("inflight", [False, True], ids=["alone", "inflight"])
def test_the_largest_ring(make_rig: Any, packed: bool, inflight: bool) -> None:
    size = 32768
    rig: Rig = make_rig(
        packed=packed, size=size, inflight=inflight, memory_size=4 << 20, table_length=1, batch=4096
    )
    buffer = rig.text(b"z")
    ids = [rig.driver.add([buffer]) for _ in range(size)]
    rig.driver.publish()
    if inflight:
        rig.device.take()
        rig.device.close()
        rig.device = rig.new_device(base=rig.device.base)
        assert rig.device.resubmitted == 4096
    found: list[int] = []
    while batch := rig.device.take():
        found += [entry[0] for entry in DONE.iter_unpack(batch.done)]
    assert found == ids
    assert rig.device.give_back(ids[size // 2 :]) == ids[size // 2 :]
    while rig.device.take():
        pass
    for head in ids:
        rig.device.complete(head)
    rig.device.publish()
    assert [head for head, _ in rig.driver.collect()] == ids
    assert rig.device.base == (0 if packed else size)
