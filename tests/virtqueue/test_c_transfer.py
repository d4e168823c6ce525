"""Bytes of many chains in one call, whoever makes the call: the executors end all items alike."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transfer_rig import BUILD, EVERYTHING, Pieces, build

from virtqueue import RECORD, STREAM, Operation, Transfer, TransferFlags, UsageError
from virtqueue.c_library import Library
from virtqueue.native import transfer

Make = Callable[[int], Transfer]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if not BUILD.exists():
        pytest.skip("the C sources are not there")
    return build(tmp_path_factory.mktemp("engine") / "libvirtqueue.so", EVERYTHING)


@pytest.fixture(params=["calls", "uring", "ring"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Plain calls; calls and ring as `Transfer` chooses; the ring for every read and write."""
    if request.param != "calls" and not Transfer.uring_available():
        pytest.skip("the kernel gives no io_uring")
    if request.param == "ring":
        library = request.getfixturevalue("everything")
        monkeypatch.setattr(transfer, "library", lambda: library)
    made: list[Transfer] = []

    def make(capacity: int) -> Transfer:
        made.append(Transfer(capacity, uring=request.param != "calls"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def engine() -> str:
    return "c"


@pytest.fixture
def rig(make_rig: Any, packed: bool) -> Any:
    return make_rig(packed=packed, size=32)


def segments(rig: Any) -> int:
    address: int = rig.device._block.segments
    return address


def records(batch: Any) -> list[tuple[Any, ...]]:
    return list(RECORD.iter_unpack(batch.records))


def scattered(rig: Any, text: bytes, rooms: int) -> None:
    """Three readable and three writable pieces."""
    pieces = [rig.text(text[:3]), rig.text(text[3:4]), rig.text(text[4:])]
    rig.driver.add(pieces, [rig.room(n) for n in (1, 2, rooms - 3)])


@pytest.mark.parametrize("short", [False, True])
def test_a_batch_of_reads_and_writes(make: Make, rig: Any, tmp_path: Path, short: bool) -> None:
    for number in range(4):
        scattered(rig, b"HEAD" + b"%04d" % number, 8)
    rig.driver.publish()
    batch = rig.device.take()
    mover = make(8)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    for number, record in enumerate(records(batch)):
        mover.add_record(
            Operation.WRITE, segments(rig), record[9], record[8], 4, number * 4, skip=4
        )
    assert mover.run(file, short=short) == 4
    assert mover.results == [4] * 4
    assert os.pread(file, 100, 0) == b"0000000100020003"
    for number, record in enumerate(records(batch)):
        mover.add_record(Operation.READ, segments(rig), record[9], record[8], 7, number * 4)
    assert mover.run(file, short=short) == 3
    assert mover.results == [7, 7, 7, 4]
    os.close(file)
    written = [chain.writable for chain in batch]
    assert b"".join(bytes(view) for view in written[0]) == b"0000000\0"
    assert b"".join(bytes(view) for view in written[3]) == b"0003\0\0\0\0"


def test_copies_to_and_from_a_buffer(make: Make, rig: Any) -> None:
    scattered(rig, b"copy these", 16)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    buffer = ctypes.create_string_buffer(b"-" * 20, 20)
    address = ctypes.addressof(buffer)
    mover = make(2)
    mover.add_record(Operation.COPY_OUT, segments(rig), record[9], record[8], 20, address)
    mover.add_record(Operation.COPY_IN, segments(rig), record[9], record[8], 10, address, skip=2)
    assert mover.run() == 1
    assert mover.results == [10, 10]
    assert buffer.raw == b"copy these" + b"-" * 10
    (chain,) = batch
    assert b"".join(bytes(v) for v in chain.writable) == b"\0\0copy these\0\0\0\0"


def test_streams_take_what_comes(make: Make, rig: Any) -> None:
    scattered(rig, b"to the socket", 16)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mover = make(1)
        mover.add_record(Operation.WRITE, segments(rig), record[9], record[8], 13, STREAM)
        assert mover.run(ours.fileno()) == 1
        assert theirs.recv(100) == b"to the socket"
        theirs.send(b"answer")
        mover.add_record(Operation.READ, segments(rig), record[9], record[8], 16, STREAM)
        assert mover.run(ours.fileno()) == 0
        assert mover.results == [6]


def test_an_error_is_the_item_s_own(make: Make, rig: Any, tmp_path: Path) -> None:
    scattered(rig, b"HEADbody", 8)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    mover = make(2)
    with open(os.devnull, "wb") as unreadable:
        mover.add_record(Operation.READ, segments(rig), record[9], record[8], 4, 0)
        mover.add_record(Operation.WRITE, segments(rig), record[9], record[8], 4, 0)
        assert mover.run(unreadable.fileno()) == 1
    assert mover.results == [-errno.EBADF, 4]


def test_an_offset_beyond_the_file_system_is_an_error(make: Make, rig: Any, tmp_path: Path) -> None:
    scattered(rig, b"HEADbody", 8)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    mover = make(1)
    mover.add_record(Operation.WRITE, segments(rig), record[9], record[8], 4, 1 << 63)
    assert mover.run(file) == 0
    assert mover.results == [-errno.EINVAL]
    os.close(file)


def test_there_is_room_for_so_many() -> None:
    mover = Transfer(1)
    mover.add(Operation.READ, 0, 0, 0, 0)
    assert len(mover) == 1
    with pytest.raises(UsageError, match="room for 1"):
        mover.add(Operation.READ, 0, 0, 0, 0)
    with pytest.raises(UsageError):
        Transfer(0)


def test_more_items_than_the_ring_has_entries(make: Make, tmp_path: Path) -> None:
    count, size = 700, 512
    pieces = Pieces(2 * count * size)
    written = random.Random(1).randbytes(count * size)
    pieces.memory[: count * size] = written
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    mover = make(2 * count)
    order = random.Random(2).sample(range(count), count)
    for n in order:
        chain = pieces.chain([(n * size, 100), (n * size + 100, size - 100)], writable=False)
        mover.add(Operation.WRITE, *chain, size, n * size)
    mover.add_sync()
    for n in order[: count - 1]:
        at = (count + n) * size
        chain = pieces.chain([(at, 200), (at + 200, size - 200)], writable=True)
        mover.add(Operation.READ, *chain, size, n * size)
    assert mover.run(file) == 2 * count
    assert mover.results == [size] * count + [0] + [size] * (count - 1)
    assert os.pread(file, count * size + 1, 0) == written
    left = order[-1] * size
    assert pieces.memory[count * size :] == written[:left] + bytes(size) + written[left + size :]
    os.close(file)


def test_a_chain_of_more_pieces_than_one_call_takes(make: Make, tmp_path: Path) -> None:
    count = 2000
    pieces = Pieces(4 * count)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    text = random.Random(3).randbytes(2 * count)
    pieces.memory[: 2 * count] = text
    backwards = [(2 * n, 2) for n in reversed(range(count))]
    mover = make(4)
    for n in range(2):
        mover.add(Operation.WRITE, *pieces.chain(backwards, False), 2 * count - n, n * 5000)
    mover.add_sync()
    into = [(2 * count + offset, length) for offset, length in backwards]
    mover.add(Operation.READ, *pieces.chain(into, True), 2 * count, 0)
    assert mover.run(file) == 4
    assert pieces.memory[2 * count :] == text
    os.close(file)


def test_a_file_that_ends_in_a_request(make: Make, tmp_path: Path) -> None:
    pieces = Pieces(4 << 12)
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 6000)
    file = os.open(path, os.O_RDONLY)
    mover = make(3)
    for n, offset in enumerate((0, 4096, 8192)):
        mover.add(Operation.READ, *pieces.chain([(n << 12, 4096)], True), 4096, offset)
    assert mover.run(file) == 1
    assert mover.results == [4096, 6000 - 4096, 0]
    assert pieces.memory[: 3 << 12] == b"x" * 6000 + bytes(3 * 4096 - 6000)
    os.close(file)


def test_a_sync_stands_between_what_is_around_it(make: Make, tmp_path: Path) -> None:
    size = 1 << 16
    pieces = Pieces(8 * size)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    mover = make(20)
    for turn in range(1, 20):
        for n in range(4):
            pieces.memory[n * size : (n + 1) * size] = bytes([turn + n]) * size
            mover.add(Operation.WRITE, *pieces.chain([(n * size, size)], False), size, n * size)
        mover.add_sync()
        for n in range(4):
            chain = pieces.chain([((4 + n) * size, size)], True)
            mover.add(Operation.READ, *chain, size, n * size)
        mover.add_sync()
        assert mover.run(file) == 10
        assert pieces.memory[4 * size :] == pieces.memory[: 4 * size]
    os.close(file)


def test_reads_and_writes_of_calls_keep_their_order(tmp_path: Path) -> None:
    """Also when a read waits for the medium: what is written behind it does not show in it."""
    size = 4096
    pieces = Pieces(3 * size)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    os.pwrite(file, b"a" * 2 * size, 0)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    pieces.memory[:size] = b"b" * size
    mover = Transfer(3)
    mover.add(Operation.READ, *pieces.chain([(size, size)], True), size, 0)
    mover.add(Operation.WRITE, *pieces.chain([(0, size)], False), size, 0)
    mover.add(Operation.READ, *pieces.chain([(2 * size, size)], True), size, 0)
    assert mover.run(file) == 3
    assert pieces.memory[size:] == b"a" * size + b"b" * size
    os.close(file)


def test_a_sync_that_fails_is_an_error(make: Make) -> None:
    mover = make(1)
    mover.add_sync()
    assert mover.run(-1) == 0
    assert mover.results == [-errno.EBADF]
    reader, writer = os.pipe()
    mover.add_sync()
    assert mover.run(writer) == 0
    assert mover.results == [-errno.EINVAL]
    os.close(reader)
    os.close(writer)


def test_durable_writes(make: Make, tmp_path: Path) -> None:
    pieces = Pieces(1 << 16)
    pieces.memory[:] = random.Random(4).randbytes(1 << 16)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    mover = make(16)
    for n in range(16):
        chain = pieces.chain([(n << 12, 4096)], False)
        mover.add(Operation.WRITE, *chain, 4096, n << 12, flags=TransferFlags.DSYNC)
    assert mover.run(file) == 16
    assert os.pread(file, 1 << 17, 0) == pieces.memory[:]
    os.close(file)


def test_an_unknown_flag_or_operation_is_refused(make: Make, tmp_path: Path) -> None:
    pieces = Pieces(4096)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    mover = make(3)
    chain = pieces.chain([(0, 4096)], False)
    mover.add(Operation.WRITE, *chain, 4096, 0, flags=TransferFlags(2))
    mover.add(99, *chain, 4096, 0)  # type: ignore[arg-type]
    mover.add(Operation.WRITE, *chain, 4096, 0)
    assert mover.run(file) == 1
    assert mover.results == [-errno.EINVAL, -errno.EINVAL, 4096]
    os.close(file)


def test_memory_that_is_not_there(make: Make, tmp_path: Path) -> None:
    """A page that was truncated is EFAULT to the kernel, and to the item; the others go on."""
    memory = os.memfd_create("guest")
    os.ftruncate(memory, 3 << 12)
    pieces = Pieces(1 << 12)
    mapped = mmap.mmap(memory, 3 << 12)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) - pieces.base
    os.ftruncate(memory, 1 << 12)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    os.pwrite(file, b"d" * (3 << 12), 0)
    mover = make(4)
    mover.add(Operation.READ, *pieces.chain([(base + 4096, 4096)], True), 4096, 0)
    mover.add(Operation.READ, *pieces.chain([(base, 4096), (base + 4096, 4096)], True), 8192, 0)
    mover.add(Operation.WRITE, *pieces.chain([(base + 8192, 4096)], False), 4096, 8192)
    mover.add(Operation.READ, *pieces.chain([(0, 4096)], True), 4096, 0)
    assert mover.run(file) == 1
    assert mover.results == [-errno.EFAULT, 4096, -errno.EFAULT, 4096]
    assert mapped[:4096] == pieces.memory[:] == b"d" * 4096
    assert os.pread(file, 1 << 14, 0) == b"d" * (3 << 12)
    os.close(file)
    os.close(memory)


def test_a_file_past_the_page_cache(make: Make, tmp_path: Path) -> None:
    """Aligned requests move, and misaligned ones end as the file system's own call does."""
    path = tmp_path / "disk"
    path.write_bytes(random.Random(5).randbytes(1 << 16))
    try:
        file = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    pieces = Pieces(1 << 16)
    try:
        misaligned = os.preadv(file, [memoryview(pieces.memory)[1:4097]], 7)
    except OSError as error:
        misaligned = -(error.errno or 0)
    mover = make(17)
    for n in range(15):
        mover.add(Operation.READ, *pieces.chain([(n << 12, 4096)], True), 4096, n << 12)
    mover.add(Operation.READ, *pieces.chain([((15 << 12) + 1, 4095)], True), 4095, (15 << 12) + 1)
    assert mover.run(file) == 15 + (misaligned >= 0)
    assert mover.results == [4096] * 15 + [4095 if misaligned >= 0 else misaligned]
    assert pieces.memory[: 15 << 12] == path.read_bytes()[: 15 << 12]
    for n in range(16):
        mover.add(Operation.WRITE, *pieces.chain([(0, 4096)], False), 4096, n << 12)
    assert mover.run(file) == 16
    assert path.read_bytes() == pieces.memory[:4096] * 16
    os.close(file)


def test_a_bad_descriptor_and_a_pipe_with_an_offset(make: Make) -> None:
    pieces = Pieces(4096)
    reader, writer = os.pipe()
    for fd, error in ((-1, errno.EBADF), (reader, errno.ESPIPE), (writer, errno.ESPIPE)):
        mover = make(2)
        operation = Operation.READ if fd == reader else Operation.WRITE
        for _ in range(2):
            mover.add(operation, *pieces.chain([(0, 16)], fd == reader), 16, 0)
        assert mover.run(fd) == 0
        assert mover.results == [-error] * 2
    os.close(reader)
    os.close(writer)
