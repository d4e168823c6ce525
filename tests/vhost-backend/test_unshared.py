"""A guest whose memory is not shared hangs without a word: the daemon has one."""

import logging
import socket
import threading
from pathlib import Path

import pytest

import vhost_protocol as vp
from guest_memory import MemoryHolder
from vhost_backend import BlockDevice, DeviceBackend, VhostUserDaemon
from vhost_backend.control import unshared
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import attached

pytestmark = pytest.mark.usefixtures("every_flavour")

SAID = "share=on"


class Listening(logging.Handler):
    """Tells when the word has come."""

    def __init__(self) -> None:
        super().__init__()
        self.told = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if SAID in record.getMessage():
            self.lines.append(record.getMessage())
            self.told.set()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Listening:
    monkeypatch.setattr(unshared, "DELAY", 0.2)
    handler = Listening()
    log = logging.getLogger("vhost_backend")
    log.addHandler(handler)
    monkeypatch.setattr(handler, "close", lambda: log.removeHandler(handler))
    return handler


def test_blank_rings_and_no_request(image: Path, heard: Listening) -> None:
    device = BlockDevice(image)
    with attached(device, features=DRIVER_FEATURES):
        assert heard.told.wait(60)
    assert len(heard.lines) == 1
    assert "its memory is not shared" in heard.lines[0]
    heard.close()
    device.close()


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_say_where_requests_come(image: Path, packed: bool) -> None:
    device = BlockDevice(image)
    holder = MemoryHolder()
    ours, theirs = socket.socketpair()
    with VhostUserDaemon("disk", DeviceBackend(device), holder) as daemon:
        daemon.start_connection(theirs)
        with DriverSession(
            vp.Frontend(ours, timeout=60), features=DRIVER_FEATURES, packed=packed
        ) as session:
            doubt = unshared.UnsharedMemory("disk", daemon.vrings, holder)
            assert doubt.is_likely()
            BlockDriver(session).read(0, 512)
            assert not doubt.is_likely()
            session.stop_ring(0)
            assert not doubt.is_likely()
    device.close()
