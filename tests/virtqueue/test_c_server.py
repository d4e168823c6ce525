"""Serving a queue from C: looking, sleeping, handlers, signals, and who may touch the queue."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from virtqueue import (
    DONE,
    CHandler,
    Counters,
    EngineUnavailable,
    FileAction,
    FileHandler,
    QueueBroken,
    Server,
    UsageError,
)
from virtqueue.layout import DoneFlags, QueueBlock


class Fds(NamedTuple):
    epoll: int
    kick: int
    call: int
    wake: int


@pytest.fixture
def fds() -> Iterator[Fds]:
    """An epoll descriptor with a kick, edge-triggered, and a wake-up, level-triggered."""
    kick, call, wake = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    epoll = select.epoll()
    epoll.register(kick, select.EPOLLIN | select.EPOLLET)
    epoll.register(wake, select.EPOLLIN)
    yield Fds(epoll.fileno(), kick, call, wake)
    epoll.close()
    for fd in (kick, call, wake):
        os.close(fd)


@pytest.fixture
def engine() -> str:
    return "c"


@pytest.fixture
def rig(make_rig: Any, packed: bool, features: dict[str, bool]) -> Any:
    return make_rig(packed=packed, size=64, status_byte=True, **features)


def serving(rig: Any, fds: Fds, **settings: Any) -> Server:
    server = Server(rig.device, fds.epoll, fds.kick, fds.call, **settings)
    server.resume(fds.kick, fds.call)
    return server


def signal(server: Server) -> None:
    """Have `serve` make up for what `turn` must not do."""
    server.interrupt()
    assert server.serve() == 0
    server.clear_interrupt()


def block_request(rig: Any, kind: int, position: int, data: bytes = b"", room: int = 0) -> int:
    """One request of a header, data either way, and a status byte; (status address, room)."""
    header = rig.text(struct.pack("<IIQ", kind, 0, position))
    readable = [header, rig.text(data)] if data else [header]
    status = rig.room(1, b"\xff")
    target = rig.room(room) if room else None
    writable = [target, status] if target else [status]
    rig.driver.add(readable, writable)
    rig.driver.publish()
    rig.last = (target, status)
    return int(status[0])


def read(rig: Any, address: int, length: int = 1) -> bytes:
    data: bytes = rig.memory.read(address, length)
    return data


# --- looking and sleeping ---


def test_what_is_there_is_taken_at_once(rig: Any, fds: Fds) -> None:
    rig.offer_many(3)
    server = serving(rig, fds)
    assert server.serve() == 3
    batch = server.begin(3)
    assert [chain.read(5) for chain in batch] == [b"hello"] * 3
    server.leave()
    assert server.turn() == 0
    assert len(rig.driver.collect()) == 3
    signal(server)
    assert os.eventfd_read(fds.call) == 1


def test_a_kick_ends_a_sleep_and_need_not_be_read(rig: Any, fds: Fds) -> None:
    """Each write is an edge, whatever the count was: a kick is never lost."""
    server = serving(rig, fds)
    for _ in range(3):
        found: list[int] = []
        thread = threading.Thread(target=lambda found=found: found.append(server.serve()))
        thread.start()
        time.sleep(0.01)
        rig.offer()
        rig.driver.publish()
        os.eventfd_write(fds.kick, 1)
        thread.join(60)
        assert found == [1]
        server.begin(1)
    assert os.eventfd_read(fds.kick) == 3


def test_another_descriptor_ends_a_sleep_and_stays(rig: Any, fds: Fds) -> None:
    server = serving(rig, fds)
    os.eventfd_write(fds.wake, 1)
    assert server.serve() == 0
    assert server.serve() == 0
    assert os.eventfd_read(fds.wake) == 1


def test_an_interrupt_comes_before_what_waits(rig: Any, fds: Fds) -> None:
    server = serving(rig, fds)
    rig.offer_many(2)
    server.interrupt()
    assert server.serve() == 0
    assert server.turn() == 0
    server.clear_interrupt()
    assert server.turn() == 2


def test_an_interrupt_completes_what_is_in_hand(rig: Any, fds: Fds) -> None:
    server = serving(rig, fds)
    rig.offer_many(2)
    assert server.turn() == 2
    server.begin(2)
    server.interrupt()
    assert server.turn() == 0
    assert len(rig.driver.collect()) == 2


def test_while_it_looks_the_driver_need_not_kick(rig: Any, fds: Fds) -> None:
    server = serving(rig, fds, spin_max=0.9)
    kicked = True
    while kicked:  # on a busy machine it may not look yet, or sleep already
        found: list[int] = []
        thread = threading.Thread(target=lambda into: into.append(server.serve()), args=(found,))
        thread.start()
        time.sleep(0.05)
        rig.offer()
        kicked = rig.driver.publish()
        if kicked:
            os.eventfd_write(fds.kick, 1)
        thread.join(60)
        assert found == [1]
        server.begin(1)


def test_a_long_sleep_shortens_the_next_look(rig: Any, fds: Fds) -> None:
    server = serving(rig, fds, spin_max=0.0001)
    assert server.spin == pytest.approx(0.0001)

    def wake_late() -> None:
        time.sleep(0.002)
        os.eventfd_write(fds.wake, 1)

    # On a busy machine a wake-up may be there before the sleep, which lengthens the look instead.
    for _ in range(200):
        thread = threading.Thread(target=wake_late)
        thread.start()
        assert server.serve() == 0
        thread.join()
        os.eventfd_read(fds.wake)
        if server.spin == 0:
            break
    assert server.spin == 0
    os.eventfd_write(fds.wake, 1)
    server.serve()
    assert server.spin > 0


def test_no_wake_up_is_lost(rig: Any, fds: Fds) -> None:
    """One chain at a time; kicks and signals only when they are asked for."""
    rounds = 1000
    server = serving(rig, fds, spin_max=0.00002)
    text, room = rig.text(b"x"), rig.room(8)

    def serve() -> None:
        done = 0
        while done < rounds:
            count = server.serve()
            assert count >= 0
            server.begin(count)
            done += count
        signal(server)

    thread = threading.Thread(target=serve)
    thread.start()
    poller = select.poll()
    poller.register(fds.call, select.POLLIN)
    for _ in range(rounds):
        rig.driver.add([text], [room])
        if rig.driver.publish():
            os.eventfd_write(fds.kick, 1)
        while not rig.driver.collect():
            if not rig.driver.enable_notification():
                assert poller.poll(60_000), "a wake-up was lost"
                os.eventfd_read(fds.call)
    thread.join(60)
    assert not thread.is_alive()


# --- completing and signalling ---


def test_what_was_staged_one_by_one_is_signalled(rig: Any, fds: Fds) -> None:
    """A chain that outlived its batch is completed by head; the next turn tells the driver."""
    server = serving(rig, fds)
    rig.offer_many(2)
    batch = server.begin(server.serve())
    kept = batch[0]
    entry = bytearray(batch.done)
    for position in range(2):
        entry[8 * position + 3] |= DoneFlags.KEEP
    batch.done[:] = entry
    server.leave()
    assert server.turn() == 0
    assert not rig.driver.collect()
    rig.device.complete(kept, 0)
    server.leave()
    assert server.turn() == 0
    assert len(rig.driver.collect()) == 1
    signal(server)
    assert os.eventfd_read(fds.call) == 1


def test_what_it_did_is_counted(make_rig: Any, packed: bool, fds: Fds) -> None:
    rig = make_rig(packed=packed, size=64, device=False)
    counters = Counters()
    rig.device = rig.new_device(counters=counters)
    server = serving(rig, fds)
    rig.offer_many(5, text=b"x" * 20, room=7)
    server.begin(server.serve())
    os.eventfd_write(fds.wake, 1)
    assert server.serve() == 0
    assert (counters.requests, counters.batches, counters.bytes) == (5, 1, 5 * 27)
    assert (counters.notifications_sent, counters.notifications_suppressed) == (1, 0)


def test_a_full_call_descriptor_is_left_alone(rig: Any, fds: Fds) -> None:
    os.eventfd_write(fds.call, 2**64 - 2)
    server = serving(rig, fds)
    rig.offer_many(1)
    server.begin(server.serve())
    assert server.turn() == 0
    assert len(rig.driver.collect()) == 1
    signal(server)
    assert os.eventfd_read(fds.call) == 2**64 - 2


def test_a_turn_with_the_gil_leaves_the_signal_to_serve(rig: Any, fds: Fds) -> None:
    """The write can be made to wait, and all threads would wait for the GIL with it."""
    server = serving(rig, fds)
    rig.offer_many(1)
    server.begin(server.serve())
    rig.offer_many(1)
    assert server.turn() == 0
    assert len(rig.driver.collect()) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fds.call)
    assert server.serve() == 1
    assert os.eventfd_read(fds.call) == 1


def test_a_full_and_blocking_call_descriptor_holds_it_up_until_it_is_read(
    rig: Any, fds: Fds
) -> None:
    os.eventfd_write(fds.call, 2**64 - 2)
    os.set_blocking(fds.call, True)
    server = serving(rig, fds)
    rig.offer_many(1)
    server.begin(server.serve())
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(server.serve()))
    thread.start()
    time.sleep(0.05)
    server.interrupt()
    os.eventfd_write(fds.wake, 1)
    time.sleep(0.05)
    assert thread.is_alive()
    os.eventfd_read(fds.call)
    thread.join(60)
    assert found == [0]


def test_a_wrong_ring_is_said_by_the_long_way(rig: Any, fds: Fds) -> None:
    server = serving(rig, fds)
    rig.offer_many(1)
    assert server.serve() == 1
    server.begin(1)
    rig.driver.add([(0x10, 4)], [rig.room(4)])
    rig.driver.publish()
    assert server.serve() < 0
    assert len(rig.driver.collect()) == 1  # what was in hand went back all the same
    with pytest.raises(QueueBroken):
        rig.device.cycle()


def test_a_wrong_completion_is_said_by_the_long_way(rig: Any, fds: Fds) -> None:
    server = serving(rig, fds)
    rig.offer_many(1)
    batch = server.begin(server.serve())
    DONE.pack_into(batch.done, 0, 63, 0, 1, 0)
    assert server.turn() < 0
    with pytest.raises(UsageError):
        rig.device.cycle()


# --- handlers in C ---

HANDLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def test_a_handler_works_until_it_leaves_something(rig: Any, fds: Fds) -> None:
    """Here in Python, called from C as one in C would be."""
    seen: list[int] = []

    def work(context: int, queue: int) -> int:
        seen.append(context)
        if len(seen) < 3:
            rig.offer_many(1)
            return 0
        flags = ctypes.c_uint8.from_address(QueueBlock.from_address(queue).done + 3)
        flags.value |= DoneFlags.LEFT
        return 1

    function = HANDLER(work)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    server = serving(rig, fds, handler=CHandler(address, 77))
    rig.offer_many(1)
    assert server.serve() == 1
    assert seen == [77] * 3
    assert server.left == 1
    assert list(server.begin(1).left) == [0]
    assert len(rig.driver.collect()) == 2


def test_a_queue_is_borrowed_while_a_handler_works(rig: Any, fds: Fds) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(context: int, queue: int) -> int:
        begun.set()
        assert go_on.wait(60)
        return 0

    function = HANDLER(work)
    server = serving(rig, fds, handler=CHandler(ctypes.cast(function, ctypes.c_void_p).value or 0))
    assert not server.borrow()
    rig.offer_many(2)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(server.serve()))
    thread.start()
    assert begun.wait(60)
    assert server.borrow()
    assert not server.borrow()
    server.give_back()
    assert server.borrow()  # the handler still works
    server.give_back()
    go_on.set()
    thread.join(60)
    # The batch comes back untouched: whoever borrowed the queue may have changed it.
    assert found == [2]
    assert server.left == 0
    assert not rig.driver.collect()
    server.own()
    assert not server.borrow()
    server.resume(fds.kick, fds.call)
    server.begin(2)
    assert server.turn() == 0
    assert len(rig.driver.collect()) == 2


# --- requests that read and write a file ---

IN, OUT, FLUSH = 0, 1, 4
ACTIONS = {IN: FileAction.READ, OUT: FileAction.WRITE, FLUSH: FileAction.SYNC}


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"".join(bytes([number]) * 512 for number in range(16)))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("uring", [False, True])
def test_a_file_is_read_and_written(rig: Any, fds: Fds, image: int, uring: bool) -> None:
    server = serving(rig, fds, handler=FileHandler(image, 8192, ACTIONS, uring=uring))
    os.eventfd_write(fds.wake, 1)
    status = [block_request(rig, OUT, 3, b"w" * 1024)]
    status.append(block_request(rig, FLUSH, 0))
    assert server.serve() == 0
    status.append(block_request(rig, IN, 2, room=1536))
    target = rig.last[0]
    assert server.serve() == 0
    assert [read(rig, address) for address in status] == [b"\0"] * 3
    assert read(rig, target[0], 1536) == bytes([2]) * 512 + b"w" * 1024
    assert os.pread(image, 1024, 3 * 512) == b"w" * 1024
    assert [written for _, written in rig.driver.collect()] == [1, 1, 1537]


def test_few_requests_at_once_while_none_has_to_wait(
    make_rig: Any, packed: bool, fds: Fds, image: int
) -> None:
    counters = Counters()
    rig = make_rig(packed=packed, size=64, status_byte=True, device=False)
    rig.device = rig.new_device(counters=counters)
    count, page = 16, 4096
    os.pwrite(image, b"".join(bytes([number]) * page for number in range(count)), 0)
    os.posix_fadvise(image, 0, 0, os.POSIX_FADV_RANDOM)  # no page comes along with another
    server = serving(rig, fds, handler=FileHandler(image, count * page, ACTIONS, unit=page))
    os.eventfd_write(fds.wake, 1)

    def batches() -> int:
        """How many it takes for reads of the whole file."""
        before, begin = counters.batches, rig.next
        for number in range(count):
            block_request(rig, IN, number, room=page)
            rig.memory.write(rig.last[0][0], b"?" * page)
        time.sleep(0.002)  # a pause, after which nothing is tried out
        assert server.serve() == 0
        assert len(rig.driver.collect()) == count
        assert read(rig, rig.last[1][0]) == b"\0"
        assert read(rig, rig.last[0][0], page) == bytes([count - 1]) * page
        rig.next = begin
        return counters.batches - before

    # A read that has to wait after all, as on a busy machine, makes the count begin anew.
    all_at_once, few = 1, count // 8
    assert [batches() for _ in range(256 // count)] == [all_at_once] * (256 // count)
    assert few in (batches() for _ in range(1000))
    os.fsync(image)
    cold = 0
    for _ in range(1000):
        os.posix_fadvise(image, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(image, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            cold += 1
            if batches() == all_at_once:
                return
        except OSError:
            pytest.skip("this file system does not tell what would wait")
    # Not every batch is looked at, and a busy machine drops few pages.
    assert cold < 32, "reads that had to wait were not noticed"


@pytest.mark.parametrize(
    ("kind", "position", "data", "room"),
    [
        (IN, 16, b"", 512),  # behind the end
        (IN, 15, b"", 1024),  # over the end
        (IN, 1 << 55, b"", 512),  # over what counts bytes
        (IN, 0, b"", 100),  # no whole unit
        (IN, 0, b"", 0),  # nothing
        (IN, 0, b"x", 512),  # a read that brings data
        (OUT, 0, b"x" * 512, 4),  # a write that wants an answer
        (OUT, 16, b"x" * 512, 0),
        (FLUSH, 0, b"", 4),
        (5, 0, b"", 512),
        (16, 0, b"", 512),
        (0xFFFFFFFF, 0, b"", 512),
    ],
)
def test_what_is_not_plain_is_left(
    rig: Any, fds: Fds, image: int, kind: int, position: int, data: bytes, room: int
) -> None:
    before = os.pread(image, 8192, 0)
    server = serving(rig, fds, handler=FileHandler(image, 8192, ACTIONS))
    block_request(rig, IN, 0, room=512)
    block_request(rig, kind, position, data, room)
    block_request(rig, IN, 1, room=512)
    assert server.serve() == 3
    assert server.left == 1
    assert list(server.begin(3).left) == [1]
    assert os.pread(image, 8192, 0) == before


def test_a_short_header_is_left(rig: Any, fds: Fds, image: int) -> None:
    """Twelve bytes of a header name no position, and zeroes must not be taken for one."""
    server = serving(rig, fds, handler=FileHandler(image, 8192, ACTIONS))
    rig.driver.add([rig.text(bytes(12))], [rig.room(512), rig.room(1)])
    rig.driver.publish()
    assert server.serve() == 1
    assert server.left == 1


def test_an_error_of_the_file_is_left(rig: Any, fds: Fds, image: int, tmp_path: Path) -> None:
    readable = os.open(tmp_path / "image", os.O_RDONLY)
    try:
        server = serving(rig, fds, handler=FileHandler(readable, 8192, ACTIONS))
        block_request(rig, OUT, 0, b"x" * 512)
        os.truncate(image, 4096)
        block_request(rig, IN, 8, room=512)
        block_request(rig, IN, 0, room=512)
        assert server.serve() == 3
        batch = server.begin(3)
        assert list(batch.left) == [0, 1]
        assert [entry[1] for entry in DONE.iter_unpack(batch.done)] == [errno.EBADF, 0, 0]
    finally:
        os.close(readable)


def test_a_handler_keeps_to_its_file(rig: Any, fds: Fds, tmp_path: Path) -> None:
    """Its owner may close the file, and the number go to another, while a request still waits."""
    first = os.open(tmp_path / "first", os.O_RDWR | os.O_CREAT)
    handler = FileHandler(first, 8192, ACTIONS)
    os.close(first)
    second = os.open(tmp_path / "second", os.O_RDWR | os.O_CREAT)
    assert second == first
    server = serving(rig, fds, handler=handler)
    os.eventfd_write(fds.wake, 1)
    block_request(rig, OUT, 1, b"w" * 512)
    assert server.serve() == 0
    assert (tmp_path / "first").read_bytes() == bytes(512) + b"w" * 512
    assert (tmp_path / "second").read_bytes() == b""
    os.close(second)
    before = len(os.listdir("/proc/self/fd"))
    del server, handler
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_types_can_succeed_or_be_left(rig: Any, fds: Fds, image: int) -> None:
    actions = {IN: FileAction.SUCCEED, OUT: FileAction.LEAVE}
    server = serving(rig, fds, handler=FileHandler(image, 8192, actions))
    status = block_request(rig, IN, 1 << 40, room=512)
    block_request(rig, OUT, 0, b"x" * 512)
    assert server.serve() == 2
    assert list(server.begin(2).left) == [1]
    assert server.turn() == 0
    assert read(rig, status) == b"\0"


def test_settings_that_cannot_be(make_rig: Any, make_python_rig: Any, fds: Fds, image: int) -> None:
    with pytest.raises(UsageError, match="0 to 1 s"):
        Server(make_rig().device, fds.epoll, spin_max=1)
    with pytest.raises(EngineUnavailable, match="python"):
        Server(make_python_rig().device, fds.epoll)
    with pytest.raises(UsageError, match="power of two"):
        FileHandler(image, 8192, ACTIONS, unit=500)
    with pytest.raises(UsageError, match="0 to 15"):
        FileHandler(image, 8192, {16: FileAction.READ})
