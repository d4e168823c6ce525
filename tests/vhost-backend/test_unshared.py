"""A guest whose memory is not shared hangs without a word: the daemon has one."""

import logging
import threading
from pathlib import Path

import pytest

from vhost_backend import BlockDevice
from vhost_backend.control import unshared
from vhost_backend.driver import BlockDriver
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import attached

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


def test_empty_memory_and_no_request(image: Path, heard: Listening) -> None:
    device = BlockDevice(image)
    with attached(device, features=DRIVER_FEATURES):
        assert heard.told.wait(60)
    assert len(heard.lines) == 1
    assert "guest memory has to be shared" in heard.lines[0]
    heard.close()
    device.close()


def test_nothing_to_say_where_requests_come(
    image: Path, heard: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unshared, "DELAY", 3600.0)
    started: list[unshared.UnsharedMemory] = []
    begin = unshared.UnsharedMemory.ring_started

    def beginning(self: unshared.UnsharedMemory) -> None:
        begin(self)
        started.append(self)

    monkeypatch.setattr(unshared.UnsharedMemory, "ring_started", beginning)
    device = BlockDevice(image)
    with attached(device, features=DRIVER_FEATURES) as session:
        BlockDriver(session).read(0, 512)
        (memory,) = started
        memory._look()
        assert heard.lines == []
        memory._before = memory._requests()
        memory._look()  # as it would be without them
        assert len(heard.lines) == 1
    heard.close()
    device.close()
