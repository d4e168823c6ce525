"""What both formats promise, named by the clause of the specification (virtio 1.3)."""

from __future__ import annotations

import random
from typing import Any

import pytest
from virtqueue_rig import GUEST, Rig

from virtqueue import (
    DONE,
    RECORD,
    ChainCompleted,
    DoneFlags,
    RecordFlags,
    UsageError,
)


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_2_7_13_a_chain_goes_to_the_device_and_back(
    make_rig: Any, packed: bool, features: dict[str, bool], indirect: bool
) -> None:
    rig: Rig = make_rig(packed=packed, **features)
    head = rig.driver.add(
        [rig.text(b"head"), rig.text(b"-and-tail")], [rig.room(4), rig.room(60)], indirect
    )
    assert rig.driver.publish()
    (chain,) = rig.device.take()
    assert chain.head == head
    assert (chain.readable_length, chain.writable_length) == (13, 64)
    assert chain.read() == b"head-and-tail"
    assert chain.write(b"0123456789") == 10
    rig.device.complete(chain)
    assert rig.device.publish()
    assert rig.driver.collect() == [(head, 10)]
    assert rig.driver.free == rig.config.size
    assert rig.device.in_flight == 0


def test_2_7_13_thousands_of_chains_wrap_the_ring_in_any_order(
    make_rig: Any, packed: bool, features: dict[str, bool]
) -> None:
    random_ = random.Random(7)
    for size in (1, 2, 8, *((3, 7) if packed else ())):
        rig: Rig = make_rig(size=size, packed=packed, **features)
        readable, writable = rig.text(b"x" * 24), rig.room(64)
        offered: dict[int, int] = {}
        held: list[int] = []
        order: list[int] = []
        number = 0
        while number < 600 or offered:
            while number < 600 and random_.random() < 0.7:
                parts = random_.randint(1, min(3, size))
                indirect = random_.random() < 0.3
                if rig.driver.free < (1 if indirect else parts):
                    break
                head = rig.driver.add([readable] * (parts - 1), [writable], indirect)
                assert head not in offered
                offered[head] = number
                order.append(head)
                number += 1
            rig.driver.publish()
            batch = rig.device.take(random_.randint(1, 5))
            held += [DONE.unpack_from(batch.done, 8 * i)[0] for i in range(len(batch))]
            random_.shuffle(held)
            for _ in range(random_.randint(0, len(held))):
                rig.device.complete(held.pop(), written=random_.randint(0, 64))
            rig.device.publish()
            for head, _ in rig.driver.collect():
                del offered[head]
                if features.get("in_order"):
                    assert order.pop(0) == head
        assert rig.device.completed == rig.device.taken == 600
        assert rig.driver.free == size


def test_2_7_8_the_record_gives_header_offsets_and_lengths(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, status_byte=True)
    text = b"0123456789abcdef" + b"payload"
    head = rig.driver.add([rig.text(text)], [rig.room(512), rig.room(1)])
    rig.driver.publish()
    batch = rig.device.take()
    assert len(batch) == 1
    ((header, readable, writable, status, rlen, wlen, found, flags, segments, first),) = (
        RECORD.iter_unpack(batch.records)
    )
    window = rig.device.window
    assert window is not None
    assert header == b"0123456789abcdef"
    assert bytes(window[readable : readable + rlen]) == b"payload"
    assert (rlen, wlen, found, segments, first) == (7, 513, head, 3, 0)
    assert flags == RecordFlags.READABLE_CONTIGUOUS | RecordFlags.WRITABLE_CONTIGUOUS
    assert DONE.unpack(batch.done) == (head, 0, DoneFlags.STATUS, 513)
    window[writable : writable + 512] = b"\xaa" * 512
    DONE.pack_into(batch.done, 0, head, 7, DoneFlags.STATUS, 100)
    empty = rig.device.cycle()
    assert not empty
    assert empty.notify
    assert rig.driver.collect() == [(head, 100)]
    assert window[status] == 7


def test_a_short_request_has_a_zero_padded_header(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    rig.driver.add([rig.text(b"abc"), rig.text(b"de")])
    rig.driver.publish()
    batch = rig.device.take()
    record = RECORD.unpack(batch.records)
    assert record[0] == b"abcde" + bytes(11)
    assert record[4:6] == (0, 0)


def test_scattered_payload_is_not_contiguous(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, status_byte=True)
    rig.driver.add(
        [rig.text(b"h" * 16), rig.text(b"a"), rig.text(b"b")], [rig.room(8), rig.room(8)]
    )
    rig.driver.publish()
    batch = rig.device.take()
    assert RECORD.unpack(batch.records)[7] == 0
    assert batch[0].read() == b"h" * 16 + b"ab"


def test_a_cycle_completes_the_batch_and_takes_the_next(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(size=16, packed=packed, batch=4)
    ids = rig.offer_many(8)
    batch = rig.device.take()
    heads = [entry[0] for entry in DONE.iter_unpack(batch.done)]
    assert batch.more
    batch = rig.device.cycle()
    heads += [entry[0] for entry in DONE.iter_unpack(batch.done)]
    assert heads == ids
    assert batch.notify
    batch = rig.device.cycle()
    assert (len(batch), batch.more, batch.stalled) == (0, False, False)
    assert rig.driver.collect() == [(head, 32) for head in ids]


def test_kept_chains_stay_in_flight_through_a_cycle(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    ids = rig.offer_many(3)
    batch = rig.device.take()
    batch.done[8 + 3] |= DoneFlags.KEEP
    rig.device.cycle()
    assert rig.device.in_flight == 1
    assert [head for head, _ in rig.driver.collect()] == [ids[0], ids[2]]
    rig.device.complete(ids[1], written=5)
    rig.device.publish()
    assert rig.driver.collect() == [(ids[1], 5)]


def test_a_completed_chain_raises_when_used(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    rig.offer_many(3)
    batch = rig.device.take()
    first, second = batch[0], batch[1]
    assert batch[0] is first
    rig.device.complete(first)
    with pytest.raises(ChainCompleted):
        rig.device.complete(first)
    for use in (first.read, lambda: first.readable, lambda: first.writable, lambda: first.segments):
        with pytest.raises(ChainCompleted):
            use()
    assert second.read() == b"hello"
    rig.device.cycle()
    assert second.completed
    assert rig.device.in_flight == 0
    assert len(rig.driver.collect()) == 3


def test_completing_what_is_not_in_flight_is_our_own_bug(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    (head,) = rig.offer_many(1)
    rig.device.complete(head)
    with pytest.raises(UsageError):
        rig.device.publish()
    rig.device.take()
    rig.device.complete(head, written=33)
    with pytest.raises(UsageError):
        rig.device.publish()
    rig.device.complete(head, written=32)
    rig.device.publish()
    rig.device.complete(head)
    with pytest.raises(UsageError):
        rig.device.publish()
    assert rig.driver.collect() == [(head, 32)]


def test_a_batch_that_was_filled_in_wrongly_does_not_stick(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    (head,) = rig.offer_many(1)
    batch = rig.device.take()
    DONE.pack_into(batch.done, 0, 7, 0, 0, 0)
    with pytest.raises(UsageError):
        rig.device.cycle()
    assert not rig.device.cycle()
    rig.device.complete(head)
    assert rig.device.publish()


def test_a_queue_that_is_dropped_lets_go_of_memory(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, device=False)
    rig.offer_many(2)
    device = rig.new_device()
    device.take()
    assert rig.memory.pins == 2
    rig.devices.clear()
    del device
    assert rig.memory.pins == 0


def test_the_same_head_twice_in_one_publish_completes_none(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    first, second = rig.offer_many(2)
    rig.device.take()
    for head in (first, second, first):
        rig.device.complete(head)
    with pytest.raises(UsageError):
        rig.device.publish()
    assert rig.device.in_flight == 2
    assert rig.driver.collect() == []


def test_rewound_chains_are_taken_again(make_rig: Any, packed: bool, features: Any) -> None:
    rig: Rig = make_rig(packed=packed, **features)
    ids = rig.offer_many(4)
    batch = rig.device.take()
    base = rig.device.base
    kept = batch[0]
    lost = batch[3]
    rig.device.rewind(3)
    assert (len(batch), rig.device.in_flight) == (1, 1)
    assert rig.device.base != base
    with pytest.raises(ChainCompleted):
        lost.read()
    batch = rig.device.take()
    assert [chain.head for chain in batch] == ids[1:]
    assert rig.device.base == base
    assert kept.read() == b"hello"
    rig.device.complete(kept)
    rig.device.cycle()
    assert [head for head, _ in rig.driver.collect()] == ids


def test_rewinding_past_a_completed_chain_is_our_own_bug(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    rig.offer_many(2)
    batch = rig.device.take()
    rig.device.complete(batch[1])
    rig.device.publish()
    with pytest.raises(UsageError):
        rig.device.rewind(1)
    with pytest.raises(UsageError):
        rig.device.rewind(3)


def test_a_limit_bounds_a_take(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    rig.offer_many(3)
    assert len(rig.device.take(0)) == 0
    assert len(rig.device.take(2)) == 2
    assert len(rig.device.take()) == 1


@pytest.mark.parametrize("in_flight", [False, True], ids=["alone", "inflight"])
@pytest.mark.parametrize("length", [128, 1024])
def test_a_table_longer_than_the_ring_is_taken(
    make_rig: Any, packed: bool, length: int, in_flight: bool
) -> None:
    """Linux's tables follow a device's limits, such as seg_max, and not the ring's size."""
    for size in (1, 2, 16, 64):
        rig: Rig = make_rig(
            size=size,
            packed=packed,
            table_length=length,
            memory_size=4 << 20,
            batch=2,
            inflight=in_flight,
            status_byte=True,
        )
        for _ in range(2):
            buffers = [rig.text(bytes((n & 0xFF,))) for n in range(length - 1)]
            status = rig.room(1)
            heads = [rig.driver.add(buffers, [status], indirect=True) for _ in range(min(size, 5))]
            rig.driver.publish()
            if in_flight:
                rig.device.take()
                rig.device = rig.new_device(base=rig.device.base)
            found = []
            while batch := rig.device.cycle():
                for chain in batch:
                    assert len(chain.segments) == length
                    assert chain.read() == bytes(n & 0xFF for n in range(length - 1))
                    found.append(chain.head)
            assert found == heads
            assert [head for head, _ in rig.driver.collect()] == heads
            assert rig.memory.read(status[0], 1) == b"\0"


def test_a_chain_without_a_table_is_no_longer_than_the_ring(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(size=8, packed=packed)
    with pytest.raises(UsageError):
        rig.driver.add([rig.text(b"x")] * 9)
    rig.driver.add([rig.text(b"x")] * 8)
    rig.driver.publish()
    assert len(rig.device.take()[0].segments) == 8


@pytest.mark.parametrize("call", ["take", "cycle"])
def test_a_limit_holds_for_what_comes_while_the_driver_is_asked_for_kicks(
    make_rig: Any, packed: bool, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig: Rig = make_rig(size=16, packed=packed)
    arm = rig.device._engine.arm

    def late() -> Any:
        rig.offer_many(5)
        return arm()

    monkeypatch.setattr(rig.device._engine, "arm", late)
    batch = getattr(rig.device, call)(2)
    assert len(batch) == 2
    assert batch.more
    # It was for that call alone.
    monkeypatch.undo()
    assert len(rig.device.take()) == 3


def test_a_limit_counts_the_chains_of_the_in_flight_region(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(size=16, packed=packed, inflight=True)
    ids = rig.offer_many(5)
    rig.device.take(3)
    device = rig.new_device()
    assert [chain.head for chain in device.take(2)] == ids[:2]
    assert [chain.head for chain in device.take(2)] == ids[2:4]
    assert [chain.head for chain in device.take(2)] == ids[4:]


def test_a_batch_never_overruns_its_segments(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(size=256, packed=packed, batch=2, table_length=256, memory_size=4 << 20)
    buffer = rig.text(b"z")
    ids = [rig.driver.add([buffer] * 256, indirect=True) for _ in range(10)]
    rig.driver.publish()
    found: list[int] = []
    while batch := rig.device.cycle():
        for chain in batch:
            assert len(chain.segments) == 256
            found.append(chain.head)
    assert found == ids


def test_a_chain_that_does_not_fit_the_batch_waits_for_the_next_take(
    make_rig: Any, packed: bool
) -> None:
    # 16 segments for each of 128 chains: 16 chains of 256 fill a batch.
    rig: Rig = make_rig(size=256, packed=packed, table_length=256, memory_size=8 << 20)
    buffer = rig.text(b"z")
    ids = [rig.driver.add([buffer] * 256, indirect=True) for _ in range(20)]
    rig.driver.publish()
    batch = rig.device.take()
    assert 0 < len(batch) < 20
    assert batch.more
    found: list[int] = []
    while batch:
        found += [chain.head for chain in batch]
        batch = rig.device.cycle()
    assert found == ids


def test_a_chain_for_which_there_is_no_room_waits_for_completions(
    make_rig: Any, packed: bool
) -> None:
    size = 1024
    rig: Rig = make_rig(size=size, packed=packed, table_length=size, memory_size=64 << 20)
    buffer = rig.room(1)
    ids = [rig.driver.add([], [buffer] * size, indirect=True) for _ in range(120)]
    rig.driver.publish()
    found: list[int] = []
    while batch := rig.device.take():
        found += [entry[0] for entry in DONE.iter_unpack(batch.done)]
    assert batch.stalled
    assert len(found) == (16 * size + 65536) // size
    for head in found:
        rig.device.complete(head)
    assert rig.device.publish()
    batch = rig.device.take()
    assert [entry[0] for entry in DONE.iter_unpack(batch.done)] == ids[len(found) :][: len(batch)]


def test_numpy_reads_a_batch_without_a_copy(make_rig: Any, packed: bool) -> None:
    numpy = pytest.importorskip("numpy")
    from virtqueue import DONE_FIELDS, RECORD_FIELDS

    rig: Rig = make_rig(packed=packed)
    ids = rig.offer_many(3)
    batch = rig.device.take()
    records = numpy.frombuffer(batch.records, numpy.dtype(RECORD_FIELDS))
    assert records["head"].tolist() == ids
    assert records["writable_length"].tolist() == [32, 32, 32]
    done = numpy.frombuffer(batch.done, numpy.dtype(DONE_FIELDS))
    done["written"] = [1, 2, 3]
    rig.device.cycle()
    assert rig.driver.collect() == list(zip(ids, [1, 2, 3], strict=True))


def test_2_7_5_3_a_table_may_follow_direct_descriptors(make_rig: Any) -> None:
    rig: Rig = make_rig()
    table, length = rig.table((*rig.text(b"two"), 0, 0))
    rig.descriptor(0, *rig.text(b"one"), 1, 1)
    rig.descriptor(1, table, length, 4 | 2, 0)  # the write flag of a table is ignored
    rig.avail(1, 0)
    (chain,) = rig.device.take()
    assert chain.read() == b"onetwo"


def test_2_8_7_only_the_write_flag_counts_in_a_packed_table(make_rig: Any) -> None:
    rig: Rig = make_rig(packed=True)
    table, length = rig.table((*rig.text(b"one"), 1 | 4 | 0x8000, 9), (*rig.room(4), 2, 99))
    rig.descriptor(0, table, length, 4 | 2 | 1 << 7, 3)
    (chain,) = rig.device.take()
    assert (chain.head, chain.read(), chain.writable_length) == (3, b"one", 4)


def test_2_4_legacy_rings_are_big_endian(make_rig: Any, features: dict[str, bool]) -> None:
    rig: Rig = make_rig(big_endian=True, **features)
    for indirect in (False, True):
        head = rig.offer(b"big", indirect=indirect)
        rig.driver.publish()
        (chain,) = rig.device.take()
        assert chain.read() == b"big"
        rig.device.complete(chain, written=3)
        rig.device.publish()
        assert rig.driver.collect() == [(head, 3)]
    assert rig.used_index() == 2


@pytest.mark.parametrize("size", [1, 32768])
def test_2_7_2_8_10_ring_sizes_at_both_ends(make_rig: Any, packed: bool, size: int) -> None:
    rig: Rig = make_rig(size=size, packed=packed, memory_size=8 << 20, batch=1000)
    buffer = rig.text(b"hi")
    offered = [rig.driver.add([buffer]) for _ in range(size)]
    assert rig.driver.free == 0
    assert rig.driver.publish()
    found: list[int] = []
    while batch := rig.device.cycle():
        found += [entry[0] for entry in DONE.iter_unpack(batch.done)]
    assert found == offered
    assert [head for head, _ in rig.driver.collect()] == offered


def test_2_8_10_a_packed_ring_may_have_any_size(make_rig: Any) -> None:
    with pytest.raises(UsageError):
        make_rig(size=12)
    for size in (3, 12, 32767):
        rig: Rig = make_rig(size=size, packed=True, memory_size=8 << 20)
        for _ in range(2 * size + 1 if size < 100 else 3):
            head = rig.offer()
            rig.driver.publish()
            (chain,) = rig.device.take()
            rig.device.complete(chain)
            rig.device.publish()
            assert rig.driver.collect() == [(head, 0)]


def test_an_address_of_a_record_names_the_guest(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    address, length = rig.text(b"data")
    rig.driver.add([(address, length)])
    rig.driver.publish()
    (chain,) = rig.device.take()
    (segment,) = chain.segments
    assert (segment.guest, segment.length, segment.writable) == (address, length, False)
    assert segment.guest >= GUEST


def test_a_stopped_ring_is_not_touched(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    rig.offer_many(3)
    batch = rig.device.take()
    before = rig.memory.read(rig.ring, rig.layout.size)
    rig.device.stop()
    for chain in list(batch):
        rig.device.complete(chain)
    assert not rig.device.publish()
    assert rig.device.in_flight == 0
    assert not rig.device.take()
    assert rig.memory.read(rig.ring, rig.layout.size) == before
