"""SIGKILL at random instants, in the middle of requests: `kill_device` has the long form."""

import contextlib
import importlib.util
import os
import struct
import time
from pathlib import Path
from types import ModuleType

import pytest

from vhost_backend import BlockDevice
from vhost_backend.devices.blk import T_FLUSH
from vhost_backend.testing import BlockDriver, DeviceProcess
from virtqueue import EngineName


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "kill_device", Path(__file__).with_name("kill_device.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_no_request_is_lost_or_repeated(
    tmp_path: Path, engine: EngineName, packed: bool, in_order: bool
) -> None:
    """Fifty kills each way, thirty in order."""
    kills = 30 if in_order else 50
    figures = _load().kill_repeatedly(
        *(tmp_path / "disk.img", kills),
        packed=packed,
        in_order=in_order,
        engine=engine,
        seed=2 + packed,
    )
    assert figures.startswith(f"{kills} kills")
    assert figures.endswith("none lost, none repeated")


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_completed_and_never_signalled_is_announced(
    tmp_path: Path, engine: EngineName, packed: bool
) -> None:
    """A back-end may die between used ring and signal, and the driver wait for just that."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with (
        DeviceProcess(lambda: BlockDevice(image), engine=engine) as process,
        process.connect(inflight=True, packed=packed) as session,
    ):
        vring = session.vrings[0]
        disk = BlockDriver(session)
        disk.write(0, b"x" * 512)
        session.frontend.set_vring_call(0, None)  # its signals are lost from here on
        header, status = session.allocate(16), session.allocate(1)
        session.memory.write(header, struct.pack("<IIQ", T_FLUSH, 0, 0))
        identity = vring.submit([(header, 16)], [(status, 1)])
        vring.kick()
        deadline = time.monotonic() + 60
        while not vring.queue.enable_notification():
            assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(vring.call_fd)
        process.kill_and_reconnect(session)
        assert os.eventfd_read(vring.call_fd) >= 1
        assert [head for head, _ in vring.completions()] == [identity]
