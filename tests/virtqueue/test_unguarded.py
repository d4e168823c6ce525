"""Memory that a front-end may truncate, where no SIGBUS guard is installed.

The library of the C engine, which holds the guard, is hidden in these processes; everything that
is touched directly after a truncation would end them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from virtqueue_rig import GUEST, USER, Rig

from guest_memory import (
    GuestAddress,
    GuestMemory,
    Region,
    SharedMapping,
    UserAddress,
    atomic_flip,
    store_halfword,
)
from virtqueue import (
    DriverQueue,
    EngineUnavailable,
    InflightRegion,
    QueueBroken,
    Reason,
    UsageError,
    inflight_size,
)
from virtqueue.memory import access

SIZE = 1 << 20


@pytest.fixture
def make_rig() -> Iterator[Any]:
    rigs: list[Rig] = []

    def make(**settings: Any) -> Rig:
        fd = os.memfd_create("unsealed")
        os.ftruncate(fd, SIZE)
        region = Region(GuestAddress(GUEST), SIZE, UserAddress(USER))
        memory = GuestMemory.map([(region, fd)])
        assert memory.window is None
        rig = Rig(memory=memory, engine="python", **settings)
        rig.fd = fd
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()


def test_a_ring_works_through_the_kernel(
    make_rig: Any, packed: bool, features: dict[str, bool]
) -> None:
    rig = make_rig(packed=packed, **features)
    for turn in range(30):
        text = b"%d " % turn * 20
        offered = [rig.offer(text, room=100, indirect=turn % 3 == 0) for _ in range(3)]
        rig.driver.publish()
        batch = rig.device.take()
        assert len(batch) == 3
        for chain in batch:
            assert chain.read() == text
            if turn % 2:
                chain.write(text.upper())
            else:
                chain.writable[0][: len(text)] = text.upper()
        if turn % 2:
            for chain in list(batch):
                rig.device.complete(chain)
            rig.device.publish()
        else:
            rig.device.cycle()
        assert [head for head, _ in rig.driver.collect()] == offered
        written = rig.memory.read(rig.next - 112, len(text))
        assert written == text.upper()


def test_what_views_do_not_touch_stays(make_rig: Any, packed: bool) -> None:
    rig = make_rig(packed=packed)
    readable, writable = rig.text(b"r" * 20), rig.room(64, b"w" * 64)
    rig.driver.add([readable], [writable])
    rig.driver.publish()
    chain = rig.device.take()[0]
    chain.writable[0][8:16] = b"12345678"
    with pytest.raises(TypeError):
        chain.readable[0][0] = 1
    assert rig.memory.read(writable[0], 64) == b"w" * 64
    rig.device.complete(chain, 64)
    assert rig.memory.read(writable[0], 64) == b"w" * 8 + b"12345678" + b"w" * 48


def test_nothing_is_written_after_a_stop(make_rig: Any, packed: bool) -> None:
    rig = make_rig(packed=packed)
    writable = rig.room(64, b"w" * 64)
    rig.driver.add([], [writable])
    rig.driver.publish()
    chain = rig.device.take()[0]
    chain.writable[0][:] = b"x" * 64
    rig.device.stop()
    rig.device.complete(chain, 64)
    assert rig.memory.read(writable[0], 64) == b"w" * 64


def test_big_endian_rings_are_refused(make_rig: Any) -> None:
    with pytest.raises(UsageError, match="big-endian"):
        make_rig(big_endian=True)
    rig = make_rig()
    device = rig.new_device(config=rig.config._replace(big_endian=True), base=0)
    with pytest.raises(QueueBroken) as broken:
        device.take()
    assert broken.value.reason is Reason.RING_MEMORY


def test_an_available_index_in_the_lower_half_of_a_word_is_refused(make_rig: Any) -> None:
    rig = make_rig()
    config = rig.config._replace(driver_address=rig.config.driver_address + 2)
    with pytest.raises(UsageError, match="odd"):
        DriverQueue(config, rig.memory)


# Words that a partner reads while they change.


@pytest.mark.parametrize("wrap", [0, 1])
def test_a_descriptor_changes_hands_last(monkeypatch: pytest.MonkeyPatch, wrap: int) -> None:
    memory = (ctypes.c_uint16 * 2)(0xBEEF, 0)
    words = access.KernelWords(ctypes.addressof(memory), 2, ctypes.c_uint32(), flags=True)
    seen: list[int] = []

    def watched(address: int, mask: int) -> bool:
        done = atomic_flip(address, mask)
        seen.append(memory[1])
        return done

    monkeypatch.setattr(access, "atomic_flip", watched)
    available = 0x80 if wrap else 0x8000
    used = 0x8080 if wrap else 0
    for kind in range(8):
        for written in (0, 2):
            memory[1] = available | kind
            seen.clear()
            words[1] = used | written
            assert seen == [available | written, used | written]
            assert words[1] == used | written
            assert memory[0] == 0xBEEF


def test_an_index_is_stored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = (ctypes.c_uint16 * 2)(0xBEEF, 0xFFFF)
    words = access.KernelWords(ctypes.addressof(memory), 2, ctypes.c_uint32())
    stored: list[int] = []

    def watched(address: int, value: int) -> bool:
        stored.append(value)
        return store_halfword(address, value)

    monkeypatch.setattr(access, "store_halfword", watched)
    words[1] = 3
    assert stored == [3]
    assert list(memory) == [0xBEEF, 3]


# Truncation.

HIDE = """
import virtqueue.engine.c, virtqueue.c_library, virtqueue.memory.sigbus_guard
def hidden():
    raise ImportError("hidden")
for module in (virtqueue.engine.c, virtqueue.c_library, virtqueue.memory.sigbus_guard):
    module.library = hidden
"""

SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from virtqueue_rig import GUEST, USER, Rig
from guest_memory import GuestMemory, Region
from virtqueue import QueueBroken, Reason, SigbusGuard, available_engines

assert available_engines() == ("python",) and not SigbusGuard.available()
packed, what, when, how = sys.argv[2] == "packed", *sys.argv[3:]
SIZE = 1 << 18
fds = [os.memfd_create(name) for name in ("ring", "data")]
for fd in fds:
    os.ftruncate(fd, SIZE)
memory = GuestMemory.map(
    [(Region(GUEST + i * SIZE, SIZE, USER + i * SIZE), fd) for i, fd in enumerate(fds)]
)
rig = Rig(memory=memory, packed=packed, event_idx=True, size=8)
assert rig.device.engine == "python"
rig.next = GUEST + SIZE
for _ in range(2):
    rig.offer(b"good" * 10, room=5000)
    rig.driver.publish()
    for chain in rig.device.take():
        chain.write(chain.read())
        rig.device.complete(chain)
    rig.device.publish()
assert len(rig.driver.collect()) == 2
tables = how == "table"
for _ in range(2):
    rig.offer(b"gone" * 10, room=5000, indirect=tables)

def truncate():
    os.ftruncate(fds[what == "data"], 0)

def broken(call):
    try:
        call()
    except QueueBroken as error:
        assert error.reason is Reason.TRUNCATED, error
        print("broken")
        raise SystemExit
    raise AssertionError("nothing noticed")

rig.driver.publish()
if when == "before":
    truncate()
    broken(rig.device.take)
if when == "arm":
    rig.device.take()
    truncate()
    broken(lambda: (rig.device.enable_notification(), rig.device.take()))
if when == "driver":
    truncate()
    broken(lambda: (rig.driver.collect(), rig.driver.enable_notification()))
if when == "set":
    truncate()
    device = rig.new_device()
    broken(device.take)
batch = rig.device.take()
chain = batch[0]
if how == "shown":
    chain.writable[0][:100] = bytes(100)
truncate()
if how == "read":
    assert len(chain.read()) == 40
elif how == "write":
    assert chain.write(b"x" * 5000) == 5000
elif how == "view":
    chain.writable[0][:] = b"y" * 5000
    assert not any(bytes(chain.readable[0])) or what == "ring"
if when == "publish":
    rig.device.complete(chain, 0)
    rig.device.publish()
    assert rig.device.broken
broken(rig.device.cycle)
"""


@pytest.mark.parametrize("format_", ["split", "packed"])
@pytest.mark.parametrize(
    ("what", "when", "how"),
    [
        ("ring", "before", "-"),
        ("ring", "before", "table"),
        ("ring", "set", "-"),
        ("ring", "arm", "-"),
        ("ring", "driver", "-"),
        ("ring", "during", "write"),
        ("ring", "publish", "-"),
        ("data", "before", "-"),
        ("data", "during", "read"),
        ("data", "during", "write"),
        ("data", "during", "view"),
        ("data", "during", "shown"),
        ("data", "publish", "write"),
    ],
)
def test_truncation_breaks_the_queue(format_: str, what: str, when: str, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDE + SCRIPT, str(Path(__file__).parent), format_, what, when, how],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "VIRTQUEUE_ENGINE": ""},
    )
    assert (done.returncode, done.stdout) == (0, "broken\n"), (done.returncode, done.stderr)


def test_a_truncated_log_breaks_the_queue(make_python_rig: Any, packed: bool) -> None:
    """The bits are set by the kernel with either guard: a log's file need not be sealed."""
    from guest_memory import DirtyLog

    rig = make_python_rig(packed=packed)
    fd = os.memfd_create("log")
    os.ftruncate(fd, 1 << 18)
    log = DirtyLog(fd, 1 << 18, enabled=True)
    rig.device.set_log(log)
    rig.offer()
    rig.driver.publish()
    chain = rig.device.take()[0]
    os.ftruncate(fd, 0)
    rig.device.complete(chain, 4)
    rig.device.publish()
    assert rig.device.broken is not None
    assert rig.device.broken.reason is Reason.TRUNCATED
    log.close()
    os.close(fd)


# In-flight regions of files that their owner may shorten.


@pytest.fixture
def unsealed_region() -> Iterator[Any]:
    fds: list[int] = []

    def make(size: int, packed: bool) -> tuple[int, InflightRegion]:
        fd = os.memfd_create("inflight")
        fds.append(fd)
        os.ftruncate(fd, 1 << 20)
        mapping = SharedMapping(fd, inflight_size(size, packed), 4096 - 64)
        assert not mapping.direct
        return fd, InflightRegion(
            mapping.address,
            mapping.size,
            mapping,
            poison=mapping.poison_address,
            direct=mapping.direct,
        )

    yield make
    for fd in fds:
        os.close(fd)


def test_records_are_kept_through_the_kernel(
    make_python_rig: Any, packed: bool, unsealed_region: Any
) -> None:
    """They are the bytes that an engine stores which touches the memory itself."""
    direct = make_python_rig(size=16, packed=packed, inflight=True)
    kernel = make_python_rig(size=16, packed=packed, device=False)
    fd, kernel.inflight = unsealed_region(16, packed)
    kernel.device = kernel.new_device()

    def same() -> None:
        there = os.pread(fd, kernel.inflight.size, 4096 - 64)
        assert there == bytes(direct.inflight_bytes)

    for rig in (direct, kernel):
        ids = rig.offer_many(7)
        rig.device.take(6)
        rig.device.rewind(1)
    same()
    for rig in (direct, kernel):
        for index in (4, 0, 2):
            rig.device.complete(ids[index])
        rig.device.publish()
    same()
    for rig in (direct, kernel):
        rig.device = rig.new_device()
        batch = rig.device.take()
        assert [chain.head for chain in batch] == [ids[index] for index in (1, 3, 5, 6)]
        assert [chain.resubmitted for chain in batch] == [True, True, False, False]
        for chain in list(batch):
            rig.device.complete(chain)
        rig.device.publish()
        assert len(rig.driver.collect()) == 7
    same()


def test_only_the_python_engine_takes_records_that_may_vanish(
    make_python_rig: Any, packed: bool, unsealed_region: Any
) -> None:
    rig = make_python_rig(size=16, packed=packed, device=False)
    _, rig.inflight = unsealed_region(16, packed)
    with pytest.raises(EngineUnavailable):
        rig.new_device(engine="c")
    assert rig.new_device(engine="python").engine == "python"


@pytest.mark.parametrize("when", ["before", "take", "rewind", "publish", "recover"])
def test_truncated_records_break_the_queue(
    make_python_rig: Any, packed: bool, unsealed_region: Any, when: str
) -> None:
    rig = make_python_rig(size=16, packed=packed, device=False)
    fd, rig.inflight = unsealed_region(16, packed)
    if when == "before":
        os.ftruncate(fd, 0)
    device = rig.new_device()
    rig.offer_many(4)
    if when == "take":
        os.ftruncate(fd, 0)
    if when in ("rewind", "publish", "recover"):
        device.take(2)
        os.ftruncate(fd, 0)
    if when == "rewind":
        device.rewind(1)
    if when == "publish":
        device.complete(0)
        device.publish()
        assert rig.driver.collect() == []
    if when == "recover":
        device = rig.new_device()
    with pytest.raises(QueueBroken) as caught:
        device.take()
    assert caught.value.reason is Reason.TRUNCATED
