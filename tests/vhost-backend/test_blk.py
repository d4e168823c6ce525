"""The block device over a real socket pair, driven by the embedded driver, with both engines."""

import contextlib
import errno
import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from vhost_backend import BlockDevice, DeviceError
from vhost_backend.devices.blk import device as blk
from vhost_backend.driver import BlockDriver, BlockError
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import attached

SIZE = 4 << 20


def test_write_read_back_and_what_the_image_holds(image: Path, engine: str) -> None:
    data = random.Random(1).randbytes(1 << 20)
    with attached(BlockDevice(image), engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        assert driver.capacity == SIZE
        driver.write(4096, data)
        assert driver.read(4096, len(data)) == data
        driver.flush()
        assert image.read_bytes()[4096 : 4096 + len(data)] == data


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_many_requests_in_flight(
    image: Path, engine: str, indirect: bool, event_idx: bool, packed: bool
) -> None:
    rng = random.Random(2)
    model = bytearray(SIZE)
    with attached(
        BlockDevice(image),
        engine=engine,
        features=DRIVER_FEATURES,
        event_idx=event_idx,
        packed=packed,
    ) as session:
        driver = BlockDriver(session, depth=32, max_io=4096, indirect=indirect)
        for _ in range(30):
            busy: set[int] = set()
            expected: dict[int, bytes | None] = {}
            for _ in range(rng.randint(1, 32)):
                block = rng.randrange(SIZE // 4096)
                if block in busy:
                    continue
                busy.add(block)
                if rng.random() < 0.5:
                    data = rng.randbytes(4096)
                    model[block * 4096 : block * 4096 + 4096] = data
                    expected[block] = None
                    driver.submit(blk.T_OUT, block * 8, data, tag=block)
                else:
                    expected[block] = bytes(model[block * 4096 : block * 4096 + 4096])
                    driver.submit(blk.T_IN, block * 8, length=4096, tag=block)
            driver.kick()
            while driver.in_flight:
                for completion, data in driver.collect():
                    assert completion.status == blk.S_OK
                    assert isinstance(completion.tag, int)
                    wanted = expected.pop(completion.tag)
                    assert completion.written == (1 if wanted is None else 4097)
                    assert wanted is None or data == wanted
            assert not expected
        driver.flush()
    assert image.read_bytes() == model


def test_identity_discard_and_write_zeroes(image: Path, engine: str) -> None:
    device = BlockDevice(image, serial="serial-0123456789abc")
    with attached(device, engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        assert driver.get_id() == b"serial-0123456789abc"
        driver.write(0, b"\xaa" * 65536)
        driver.write_zeroes(4096, 8192)
        assert driver.read(0, 65536) == b"\xaa" * 4096 + bytes(8192) + b"\xaa" * 53248
        driver.write_zeroes(16384, 4096, unmap=True)
        assert driver.read(16384, 4096) == bytes(4096)
        driver.discard(0, 4096)
        assert os.path.getsize(image) == SIZE


def test_a_read_only_disk_refuses_every_change(image: Path, engine: str) -> None:
    device = BlockDevice(image, read_only=True)
    with attached(device, engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        assert driver.read_only
        assert driver.read(0, 512) == bytes(512)
        changes: tuple[Callable[[], None], ...] = (
            lambda: driver.write(0, b"x" * 512),
            lambda: driver.discard(0, 4096),
            lambda: driver.write_zeroes(0, 4096),
        )
        for change in changes:
            with pytest.raises(BlockError) as caught:
                change()
            assert caught.value.status == blk.S_IOERR
        driver.flush()


@pytest.mark.parametrize(
    ("kind", "sector", "payload", "length", "status"),
    [
        (blk.T_IN, SIZE // 512, b"", 512, blk.S_IOERR),  # behind the end
        (blk.T_IN, SIZE // 512 - 1, b"", 1024, blk.S_IOERR),  # across the end
        (blk.T_IN, (1 << 64) // 512 - 1, b"", 512, blk.S_IOERR),  # wraps in bytes
        (blk.T_IN, (1 << 64) - 1, b"", 512, blk.S_IOERR),
        (blk.T_IN, 0, b"", 100, blk.S_IOERR),  # no whole sector
        (blk.T_OUT, SIZE // 512, b"x" * 512, 0, blk.S_IOERR),
        (blk.T_OUT, 0, b"x" * 511, 0, blk.S_IOERR),
        (blk.T_GET_ID, 0, b"", 19, blk.S_IOERR),
        (blk.T_DISCARD, 0, b"x" * 15, 0, blk.S_IOERR),
        (blk.T_DISCARD, 0, b"", 0, blk.S_IOERR),
        (blk.T_DISCARD, 0, (0).to_bytes(8, "little") + b"\xff" * 4 + bytes(4), 0, blk.S_IOERR),
        (blk.T_DISCARD, 0, bytes(12) + b"\x01\0\0\0", 0, blk.S_UNSUPP),  # discard has no unmap
        (blk.T_WRITE_ZEROES, 0, bytes(12) + b"\x02\0\0\0", 0, blk.S_UNSUPP),
        (blk.T_DISCARD, 0, bytes(16) * 17, 0, blk.S_IOERR),  # more ranges than offered
        (99, 0, b"", 0, blk.S_UNSUPP),
    ],
)
def test_bad_requests_fail_alone(
    image: Path, engine: str, kind: int, sector: int, payload: bytes, length: int, status: int
) -> None:
    with attached(BlockDevice(image), engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        with pytest.raises(BlockError) as caught:
            driver.request(kind, sector, payload, length)
        assert caught.value.status == status
        driver.write(0, b"y" * 512)
        assert driver.read(0, 512) == b"y" * 512


def test_an_image_that_shrinks_under_us_is_an_io_error(image: Path, engine: str) -> None:
    with attached(BlockDevice(image), engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        os.truncate(image, 4096)
        assert driver.read(0, 4096) == bytes(4096)
        with pytest.raises(BlockError):
            driver.read(4096, 4096)
        with pytest.raises(BlockError):
            driver.read(2048, 4096)


def test_two_queues_work_side_by_side(image: Path, engine: str) -> None:
    device = BlockDevice(image, num_queues=2)
    with attached(device, engine=engine, features=DRIVER_FEATURES, num_queues=2) as session:
        drivers = [BlockDriver(session, queue=index, max_io=4096) for index in range(2)]
        for round_ in range(50):
            for index, driver in enumerate(drivers):
                driver.submit(blk.T_OUT, (2 * round_ + index) * 8, bytes([index + 1]) * 4096)
                driver.kick()
            for driver in drivers:
                ((completion, _),) = driver.collect()
                assert completion.status == blk.S_OK
    content = image.read_bytes()
    assert content[: 100 * 4096] == (b"\1" * 4096 + b"\2" * 4096) * 50


def test_the_image_is_let_go_of_with_the_device(image: Path, engine: str) -> None:
    gc.disable()  # nothing may be left to it
    try:
        device = BlockDevice(image, num_queues=2)
        with attached(device, engine=engine, features=DRIVER_FEATURES, num_queues=2) as session:
            BlockDriver(session, queue=1).write(0, bytes(4096))
        device.close()
        assert str(image) not in open_files()
    finally:
        gc.enable()


def open_files() -> list[str]:
    """What this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def test_configuration_space(image: Path) -> None:
    device = BlockDevice(image, num_queues=3)
    assert device.get_config(0, 8) == (SIZE // 512).to_bytes(8, "little")
    assert device.get_config(20, 4) == (512).to_bytes(4, "little")
    assert device.get_config(34, 2) == (3).to_bytes(2, "little")
    assert len(device.get_config(0, 256)) == 256
    device.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"x" * 511), "hold no sector"),
        (lambda path: (path.unlink(), path.mkdir()), "directory|neither"),
    ],
)
def test_an_unusable_image_is_a_device_error(image: Path, make: object, message: str) -> None:
    make(image)  # type: ignore[operator]
    with pytest.raises(DeviceError, match=message):
        BlockDevice(image)


def test_an_image_runs_for_one_writer_at_a_time(image: Path) -> None:
    """Both may have it open, as in a migration; the second is refused while the first runs."""
    with attached(BlockDevice(image), features=DRIVER_FEATURES) as first:
        with (
            pytest.raises(vp.RequestFailed),
            attached(BlockDevice(image, read_only=True), features=DRIVER_FEATURES),
        ):
            pass
        first.stop_ring(0)
        with attached(BlockDevice(image), features=DRIVER_FEATURES) as second:
            BlockDriver(second).write(0, b"z" * 512)
    with (
        attached(BlockDevice(image, read_only=True), features=DRIVER_FEATURES) as one,
        attached(BlockDevice(image, read_only=True), features=DRIVER_FEATURES) as other,
    ):
        assert BlockDriver(one).read(0, 512) == BlockDriver(other).read(0, 512) == b"z" * 512


@pytest.mark.parametrize("serial", ["x" * 21, "ümlaut"])
def test_a_serial_has_to_fit(image: Path, serial: str) -> None:
    with pytest.raises(DeviceError, match="serial"):
        BlockDevice(image, serial=serial)


@pytest.mark.parametrize("direct", [False, True])
def test_an_image_that_has_grown_has_its_new_size_for_the_next_front_end(
    image: Path, engine: str, direct: bool
) -> None:
    device = BlockDevice(image, direct=direct)
    content = b"n" * 512
    with attached(device, engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        os.truncate(image, 2 * SIZE)
        assert driver.capacity == SIZE
        with pytest.raises(BlockError):  # this one does not know of it
            driver.write(SIZE, content)
    with attached(device, engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        assert driver.capacity == 2 * SIZE
        driver.write(2 * SIZE - 512, content)
        assert driver.read(2 * SIZE - 512, 512) == content
    assert {handler.length for handler in device._handlers} <= {2 * SIZE}
    os.truncate(image, 0)  # nothing that could be a disk: it stays as it was
    assert device.get_config(0, 8) == (2 * SIZE // 512).to_bytes(8, "little")
    device.close()


@pytest.mark.parametrize(
    ("queue_size", "wanted", "seg_max"),
    [(1024, 126, 126), (128, 126, 126), (64, 126, 62), (16, 126, 14), (1024, 30, 30), (2, 126, 1)],
)
def test_a_request_without_a_table_fits_into_the_ring(
    image: Path, queue_size: int, wanted: int, seg_max: int
) -> None:
    device = BlockDevice(image, queue_size=queue_size, seg_max=wanted)
    assert device.get_config(12, 4) == seg_max.to_bytes(4, "little")
    device.close()


def test_what_the_disk_fails_is_said_with_its_place(
    image: Path, engine: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Failing(BlockDevice):
        python_types = frozenset((blk.T_IN, blk.T_OUT, blk.T_FLUSH))

    device = Failing(image)
    with attached(device, engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        with monkeypatch.context() as patch:
            patch.setattr(blk, "read_at", fail)
            patch.setattr(blk, "write_at", fail)
            patch.setattr(os, "fdatasync", fail)
            for request in (
                lambda: driver.read(4096, 1024),
                lambda: driver.write(512, bytes(2048)),
                driver.flush,
            ):
                with pytest.raises(BlockError):
                    request()
            for _ in range(10):
                with pytest.raises(BlockError):
                    driver.flush()
    device.close()
    assert f"{image}: read of 1024 bytes at sector 8 failed: Input/output error" in caplog.text
    assert f"{image}: write of 2048 bytes at sector 1 failed: Input/output error" in caplog.text
    # Those of the burst that came first, and how many there were besides.
    assert caplog.text.count(f"{image}: flush failed: Input/output error") == 3
    assert "8 similar messages were left out" in caplog.text


def test_a_file_that_takes_nothing_fails_the_request(
    image: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FUSE file system can answer 0 as often as it is asked."""

    def nothing(*_: object) -> int:
        return 0

    class Slow(BlockDevice):
        python_types = frozenset((blk.T_OUT,))

    device = Slow(image)
    with attached(device, engine=engine, features=DRIVER_FEATURES) as session:
        driver = BlockDriver(session)
        with monkeypatch.context() as patch:
            patch.setattr(blk, "write_at", nothing)
            patch.setattr(os, "pwrite", nothing)
            patch.setattr(blk, "_fallocate", lambda *_: False)
            with pytest.raises(BlockError):
                driver.write(0, bytes(512))
            with pytest.raises(BlockError):
                driver.write_zeroes(0, 4096)
        driver.write(0, bytes(512))
    device.close()


@pytest.mark.parametrize(
    "options",
    [
        {"num_queues": 70_000},
        {"num_queues": -1},
        {"num_queues": "4"},
        {"queue_size": "large"},
        {"queue_size": 1 << 16},
        {"seg_max": 1.5},
        {"seg_max": -1},
        {"serial": 5},
        {"locking": "maybe"},
    ],
    ids=repr,
)
def test_options_that_cannot_be_are_named_and_leave_nothing_open(
    image: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DeviceError, match=next(iter(options))):
        BlockDevice(image, **options)
    # What was left open would have the image marked as another back-end's.
    BlockDevice(image).close()
    assert caplog.messages == []


def test_a_path_that_no_file_can_have_is_one_error() -> None:
    with pytest.raises(DeviceError, match="null byte"):
        BlockDevice("a\0b")


@pytest.mark.parametrize(
    ("begin", "kind"), [(b"QFI\xfb\0\0\0\3", "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX")]
)
def test_an_image_of_another_format_is_one_line(
    image: Path, caplog: pytest.LogCaptureFixture, begin: bytes, kind: str
) -> None:
    BlockDevice(image).close()
    assert caplog.messages == []
    with open(image, "r+b") as file:
        file.write(begin)
    BlockDevice(image).close()
    (line,) = caplog.messages
    assert f"{image}: looks like a {kind} image" in line


def test_what_is_opened_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(DeviceError, match="neither a regular file nor a block device"):
        BlockDevice(fifo, read_only=True)
