"""Rings behind an IOMMU that lie on pages all over guest memory."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from virtqueue_rig import GUEST, USER, logged_pages

from guest_memory import (
    DirtyLog,
    GuestAddress,
    GuestMemory,
    Iotlb,
    Iova,
    Region,
    UserAddress,
    allocate_memfd,
)
from guest_memory.linux import syscalls
from virtqueue import (
    DeviceQueue,
    DriverQueue,
    Need,
    QueueBroken,
    Reason,
    RingConfig,
    ring_layout,
)
from virtqueue.memory.joined import Joined
from virtqueue.memory.table import Broken, Piece

PAGE = 4096
PAGES = 256
SIZE = 1024
"""Descriptors: four pages of a split ring's, and of a packed one."""


class Scattered:
    """A driver and a device that see the pages of one memory in another order than it has them."""

    def __init__(
        self, engine: str, packed: bool, *, memory: Any = None, log: Any = None, **config: Any
    ) -> None:
        self.rng = random.Random(7)
        self.plain = (
            memory or GuestMemory.allocate(PAGES * PAGE, guest_address=GUEST, user_address=USER)[0]
        )
        self.layout = ring_layout(SIZE, packed)
        self.order = self.rng.sample(range(PAGES), PAGES)
        self.tlb = Iotlb()
        for number in range(PAGES):
            self.map(number)
        start = 48  # within the first page
        self.config = RingConfig(
            SIZE,
            start + self.layout.descriptor,
            start + self.layout.driver,
            start + self.layout.device,
            packed=packed,
            iommu=True,
            **config,
        )
        self.driver = DriverQueue(self.config, self.plain.with_iotlb(self.tlb))
        self.device = DeviceQueue(
            self.config, self.plain.with_iotlb(self.tlb), engine=engine, log=log
        )
        self.offered = 0

    def map(self, number: int) -> None:
        user = UserAddress(USER + self.order[number] * PAGE)
        self.tlb.insert(Iova(number * PAGE), PAGE, user, 3)

    def guest(self, iova: int) -> GuestAddress:
        return GuestAddress(GUEST + self.order[iova // PAGE] * PAGE + iova % PAGE)

    def whole(self) -> bytes:
        return self.plain.read(GuestAddress(GUEST), PAGES * PAGE)

    def buffer(self) -> int:
        """An IOVA of 16 bytes behind the ring."""
        first = (48 + self.layout.size) // PAGE + 1
        turn, page = divmod(self.offered, PAGES - first)
        self.offered += 1
        return (first + page) * PAGE + turn * 16 % PAGE

    def serve(self, count: int) -> None:
        """Each request is a number, and its answer the number's complement."""
        numbers = []
        for _ in range(count):
            request, answer = self.buffer(), self.buffer()
            number = self.rng.getrandbits(64)
            self.plain.write(self.guest(request), number.to_bytes(8, "little"))
            head = self.driver.add([(request, 8)], [(answer, 8)])
            numbers.append((head, number, answer))
        self.driver.publish()
        done: list[tuple[int, int]] = []
        while len(done) < count:
            for chain in list(self.device.take()):
                number = int.from_bytes(chain.read(), "little")
                chain.write((~number & (1 << 64) - 1).to_bytes(8, "little"))
                self.device.complete(chain)
            self.device.publish()
            done += self.driver.collect()
        assert done == [(head, 8) for head, _, _ in numbers]
        for _, number, answer in numbers:
            found = int.from_bytes(self.plain.read(self.guest(answer), 8), "little")
            assert found == ~number & (1 << 64) - 1


@pytest.fixture
def scattered(engine: str, packed: bool) -> Iterator[Any]:
    made: list[Scattered] = []

    def make(**settings: Any) -> Scattered:
        made.append(Scattered(engine, packed, **settings))
        return made[-1]

    yield make
    for one in made:
        one.device.close()


def joined() -> int:
    """Mappings of guest memory in this process."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:")


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_ring_of_scattered_pages_is_served_round_and_round(
    scattered: Any, event_idx: bool
) -> None:
    one: Scattered = scattered(event_idx=event_idx)
    for count in (1, 300, 500, 7, 512, 400, 511, 512):
        one.serve(count)


def test_its_pages_are_logged_and_no_others(scattered: Any, packed: bool) -> None:
    log = DirtyLog(allocate_memfd(64 << 10), 64 << 10)
    start = 48 + ring_layout(SIZE, packed).device
    one: Scattered = scattered(log=log, log_used=start)
    one.serve(3)
    one.device.disable_notification()
    spread = set()
    logged_pages(log)
    for count in (1, 200, 500, 37, 300, 511):
        request = [(one.buffer(), 8)]
        for _ in range(count):
            one.driver.add(request, indirect=False)
        one.driver.publish()
        batch = one.device.take(0)
        before = one.whole()
        left = count
        while left:
            batch = one.device.cycle(min(left, 128))
            left -= len(batch)
        one.device.cycle(0)
        after = one.whole()
        changed = {
            GUEST // PAGE + page
            for page in range(PAGES)
            if before[page * PAGE : (page + 1) * PAGE] != after[page * PAGE : (page + 1) * PAGE]
        }
        found = logged_pages(log)
        spread |= changed
        assert changed <= found
        assert found <= {
            one.guest(start + offset) // PAGE for offset in range(0, 6 + 8 * SIZE, 2)
        } | {one.guest(48 + offset) // PAGE for offset in range(0, 16 * SIZE * packed, 16)}
        assert len(one.driver.collect()) == count
    assert len(spread) > 2
    log.close()


def test_it_stays_mapped_while_others_change(scattered: Any) -> None:
    one: Scattered = scattered()
    one.serve(100)
    mappings = joined()
    for number in (PAGES - 1, PAGES - 2, PAGES - 1):
        one.tlb.invalidate(Iova(number * PAGE), PAGE)
        one.device.set_memory(one.plain.with_iotlb(one.tlb))
        one.map(number)
        one.device.set_memory(one.plain.with_iotlb(one.tlb))
        one.serve(10)
    assert joined() == mappings


def test_it_is_followed_when_its_pages_go_elsewhere(scattered: Any) -> None:
    one: Scattered = scattered()
    assert not one.device.take()
    one.tlb.invalidate(Iova(0), PAGES * PAGE)
    one.device.set_memory(one.plain.with_iotlb(one.tlb))
    with pytest.raises(Need):
        one.device.take()
    one.plain.write(GuestAddress(GUEST), bytes(PAGES * PAGE))
    one.rng.shuffle(one.order)
    for number in range(PAGES):
        one.map(number)
    memory = one.plain.with_iotlb(one.tlb)
    one.device.set_memory(memory)
    one.driver = DriverQueue(one.config, memory)
    one.serve(400)


def test_what_was_mapped_for_it_goes_with_it(engine: str, packed: bool) -> None:
    before = joined()
    one = Scattered(engine, packed)
    one.serve(10)
    assert joined() > before + 1
    one.device.close()
    del one
    assert joined() == before


def test_pages_that_do_not_meet_at_their_ends_are_refused(engine: str, packed: bool) -> None:
    one = Scattered(engine, packed)
    tlb = Iotlb()
    tlb.insert(Iova(0), 0x800, UserAddress(USER), 3)
    tlb.insert(Iova(0x800), PAGES * PAGE - 0x1000, UserAddress(USER + 0x810), 3)
    device = DeviceQueue(one.config, one.plain.with_iotlb(tlb), engine=engine)
    with pytest.raises(QueueBroken) as caught:
        device.take()
    assert caught.value.reason is Reason.RING_MEMORY


def test_memory_that_may_vanish_unguarded_is_not_mapped_twice(packed: bool) -> None:
    one = Scattered("python", packed)
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, PAGES * PAGE)
    region = Region(GuestAddress(GUEST), PAGES * PAGE, UserAddress(USER))
    memory = GuestMemory.map([(region, fd)])
    device = DeviceQueue(one.config, memory.with_iotlb(one.tlb), engine="python")
    with pytest.raises(QueueBroken) as caught:
        device.take()
    assert caught.value.reason is Reason.RING_MEMORY
    os.close(fd)


TRUNCATED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from guest_memory import GuestMemory, MmapMapper, Region
from test_scattered import GUEST, PAGE, PAGES, USER, Scattered
from virtqueue import QueueBroken, Reason, SigbusGuard

assert SigbusGuard.install()
fd = os.memfd_create("unsealed")
os.ftruncate(fd, PAGES * PAGE)
regions = [(Region(GUEST, PAGES * PAGE, USER), fd)]
memory = GuestMemory.map(regions, mapper=MmapMapper(guarded=True))
SigbusGuard.watch(memory)
one = Scattered(sys.argv[2], sys.argv[3] == "packed", memory=memory)
one.serve(10)
os.ftruncate(fd, 0)
try:
    one.device.take()
    one.device.take()
except QueueBroken as error:
    assert error.reason is Reason.TRUNCATED, error
    print("fine")
"""


def test_memory_that_vanishes_breaks_the_queue(engine: str, packed: bool) -> None:
    if not _guard_available():
        pytest.skip("this installation has no SIGBUS guard")
    kind = "packed" if packed else "split"
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED, str(Path(__file__).parent), engine, kind],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def _guard_available() -> bool:
    from virtqueue import SigbusGuard

    return SigbusGuard.available()


def test_a_hole_that_a_refused_mapping_leaves_is_not_unmapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel may remove what is at a place and then refuse: the place is not held any more."""
    memory, fd = GuestMemory.allocate(4 * PAGE)
    os.close(fd)
    host = memory.translate(GuestAddress(0), 4 * PAGE)
    pieces = [Piece(host + n * PAGE, n * PAGE, PAGE, 0, None) for n in (0, 2)]
    strangers: list[int] = []
    real = syscalls._mremap

    def refuse(old: int, old_size: int, size: int, flags: int, target: int) -> int:
        if target and strangers == []:
            syscalls.unmap_memory(target, size)
            got = syscalls.map_memory(target, size, 3, 0x100022, -1, 0)  # MAP_FIXED_NOREPLACE
            assert got == target
            ctypes.c_uint8.from_address(target).value = 42
            strangers.append(target)
            return ctypes.c_size_t(-1).value
        return int(real(old, old_size, size, flags, target))

    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "_mremap", refuse)
        with pytest.raises(Broken):
            Joined(pieces)
    gc.collect()
    (place,) = strangers
    assert ctypes.c_uint8.from_address(place).value == 42
    syscalls.unmap_memory(place, PAGE)
