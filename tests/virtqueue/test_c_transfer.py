"""Bytes of many chains in one call."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from virtqueue import RECORD, UsageError
from virtqueue.transfer import STREAM, Operation, Transfer


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
def test_a_batch_of_reads_and_writes(rig: Any, tmp_path: Path, short: bool) -> None:
    for number in range(4):
        scattered(rig, b"HEAD" + b"%04d" % number, 8)
    rig.driver.publish()
    batch = rig.device.take()
    transfer = Transfer(8)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    for number, record in enumerate(records(batch)):
        transfer.add_record(
            Operation.WRITE, segments(rig), record[9], record[8], 4, number * 4, skip=4
        )
    assert transfer.run(file, short=short) == 4
    assert transfer.results == [4] * 4
    assert os.pread(file, 100, 0) == b"0000000100020003"
    for number, record in enumerate(records(batch)):
        transfer.add_record(Operation.READ, segments(rig), record[9], record[8], 7, number * 4)
    assert transfer.run(file, short=short) == 3
    assert transfer.results == [7, 7, 7, 4]
    os.close(file)
    written = [chain.writable for chain in batch]
    assert b"".join(bytes(view) for view in written[0]) == b"0000000\0"
    assert b"".join(bytes(view) for view in written[3]) == b"0003\0\0\0\0"


def test_copies_to_and_from_a_buffer(rig: Any) -> None:
    scattered(rig, b"copy these", 16)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    buffer = ctypes.create_string_buffer(b"-" * 20, 20)
    address = ctypes.addressof(buffer)
    transfer = Transfer(2)
    transfer.add_record(Operation.COPY_OUT, segments(rig), record[9], record[8], 20, address)
    transfer.add_record(Operation.COPY_IN, segments(rig), record[9], record[8], 10, address, skip=2)
    assert transfer.run() == 1
    assert transfer.results == [10, 10]
    assert buffer.raw == b"copy these" + b"-" * 10
    (chain,) = batch
    assert b"".join(bytes(v) for v in chain.writable) == b"\0\0copy these\0\0\0\0"


def test_streams_take_what_comes(rig: Any) -> None:
    scattered(rig, b"to the socket", 16)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transfer = Transfer(1)
        transfer.add_record(Operation.WRITE, segments(rig), record[9], record[8], 13, STREAM)
        assert transfer.run(ours.fileno()) == 1
        assert theirs.recv(100) == b"to the socket"
        theirs.send(b"answer")
        transfer.add_record(Operation.READ, segments(rig), record[9], record[8], 16, STREAM)
        assert transfer.run(ours.fileno()) == 0
        assert transfer.results == [6]


def test_an_error_is_the_item_s_own(rig: Any, tmp_path: Path) -> None:
    scattered(rig, b"HEADbody", 8)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    transfer = Transfer(2)
    with open(os.devnull, "wb") as unreadable:
        transfer.add_record(Operation.READ, segments(rig), record[9], record[8], 4, 0)
        transfer.add_record(Operation.WRITE, segments(rig), record[9], record[8], 4, 0)
        assert transfer.run(unreadable.fileno()) == 1
    assert transfer.results == [-errno.EBADF, 4]


def test_an_offset_beyond_the_file_system_is_an_error(rig: Any, tmp_path: Path) -> None:
    scattered(rig, b"HEADbody", 8)
    rig.driver.publish()
    batch = rig.device.take()
    (record,) = records(batch)
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    transfer = Transfer(1)
    transfer.add_record(Operation.WRITE, segments(rig), record[9], record[8], 4, 1 << 63)
    assert transfer.run(file) == 0
    assert transfer.results == [-errno.EINVAL]
    os.close(file)


def test_there_is_room_for_so_many(rig: Any) -> None:
    transfer = Transfer(1)
    transfer.add(Operation.READ, 0, 0, 0, 0)
    assert len(transfer) == 1
    with pytest.raises(UsageError, match="room for 1"):
        transfer.add(Operation.READ, 0, 0, 0, 0)
    with pytest.raises(UsageError):
        Transfer(0)
