"""In-flight records (vhost-user, "Inflight I/O tracking"): kept, and recovered after any death."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from virtqueue_rig import Rig

from virtqueue import InflightRegion, QueueBroken, Reason, UsageError, inflight_size
from virtqueue.engine.inflight import PackedRegion, PackedState, SplitRegion, SplitState
from virtqueue.engine.python.packed_inflight import PackedInflight
from virtqueue.engine.python.split_inflight import SplitInflight
from virtqueue.memory import access


def test_the_layouts_are_those_of_the_specification() -> None:
    def layout(kind: Any) -> dict[str, tuple[int, int]]:
        return {
            name: (getattr(kind, name).offset, getattr(kind, name).size)
            for name, *_ in kind._fields_
        }

    assert layout(SplitRegion) == {
        "features": (0, 8),
        "version": (8, 2),
        "desc_num": (10, 2),
        "last_batch_head": (12, 2),
        "used_idx": (14, 2),
    }
    assert layout(SplitState) == {
        "inflight": (0, 1),
        "padding": (1, 5),
        "next": (6, 2),
        "counter": (8, 8),
    }
    assert layout(PackedRegion) == {
        "features": (0, 8),
        "version": (8, 2),
        "desc_num": (10, 2),
        "free_head": (12, 2),
        "old_free_head": (14, 2),
        "used_idx": (16, 2),
        "old_used_idx": (18, 2),
        "used_wrap_counter": (20, 1),
        "old_used_wrap_counter": (21, 1),
        "padding": (22, 7),
    }
    assert layout(PackedState) == {
        "inflight": (0, 1),
        "padding": (1, 1),
        "next": (2, 2),
        "last": (4, 2),
        "num": (6, 2),
        "counter": (8, 8),
        "id": (16, 2),
        "flags": (18, 2),
        "len": (20, 4),
        "addr": (24, 8),
    }
    assert (ctypes.sizeof(PackedRegion), ctypes.sizeof(PackedState)) == (32, 32)
    assert (ctypes.sizeof(SplitRegion), ctypes.sizeof(SplitState)) == (16, 16)
    assert inflight_size(128, packed=False) == 16 + 128 * 16 + 48
    assert inflight_size(128, packed=True) % 64 == 0


def states(rig: Rig) -> list[int]:
    """Heads (packed: buffer ids) that the region says are in flight, oldest first."""
    assert rig.inflight is not None
    size = rig.config.size
    if rig.config.packed:
        array: Any = (PackedState * size).from_address(rig.inflight.address + 32)
        marked = [(state.counter, array[state.last].id) for state in array if state.inflight]
    else:
        array = (SplitState * size).from_address(rig.inflight.address + 16)
        marked = [(state.counter, head) for head, state in enumerate(array) if state.inflight]
    return [head for _, head in sorted(marked)]


def test_taking_marks_and_completing_clears(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, inflight=True)
    ids = rig.offer_many(4)
    assert states(rig) == []
    rig.device.take(3)
    assert states(rig) == ids[:3]
    rig.device.rewind(1)
    assert states(rig) == ids[:2]
    rig.device.take()
    assert states(rig) == ids
    rig.device.complete(ids[2])
    assert states(rig) == ids
    rig.device.publish()
    assert states(rig) == [ids[0], ids[1], ids[3]]
    rig.device.complete(ids[0])
    rig.device.complete(ids[3])
    rig.device.publish()
    assert states(rig) == [ids[1]]


def test_a_successor_takes_the_open_chains_again_in_order(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(size=16, packed=packed, inflight=True)
    ids = rig.offer_many(3) + rig.offer_many(4, indirect=True)
    rig.device.take(6)
    for head in (ids[4], ids[0], ids[2]):
        rig.device.complete(head)
    rig.device.publish()
    # No good-bye, and a base that is wrong: neither counts.
    rig.device = rig.new_device(base=1 if not packed else 0x8001_8001)
    assert (rig.device.resubmitted, rig.device.in_flight) == (3, 0)
    batch = rig.device.take()
    assert [chain.head for chain in batch] == [ids[1], ids[3], ids[5], ids[6]]
    assert [chain.resubmitted for chain in batch] == [True, True, True, False]
    assert [chain.read() for chain in batch] == [b"hello"] * 4
    assert not rig.device.take()
    rig.device.rewind(0)
    for head in (ids[6], ids[3], ids[5], ids[1]):
        rig.device.complete(head, written=9)
    assert rig.device.publish()
    collected = rig.driver.collect()
    assert [head for head, _ in collected] == [ids[n] for n in (4, 0, 2, 6, 3, 5, 1)]
    assert rig.driver.free == 16
    assert states(rig) == []


def test_resubmitted_chains_can_be_rewound(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, inflight=True, size=16)
    ids = rig.offer_many(4)
    rig.device.take(3)
    rig.device = rig.new_device()
    assert [chain.head for chain in rig.device.take()] == ids
    rig.device.rewind(3)
    assert rig.device.resubmitted == 2
    assert states(rig) == ids[:3]
    assert [chain.head for chain in rig.device.take()] == ids[1:]
    for head in ids:
        rig.device.complete(head)
    rig.device.publish()
    assert [head for head, _ in rig.driver.collect()] == ids


def test_in_order_holds_over_a_restart(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, inflight=True, in_order=True, size=16)
    ids = rig.offer_many(4)
    rig.device.take(3)
    rig.device.complete(ids[1])
    assert not rig.device.publish()
    rig.device = rig.new_device()
    assert [chain.head for chain in rig.device.take()] == ids
    for head in reversed(ids):
        rig.device.complete(head)
    rig.device.publish()
    assert [head for head, _ in rig.driver.collect()] == ids


def test_a_region_that_makes_no_sense_breaks_the_queue(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, inflight=True, size=16)
    rig.offer_many(3)
    rig.device.take()
    assert rig.inflight_bytes is not None
    random_ = random.Random(5)
    good = bytes(rig.inflight_bytes)
    for round_ in range(300):
        rig.inflight_bytes[:] = good
        for _ in range(random_.randint(1, 6)):
            rig.inflight_bytes[random_.randrange(8, 160)] = random_.randrange(256)
        device = rig.new_device()
        try:
            for _ in range(4):
                device.take()
        except QueueBroken as broken:
            reason = broken.reason
            if round_ == 0:
                assert reason in Reason
        device.close()
    rig.inflight_bytes[:] = good
    rig.inflight_bytes[8] = 9
    with pytest.raises(QueueBroken) as caught:
        rig.new_device().take()
    assert caught.value.reason == Reason.INFLIGHT


def test_a_region_that_is_too_small_or_misaligned(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, inflight=True)
    assert rig.inflight is not None
    small = InflightRegion(rig.inflight.address, 100, rig.inflight.owner)
    with pytest.raises(QueueBroken) as caught:
        rig.new_device(inflight=small).take()
    assert caught.value.reason == Reason.INFLIGHT
    with pytest.raises(UsageError):
        InflightRegion(rig.inflight.address + 4, 100)


# Death between any two stores.


class Killed(BaseException):
    """The process died here."""


class Stores:
    """Counts the engine's stores to shared memory and dies before one of them."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.count = 0

    def store(self) -> None:
        self.count += 1
        if self.left is not None:
            if not self.left:
                raise Killed
            self.left -= 1


class WatchedArray:
    def __init__(self, array: Any, stores: Stores, kind: Any = None) -> None:
        self._array = array
        self._stores = stores
        self._kind = kind

    def __getitem__(self, index: int) -> Any:
        item = self._array[index]
        return WatchedStruct(item, self._stores) if self._kind else item

    def __setitem__(self, index: int, value: int) -> None:
        self._stores.store()
        self._array[index] = value

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self._array)))


class WatchedStruct:
    def __init__(self, item: Any, stores: Stores) -> None:
        object.__setattr__(self, "item", item)
        object.__setattr__(self, "stores", stores)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.item, name)

    def __setattr__(self, name: str, value: int) -> None:
        self.stores.store()
        setattr(self.item, name, value)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    watch = Stores()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **named: WatchedArray(function(*a, **named), watch)

    # The engines only: a driver that is under test would die too.
    for name in ("split", "packed"):
        module = sys.modules[f"virtqueue.engine.python.{name}"]
        patched = SimpleNamespace(**vars(access))
        patched.words16, patched.words32 = wrap(access.words16), wrap(access.words32)
        monkeypatch.setattr(module, "access", patched)

    for kind in (SplitInflight, PackedInflight):
        original = kind.__init__

        def patched_init(self: Any, *arguments: Any, original: Any = original) -> None:
            original(self, *arguments)
            self._region = WatchedStruct(self._region, watch)
            self._states = WatchedArray(self._states, watch, kind=True)
            if hasattr(self, "_position"):
                self._position = WatchedArray(self._position, watch)

        monkeypatch.setattr(kind, "__init__", patched_init)
    return watch


class Story:
    """A driver that counts what it gets back, through the deaths of its devices."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.buffers: dict[int, tuple[int, Any]] = {}
        self.number = 0
        self.returned: list[int] = []
        self.free = [(rig.room(8), rig.room(16)) for _ in range(rig.config.size)]

    def offer(self) -> None:
        driver = self.rig.driver
        while driver.free >= 3 and self.free and self.random.random() < 0.8:
            text, room = self.free.pop(0)
            self.number += 1
            self.rig.memory.write(text[0], self.number.to_bytes(8, "little"))
            self.rig.memory.write(room[0], bytes(16))
            parts = self.random.choice([[text], [(text[0], 3), (text[0] + 3, 5)]])
            head = driver.add(parts, [room], indirect=self.random.random() < 0.3)
            assert head not in self.buffers
            self.buffers[head] = (self.number, (text, room))
        driver.publish()

    def collect(self) -> None:
        for head, written in self.rig.driver.collect():
            number, slot = self.buffers.pop(head)
            self.free.append(slot)
            assert written == 8
            assert self.rig.memory.read(slot[1][0], 8) == number.to_bytes(8, "little")
            self.returned.append(number)

    def serve(self, device: Any, rounds: int) -> None:
        held: list[Any] = []
        for _ in range(rounds):
            self.offer()
            held += list(device.take(self.random.randint(1, 3)))
            self.random.shuffle(held)
            for _ in range(self.random.randint(0, len(held))):
                chain = held.pop()
                chain.write(chain.read())
                device.complete(chain)
            device.publish()
            if self.random.random() < 0.4:
                device.give_back(self.random.sample(held, self.random.randint(0, len(held))))
                held = [chain for chain in held if not chain.completed]
            self.collect()
        self.finish(device, held)

    def finish(self, device: Any, held: list[Any]) -> None:
        while True:
            held += list(device.take())
            for chain in held:
                chain.write(chain.read())
                device.complete(chain)
            device.publish()
            self.collect()
            if not held:
                break
            held = []
        assert not self.buffers
        assert sorted(self.returned) == list(range(1, self.number + 1))


def run(make_rig: Any, stores: Stores, packed: bool, seed: int, deaths: list[int]) -> bool:
    """Whether every death came before the end."""
    # A direct chain fills a ring of three: then only the wrap counter tells that it moved.
    size = (4, 7, 3)[seed % 3] if packed else 4
    rig: Rig = make_rig(
        packed=packed,
        inflight=True,
        device=False,
        size=size,
        event_idx=bool(seed & 1),
        in_order=seed % 3 == 0,
    )
    story = Story(rig, seed)
    died = 0
    for death in [*deaths, None]:
        stores.left = death
        try:
            device = rig.new_device(base=None)
            story.serve(device, 16)
            if death is not None:
                stores.left = None
                break
        except Killed:
            died += 1
            story.collect()
    stores.left = None
    device = rig.new_device(base=None)
    story.serve(device, 2 * size)
    assert not states(rig)
    rig.close()
    return died == len(deaths)


@pytest.mark.parametrize("seed", range(3))
def test_death_before_every_store(
    make_python_rig: Any, stores: Stores, packed: bool, seed: int
) -> None:
    death = 0
    while run(make_python_rig, stores, packed, seed, [death]):
        death += 1
    assert death > 60


def test_death_again_during_recovery(make_python_rig: Any, stores: Stores, packed: bool) -> None:
    random_ = random.Random(99)
    for _ in range(120):
        deaths = [random_.randint(0, 120), random_.randint(0, 15), random_.randint(0, 15)]
        run(make_python_rig, stores, packed, random_.randrange(1000), deaths)


def test_sigkill_at_random_instants(engine: str, packed: bool) -> None:
    script = Path(__file__).parent / "crash_ring.py"
    arguments = ["--kills", "25", "--engine", engine, *(["--packed"] if packed else [])]
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
