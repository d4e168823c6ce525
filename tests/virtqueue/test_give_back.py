"""Takes that are undone: the position goes back, and the driver sees nothing of it."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
from virtqueue_rig import Rig

from virtqueue import Chain, ChainCompleted, Counters, QueueBroken, UsageError


def heads(batch: Any) -> list[int]:
    return [chain.head for chain in batch]


def test_the_latest_takes_are_undone_and_taken_again(make_rig: Any, packed: bool) -> None:
    counters = Counters()
    rig: Rig = make_rig(packed=packed, size=16, device=False)
    device = rig.new_device(counters=counters)
    ids = rig.offer_many(5)
    batch = device.take()
    chains = list(batch)
    before = device.base
    assert device.give_back([chains[3], ids[4]]) == ids[3:]
    assert (before - device.base) & 0x7FFF == (4 if packed else 2)
    assert (device.in_flight, device.taken, counters.requests) == (3, 3, 3)
    assert chains[3].completed
    assert rig.memory.pins == 3
    with pytest.raises(ChainCompleted):
        chains[3].read()
    # What is left of the batch is the next cycle's.
    assert heads(device.cycle()) == ids[3:]
    assert [head for head, _ in rig.driver.collect()] == ids[:3]
    device.cycle()
    assert [head for head, _ in rig.driver.collect()] == ids[3:]


def test_an_older_chain_stays_in_flight(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, size=16)
    ids = rig.offer_many(4)
    rig.device.take()
    base = rig.device.base
    assert rig.device.give_back([ids[0], ids[2]]) == []
    assert rig.device.give_back([ids[0], ids[1], ids[3]]) == [ids[3]]
    rig.device.complete(ids[2])
    rig.device.publish()
    # Something that was taken after them has been completed.
    assert rig.device.give_back(ids[:2]) == []
    assert rig.device.base & 0x7FFF == (base & 0x7FFF) - (2 if packed else 1)
    assert rig.device.in_flight == 2
    rig.device.complete(ids[0])
    rig.device.complete(ids[1])
    rig.device.publish()
    assert heads(rig.device.take()) == ids[3:]
    rig.device.cycle()
    assert [head for head, _ in rig.driver.collect()] == [ids[n] for n in (2, 0, 1, 3)]


def test_a_completion_that_waits_for_an_older_one_counts(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, size=16, in_order=True)
    ids = rig.offer_many(3)
    rig.device.take()
    rig.device.complete(ids[1])
    assert not rig.device.publish()
    assert rig.device.give_back([ids[0], ids[2]]) == [ids[2]]
    assert rig.device.give_back([ids[0]]) == []
    rig.device.complete(ids[0])
    rig.device.publish()
    assert heads(rig.device.take()) == ids[2:]
    rig.device.cycle()
    assert [head for head, _ in rig.driver.collect()] == ids


def test_what_is_not_in_flight_is_refused(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, size=16)
    ids = rig.offer_many(3)
    chains = list(rig.device.take(2))
    rig.device.complete(chains[1])
    for wrong in (chains[1], chains[1].head):
        with pytest.raises(ChainCompleted):
            rig.device.give_back([ids[0], wrong])
    rig.device.publish()
    other: Rig = make_rig(packed=packed, size=16)
    other.offer_many(1)
    (foreign,) = other.device.take()
    for strange in (foreign, ids[1], ids[2], -1, 16, 1 << 16):
        with pytest.raises(UsageError):
            rig.device.give_back([ids[0], strange])
    assert rig.device.in_flight == 1
    assert rig.device.give_back([]) == []
    rig.device.stop()
    assert rig.device.give_back([ids[0]]) == []


def test_chains_of_the_in_flight_region_go_back_there(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, size=16, inflight=True)
    ids = rig.offer_many(4)
    rig.device.take(2)
    rig.device = rig.new_device()
    start = rig.device.base
    chains = list(rig.device.take())
    assert [chain.resubmitted for chain in chains] == [True, True, False, False]
    assert rig.device.give_back(chains[1:]) == ids[1:]
    assert (rig.device.base, rig.device.in_flight, rig.device.resubmitted) == (start, 1, 1)
    # A process that dies now leaves the first two in the region, and no other.
    rig.device = rig.new_device()
    assert (rig.device.base, rig.device.resubmitted) == (start, 2)
    again = list(rig.device.take())
    assert heads(again) == ids
    assert [chain.resubmitted for chain in again] == [True, True, False, False]
    rig.device.cycle()
    assert [head for head, _ in rig.driver.collect()] == ids


def test_on_a_queue_that_a_wrong_chain_broke_the_right_ones_go_back(
    make_rig: Any, packed: bool
) -> None:
    rig: Rig = make_rig(packed=packed, size=16)
    ids = rig.offer_many(2)
    rig.driver.add([(1 << 60, 4)])
    rig.driver.publish()
    start = rig.device.base
    assert heads(rig.device.take()) == ids
    with pytest.raises(QueueBroken):
        rig.device.take()
    assert rig.device.give_back(ids) == ids
    assert rig.device.base == start


class Model:
    """A driver's and a device's random life; what each is to see is kept in plain lists."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.number = 0
        self.texts = [rig.room(8) for _ in range(256)]
        self.offered: dict[int, int] = {}
        """Number by head, of what the driver has not collected."""
        self.waiting: deque[int] = deque()
        """Numbers of what has not been taken, in the order of the ring."""
        self.history: list[list[Any]] = []
        """[number, head, chain or None, state] of what was taken, oldest first."""
        self.completed: list[int] = []
        self.collected: list[int] = []

    @property
    def flying(self) -> list[list[Any]]:
        return [entry for entry in self.history if entry[3] == "flying"]

    def offer(self) -> None:
        driver = self.rig.driver
        while driver.free >= 3 and self.random.random() < 0.7:
            self.number += 1
            text = self.texts[self.number % len(self.texts)]
            self.rig.memory.write(text[0], self.number.to_bytes(8, "little"))
            pieces = self.random.randint(0, 2)
            indirect = self.random.random() < 0.4
            room = [self.rig.room(1) for _ in range(pieces)]
            self.rig.next -= 16 * pieces
            head = driver.add([text], room, indirect)
            self.offered[head] = self.number
            self.waiting.append(self.number)
        driver.publish()

    def take(self) -> None:
        device = self.rig.device
        limit = self.random.choice([None, 1, 2, 3])
        for chain in device.take(limit):
            assert chain.head in self.offered
            number = int.from_bytes(chain.read(8), "little")
            assert number == self.waiting.popleft() == self.offered[chain.head]
            self.history.append([number, chain.head, chain, "flying"])

    def complete(self) -> None:
        device = self.rig.device
        for entry in self.random.sample(self.flying, len(self.flying)):
            if self.random.random() < 0.4:
                device.complete(self.random.choice(entry[1:3]), written=0)
                entry[3] = "completed"
                self.completed.append(entry[0])
                if self.random.random() < 0.3:
                    device.publish()
        device.publish()

    def expected(self, named: list[list[Any]]) -> list[list[Any]]:
        suffix: list[list[Any]] = []
        for entry in reversed(self.history):
            if entry not in named:
                break
            suffix.insert(0, entry)
        return suffix

    def give_back(self, everything: bool = False) -> None:
        device = self.rig.device
        named = [e for e in self.flying if everything or self.random.random() < 0.7]
        expected = self.expected(named)
        self.random.shuffle(named)
        given = device.give_back([self.random.choice(entry[1:3]) for entry in named])
        assert given == [entry[1] for entry in expected]
        for entry in reversed(expected):
            assert isinstance(entry[2], Chain)
            assert entry[2].completed
            self.waiting.appendleft(entry[0])
            self.history.remove(entry)
        assert device.in_flight == len(self.flying) + self.held()

    def held(self) -> int:
        """Completed, and held back for an older one."""
        if not self.rig.config.in_order:
            return 0
        return sum(
            entry[3] == "completed" and any(e[3] == "flying" for e in self.history[:place])
            for place, entry in enumerate(self.history)
        )

    def collect(self) -> None:
        for head, _ in self.rig.driver.collect():
            self.collected.append(self.offered.pop(head))

    def restart(self) -> None:
        """A stop, and a start from where it said it stopped."""
        rig, device = self.rig, self.rig.device
        self.give_back(everything=True)
        if rig.inflight is None or self.random.random() < 0.5:
            for entry in self.flying:
                device.complete(entry[1], written=0)
                self.completed.append(entry[0])
            device.publish()
            self.history.clear()
            assert not device.in_flight
        base, marked = device.base, device.resubmitted
        device.close()
        self.collect()
        rig.device = rig.new_device(base=base)
        if rig.inflight is None:
            return
        # What the region has is taken again first: all that the driver was not given back, and what
        # was given back to the region.
        open_ = [entry[0] for entry in self.history if entry[0] in self.offered.values()]
        assert rig.device.resubmitted == len(open_) + marked
        self.waiting.extendleft(reversed(open_))
        self.completed = [number for number in self.completed if number not in open_]
        self.history.clear()
        assert rig.device.base == base

    def run(self, steps: int) -> None:
        actions = [self.offer, self.take, self.complete, self.give_back, self.collect, self.restart]
        for _ in range(steps):
            self.random.choices(actions, [3, 4, 3, 2, 2, 1])[0]()
        while self.waiting or self.flying:
            self.take()
            self.complete()
            self.collect()
        self.collect()
        assert sorted(self.collected) == list(range(1, self.number + 1))
        if self.rig.config.in_order:
            assert self.collected == sorted(self.collected)
        else:
            assert self.collected == self.completed


@pytest.mark.parametrize("inflight", [False, True], ids=["alone", "inflight"])
def test_nothing_is_lost_repeated_or_reordered(
    make_rig: Any, packed: bool, inflight: bool, features: dict[str, bool]
) -> None:
    for seed in range(8):
        for size in (4, 16) if not packed else (5, 16):
            rig: Rig = make_rig(packed=packed, size=size, inflight=inflight, **features)
            Model(rig, seed).run(150)
            rig.close()
