"""Our embedded driver against a disk that somebody else serves.

QEMU's storage daemon is no relative of ours: what both understand the same way is what the
specifications say, not merely what our two ends agree on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.guest import (
    MIB,
    STORAGE_DAEMON,
    BackEnd,
    Missing,
    in_ci,
    provide_program,
    random_bytes,
    skip_or_fail,
)

from vhost_backend.devices.blk import F_FLUSH, F_RO, S_IOERR, S_OK, SECTOR, T_IN, T_OUT
from vhost_backend.driver import BlockDriver, BlockError, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_protocol import ProtocolFeatures

SIZE = 8 * MIB + SECTOR
CONTENT = random_bytes(SIZE, seed=3)


@pytest.fixture(scope="session")
def storage_daemon() -> str:
    try:
        # Only where tests are the purpose may they install something.
        return provide_program("qemu-storage-daemon", "qemu-system-common", fetch=in_ci())
    except Missing as reason:
        skip_or_fail(reason)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def export(storage_daemon: str, image: Path, tmp_path: Path) -> Iterator[BackEnd]:
    with BackEnd(STORAGE_DAEMON, image, tmp_path, num_queues=2) as back_end:
        yield back_end


def attach(export: BackEnd, **options: Any) -> DriverSession:
    return DriverSession.connect(str(export.socket), features=DRIVER_FEATURES, **options)


def test_features_and_configuration(export: BackEnd) -> None:
    with attach(export) as session:
        wanted = ProtocolFeatures.MQ | ProtocolFeatures.CONFIG
        assert session.protocol_features & wanted == wanted
        assert session.frontend.get_queue_num() == 2
        assert session.features & F_FLUSH
        assert not session.features & F_RO
        driver = BlockDriver(session)
        assert driver.capacity == SIZE
        assert not driver.read_only


def test_identity(export: BackEnd) -> None:
    with attach(export) as session:
        assert BlockDriver(session).get_id() == b"vhost_user_blk"


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("depth", [1, 32])
def test_write_read_verify(
    export: BackEnd, image: Path, depth: int, indirect: bool, event_idx: bool
) -> None:
    """Every block of the disk once, in a random order, `depth` requests at a time."""
    block = 16 * 1024
    order = list(range(SIZE // block))
    new = random_bytes(len(order) * block, seed=depth)
    with attach(export, event_idx=event_idx, indirect=indirect) as session:
        driver = BlockDriver(session, depth=depth, max_io=block, indirect=indirect)
        for kind in (T_OUT, T_IN):
            random.Random(depth).shuffle(order)
            seen = bytearray(len(new))
            left = list(order)
            while left or driver.in_flight:
                while left and driver.idle_slots:
                    number = left.pop()
                    piece = new[number * block : (number + 1) * block]
                    driver.submit(
                        kind,
                        number * block // SECTOR,
                        payload=piece if kind == T_OUT else b"",
                        length=block if kind == T_IN else 0,
                        tag=number,
                    )
                driver.kick()
                for completion, data in driver.collect():
                    assert completion.status == S_OK
                    assert isinstance(completion.tag, int)
                    # The length that the used ring tells: the data and the status byte.
                    assert completion.written == (1 + block if kind == T_IN else 1)
                    if kind == T_IN:
                        at = completion.tag * block
                        seen[at : at + block] = data
            if kind == T_IN:
                assert seen == new
        driver.flush()
    assert image.read_bytes() == new + CONTENT[len(new) :]


def test_what_the_host_wrote_is_read(export: BackEnd) -> None:
    with attach(export) as session:
        assert BlockDriver(session).read(0, SIZE) == CONTENT


def test_discard_and_write_zeroes(export: BackEnd, image: Path) -> None:
    with attach(export) as session:
        driver = BlockDriver(session)
        driver.discard(MIB, MIB)
        driver.write_zeroes(3 * MIB, MIB)
        driver.write_zeroes(5 * MIB, MIB, unmap=True)
        expected = bytearray(CONTENT)
        for start in (MIB, 3 * MIB, 5 * MIB):
            expected[start : start + MIB] = bytes(MIB)
        assert driver.read(0, SIZE) == expected
    assert image.read_bytes() == expected


def test_both_queues_work(export: BackEnd) -> None:
    with attach(export, num_queues=2) as session:
        first, second = (BlockDriver(session, queue=index) for index in range(2))
        new = random_bytes(65536, seed=4)
        first.write(0, new)
        assert second.read(0, len(new)) == new
        second.write(0, CONTENT[:65536])
        assert first.read(0, len(new)) == CONTENT[:65536]


def test_beyond_the_end_is_an_error(export: BackEnd, image: Path) -> None:
    with attach(export) as session:
        driver = BlockDriver(session)
        with pytest.raises(BlockError) as caught:
            driver.write(SIZE - SECTOR, bytes(2 * SECTOR))
        assert caught.value.status == S_IOERR
        driver.write(SIZE - SECTOR, bytes(SECTOR))
    assert image.read_bytes() == CONTENT[:-SECTOR] + bytes(SECTOR)


def test_read_only_refuses_writes(storage_daemon: str, image: Path, tmp_path: Path) -> None:
    with (
        BackEnd(STORAGE_DAEMON, image, tmp_path, read_only=True) as export,
        attach(export) as session,
    ):
        driver = BlockDriver(session)
        assert driver.read_only
        with pytest.raises(BlockError) as caught:
            driver.write(0, bytes(SECTOR))
        assert caught.value.status == S_IOERR
        assert driver.read(0, SIZE) == CONTENT
    assert image.read_bytes() == CONTENT


def test_second_session_finds_what_the_first_left(export: BackEnd) -> None:
    new = random_bytes(65536, seed=5)
    with attach(export) as session:
        BlockDriver(session).write(MIB, new)
    with attach(export) as session:
        assert BlockDriver(session).read(MIB, len(new)) == new


def test_ring_stops_and_goes_on_where_it_stood(export: BackEnd) -> None:
    with attach(export) as session:
        driver = BlockDriver(session)
        for _ in range(3):
            driver.read(0, SECTOR)
        base = session.stop_ring(0)
        assert base == 3
        session.start_ring(0, base)
        assert driver.read(0, SECTOR) == CONTENT[:SECTOR]
