"""Rings that break the rules: each ends in a broken queue with a reason, in bounded time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from virtqueue_rig import GUEST, USER, Rig

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress, abi, allocate_memfd
from virtqueue import QueueBroken, Reason

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15

End = (1 << 20) + GUEST
SECOND = GUEST + (1 << 30)


def two_regions() -> GuestMemory:
    size = 1 << 20
    regions = []
    fds = [allocate_memfd(size) for _ in range(2)]
    for offset, fd in zip((0, SECOND - GUEST), fds, strict=True):
        region = Region(GuestAddress(GUEST + offset), size, UserAddress(USER + offset))
        regions.append((region, fd))
    try:
        return GuestMemory.map(regions)
    finally:
        for fd in fds:
            os.close(fd)


def expect(rig: Rig, reason: Reason) -> QueueBroken:
    with pytest.raises(QueueBroken) as caught:
        rig.device.take()
    assert caught.value.reason == reason, caught.value
    assert rig.device.broken is not None
    # It stays broken, and it does so without looking at the ring again.
    with pytest.raises(QueueBroken) as again:
        rig.device.cycle()
    assert again.value.reason == reason
    assert not rig.device.ready()
    return caught.value


def avail_jump(rig: Rig) -> None:
    rig.avail(9)


def avail_back(rig: Rig) -> None:
    rig.avail(0xFFFF)


def head_out_of_range(rig: Rig) -> None:
    rig.avail(1, 8)


def next_out_of_range(rig: Rig) -> None:
    rig.descriptor(0, GUEST, 1, NEXT, 8)
    rig.avail(1, 0)


def loop(rig: Rig) -> None:
    rig.descriptor(0, GUEST, 1, NEXT, 1)
    rig.descriptor(1, GUEST, 1, NEXT, 0)
    rig.avail(1, 0)


def self_loop(rig: Rig) -> None:
    rig.descriptor(3, GUEST, 1, NEXT, 3)
    rig.avail(1, 3)


def in_table(*descriptors: tuple[int, int, int, int]) -> Callable[[Rig], None]:
    def build(rig: Rig) -> None:
        address, length = rig.table(*descriptors)
        rig.descriptor(0, address, length, INDIRECT, 0)
        rig.avail(1, 0)

    return build


def indirect_of(length: int, address: int = GUEST) -> Callable[[Rig], None]:
    def build(rig: Rig) -> None:
        rig.descriptor(0, address, length, INDIRECT, 0)
        rig.avail(1, 0)

    return build


def one(address: int, length: int, flags: int = 0) -> Callable[[Rig], None]:
    def build(rig: Rig) -> None:
        rig.descriptor(0, address, length, flags, 0)
        rig.avail(1, 0)

    return build


def indirect_with_next(rig: Rig) -> None:
    rig.descriptor(0, *rig.table((GUEST, 1, 0, 0)), INDIRECT | NEXT, 1)
    rig.descriptor(1, GUEST, 1, 0, 0)
    rig.avail(1, 0)


def writable_first(rig: Rig) -> None:
    rig.descriptor(0, GUEST, 1, NEXT | WRITE, 1)
    rig.descriptor(1, GUEST, 1, 0, 0)
    rig.avail(1, 0)


def too_much(rig: Rig) -> None:
    for slot in range(8):
        rig.descriptor(slot, GUEST, 0xFFFF_FFFF, NEXT if slot < 7 else 0, slot + 1)
    rig.avail(1, 0)


def same_head_twice(rig: Rig) -> None:
    rig.descriptor(0, GUEST, 1, 0, 0)
    rig.avail(2, 0, 0)


def long_table(rig: Rig) -> None:
    # Direct descriptors and those of the table count together.
    table = rig.table(*((GUEST, 1, NEXT, n + 1) for n in range(1023)), (GUEST, 1, 0, 0))
    rig.descriptor(0, GUEST, 1, NEXT, 1)
    rig.descriptor(1, *table, INDIRECT, 0)
    rig.avail(1, 0)


SPLIT: dict[str, tuple[Callable[[Rig], None], Reason]] = {
    "available index jumps": (avail_jump, Reason.AVAIL_JUMP),
    "available index goes back": (avail_back, Reason.AVAIL_JUMP),
    "head out of range": (head_out_of_range, Reason.HEAD_OUT_OF_RANGE),
    "next out of range": (next_out_of_range, Reason.NEXT_OUT_OF_RANGE),
    "loop": (loop, Reason.CHAIN_TOO_LONG),
    "loop of one": (self_loop, Reason.CHAIN_TOO_LONG),
    "loop in a table": (in_table((GUEST, 1, NEXT, 0)), Reason.CHAIN_TOO_LONG),
    "table with direct ones too long": (long_table, Reason.CHAIN_TOO_LONG),
    "table nested": (in_table((GUEST, 16, INDIRECT, 0)), Reason.INDIRECT_NESTED),
    "table next out of range": (in_table((GUEST, 1, NEXT, 1)), Reason.INDIRECT_NEXT_OUT_OF_RANGE),
    "table with next": (indirect_with_next, Reason.INDIRECT_WITH_NEXT),
    "table empty": (indirect_of(0), Reason.INDIRECT_LENGTH),
    "table of odd length": (indirect_of(17), Reason.INDIRECT_LENGTH),
    "table too long": (indirect_of(16 * 1025), Reason.INDIRECT_LENGTH),
    "table of 4 GiB": (indirect_of(0xFFFF_FFF0), Reason.INDIRECT_LENGTH),
    "table outside": (indirect_of(16, 0x1000), Reason.ADDRESS),
    "table half outside": (indirect_of(32, End - 16), Reason.ADDRESS),
    "table wraps": (indirect_of(32, (1 << 64) - 16), Reason.ADDRESS),
    "buffer empty": (one(GUEST, 0), Reason.ZERO_LENGTH),
    "buffer outside": (one(0, 1), Reason.ADDRESS),
    "buffer behind": (one(End, 1), Reason.ADDRESS),
    "buffer half outside": (one(End - 1, 2, WRITE), Reason.ADDRESS),
    "buffer wraps": (one((1 << 64) - 1, 2), Reason.ADDRESS),
    "buffer at the end of the world": (one((1 << 64) - 1, 0xFFFF_FFFF), Reason.ADDRESS),
    "readable after writable": (writable_first, Reason.READABLE_AFTER_WRITABLE),
    "head offered twice": (same_head_twice, Reason.HEAD_IN_FLIGHT),
}


@pytest.mark.parametrize("case", list(SPLIT))
def test_2_7_a_wrong_split_ring_breaks_the_queue(make_rig: Any, case: str) -> None:
    build, reason = SPLIT[case]
    rig: Rig = make_rig()
    build(rig)
    if case == "head offered twice":
        assert len(rig.device.take()) == 1
    expect(rig, reason)


def p(rig: Rig, *descriptors: tuple[int, int, int, int]) -> None:
    for slot, (address, length, flags, identity) in enumerate(descriptors):
        rig.descriptor(slot, address, length, flags | AVAIL, identity)


PACKED: dict[str, tuple[Callable[[Rig], None], Reason]] = {
    "id out of range": (lambda r: p(r, (GUEST, 1, 0, 8)), Reason.HEAD_OUT_OF_RANGE),
    "chain round the ring": (lambda r: p(r, *[(GUEST, 1, NEXT, 0)] * 8), Reason.CHAIN_TOO_LONG),
    "chain without its end": (
        lambda r: p(r, (GUEST, 1, NEXT, 0)),
        Reason.UNFINISHED_CHAIN,
    ),
    "table with next": (
        lambda r: p(r, (*r.table((GUEST, 1, 0, 0)), INDIRECT | NEXT, 0), (GUEST, 1, 0, 0)),
        Reason.INDIRECT_WITH_NEXT,
    ),
    "table in a chain": (
        lambda r: p(r, (GUEST, 1, NEXT, 0), (*r.table((GUEST, 1, 0, 0)), INDIRECT, 0)),
        Reason.INDIRECT_WITH_NEXT,
    ),
    "table empty": (lambda r: p(r, (GUEST, 0, INDIRECT, 0)), Reason.INDIRECT_LENGTH),
    "table of odd length": (lambda r: p(r, (GUEST, 24, INDIRECT, 0)), Reason.INDIRECT_LENGTH),
    "table too long": (lambda r: p(r, (GUEST, 16 * 1025, INDIRECT, 0)), Reason.INDIRECT_LENGTH),
    "table outside": (lambda r: p(r, (0, 16, INDIRECT, 0)), Reason.ADDRESS),
    "buffer empty": (lambda r: p(r, (GUEST, 0, 0, 0)), Reason.ZERO_LENGTH),
    "buffer outside": (lambda r: p(r, (0, 1, 0, 0)), Reason.ADDRESS),
    "buffer wraps": (lambda r: p(r, ((1 << 64) - 1, 2, 0, 0)), Reason.ADDRESS),
    "readable after writable": (
        lambda r: p(r, (GUEST, 1, NEXT | WRITE, 0), (GUEST, 1, 0, 0)),
        Reason.READABLE_AFTER_WRITABLE,
    ),
    "id offered twice": (
        lambda r: p(r, (GUEST, 1, 0, 3), (GUEST, 1, 0, 3)),
        Reason.HEAD_IN_FLIGHT,
    ),
}


@pytest.mark.parametrize("case", list(PACKED))
def test_2_8_a_wrong_packed_ring_breaks_the_queue(make_rig: Any, case: str) -> None:
    build, reason = PACKED[case]
    rig: Rig = make_rig(packed=True)
    build(rig)
    if case == "id offered twice":
        assert len(rig.device.take()) == 1
    expect(rig, reason)


def test_2_8_a_packed_chain_may_not_reach_into_slots_that_are_still_in_flight(
    make_rig: Any,
) -> None:
    rig: Rig = make_rig(packed=True)
    for slot in range(6):
        rig.descriptor(slot, GUEST, 1, AVAIL, slot)
    assert len(rig.device.take()) == 6
    rig.descriptor(6, GUEST, 1, AVAIL | NEXT, 0)
    rig.descriptor(7, GUEST, 1, AVAIL | NEXT, 0)
    rig.descriptor(0, GUEST, 1, USED, 6)  # available under the flipped counter
    expect(rig, Reason.CHAIN_TOO_LONG)


def test_2_7_5_a_chain_of_more_than_4_gib(make_rig: Any) -> None:
    size = 3 << 30
    fd = allocate_memfd(size)
    memory = GuestMemory.map([(Region(GuestAddress(GUEST), size, UserAddress(USER)), fd)])
    rig: Rig = make_rig(memory=memory)
    rig.fd = fd
    rig.descriptor(0, GUEST, 1 << 31, NEXT, 1)
    rig.descriptor(1, GUEST, (1 << 31) - 1, 0, 0)
    rig.avail(1, 0)
    (chain,) = rig.device.take()
    assert chain.readable_length == 0xFFFF_FFFF
    rig.descriptor(2, GUEST, 1 << 31, NEXT, 3)
    rig.descriptor(3, GUEST, 1 << 31, 0, 0)
    rig.avail(2, 2)
    expect(rig, Reason.TOTAL_LENGTH)


@pytest.mark.parametrize("flag", [0, NEXT])
def test_2_7_5_3_indirect_that_was_not_negotiated(make_rig: Any, packed: bool, flag: int) -> None:
    rig: Rig = make_rig(packed=packed, indirect=False)
    flags = INDIRECT | (AVAIL if packed else 0)
    rig.descriptor(0, *rig.table((GUEST, 1, 0, 0)), flags, 0)
    rig.avail(1, 0) if not packed else None
    expect(rig, Reason.INDIRECT_NOT_NEGOTIATED)


def test_a_request_without_room_for_its_status(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, status_byte=True)
    rig.driver.add([rig.text(b"no room")])
    rig.driver.publish()
    expect(rig, Reason.STATUS_BYTE)


def test_the_chains_before_a_wrong_one_are_served(make_rig: Any) -> None:
    rig: Rig = make_rig()
    good = rig.offer_many(2)
    rig.avail(3, 8)
    batch = rig.device.take()
    assert [chain.head for chain in batch] == good
    assert batch.more
    with pytest.raises(QueueBroken) as caught:
        rig.device.cycle()
    assert caught.value.reason == Reason.HEAD_OUT_OF_RANGE
    assert caught.value.notify
    assert [head for head, _ in rig.driver.collect()] == good


def test_a_write_into_read_only_memory(make_rig: Any, packed: bool) -> None:
    memory = two_regions()
    table = abi.GmTable.from_address(memory.table_address)
    abi.GmRegion.from_address(table.regions + ctypes.sizeof(abi.GmRegion)).flags = 2
    rig: Rig = make_rig(packed=packed, memory=memory)
    rig.driver.add([(SECOND, 4)])
    rig.driver.add([], [(SECOND, 4)])
    rig.driver.publish()
    assert len(rig.device.take()) == 1
    expect(rig, Reason.ACCESS)


def test_a_ring_outside_of_guest_memory(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, device=False)
    for address in (USER + (1 << 20) - 4, USER - 4096, 0, (1 << 64) - 16):
        device = rig.new_device(config=rig.config._replace(device_address=address & ~3))
        if packed and address == USER + (1 << 20) - 4:
            assert not device.take()
            continue
        for _ in range(2):
            with pytest.raises(QueueBroken) as caught:
                device.take()
            assert caught.value.reason == Reason.RING_MEMORY


@pytest.mark.parametrize("part", ["descriptor_address", "driver_address", "device_address"])
def test_2_7_a_misaligned_ring_is_the_drivers_fault(make_rig: Any, packed: bool, part: str) -> None:
    rig: Rig = make_rig(packed=packed, device=False)
    wrong = rig.config._replace(**{part: getattr(rig.config, part) + 1})
    with pytest.raises(QueueBroken) as caught:
        rig.new_device(config=wrong).take()
    assert caught.value.reason == Reason.RING_MEMORY


def test_memory_that_is_truncated_under_us_breaks_the_queue(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    rig.offer_many(2)
    batch = rig.device.take()
    table = abi.GmTable.from_address(rig.memory.table_address)
    word = ctypes.c_uint32.from_address(abi.GmRegion.from_address(table.regions).poison)
    before = rig.memory.read(rig.ring, rig.layout.size)
    word.value = 1
    try:
        with pytest.raises(QueueBroken) as caught:
            rig.device.cycle()
        assert caught.value.reason == Reason.TRUNCATED
        assert not caught.value.notify
        assert rig.device.in_flight == 0
    finally:
        word.value = 0
    assert rig.memory.read(rig.ring, rig.layout.size) == before
    assert len(batch) == 0


def test_random_rings_never_crash_hang_or_escape(make_rig: Any, packed: bool) -> None:
    random_ = random.Random(23)
    for _ in range(150):
        rig: Rig = make_rig(packed=packed, device=False)
        raw = bytearray(random_.randbytes(rig.layout.size))
        for slot in range(8):
            if random_.random() < 0.8:  # an address that is right makes the walk go on
                address = GUEST + random_.randrange(1 << 16)
                raw[16 * slot : 16 * slot + 8] = address.to_bytes(8, "little")
                raw[16 * slot + 8 : 16 * slot + 12] = random_.choice([16, 32, 4096]).to_bytes(
                    4, "little"
                )
            if random_.random() < 0.8:
                flags = random_.choice([0, 1, 2, 3, 4, 5]) | (AVAIL if packed else 0)
                at = 16 * slot + (14 if packed else 12)
                raw[at : at + 2] = flags.to_bytes(2, "little")
                at = 16 * slot + (12 if packed else 14)
                raw[at : at + 2] = random_.randrange(9).to_bytes(2, "little")
        if not packed:
            at = rig.layout.driver
            raw[at + 2 : at + 4] = random_.randrange(12).to_bytes(2, "little")
            for slot in range(8):
                raw[at + 4 + 2 * slot : at + 6 + 2 * slot] = random_.randrange(9).to_bytes(
                    2, "little"
                )
        rig.memory.write(rig.ring, bytes(raw))
        device = rig.new_device(base=None if packed else 0)
        with contextlib.suppress(QueueBroken):
            for _ in range(20):
                for chain in device.take(random_.randint(1, 4)):
                    chain.read()
                    chain.write(b"x" * 8)
                if not device.cycle():
                    break
        rig.close()
