"""Fixtures for the daemon's tests: an image, and both ring engines."""

import sys
from pathlib import Path

import pytest

from vhost_backend import VhostUserDaemon, VringMutex, VringRwLock
from virtqueue import available_engines

# Helper modules of this folder are importable under every import mode of pytest.
sys.path.insert(0, str(Path(__file__).parent))

IMAGE_SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk image of zeroes."""
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(IMAGE_SIZE)
    return path


@pytest.fixture(params=["c", "python"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each ring engine; the C engine is left out only where it was not built on purpose."""
    name = str(request.param)
    if name not in available_engines():
        pytest.skip("this installation has no C engine")
    return name


@pytest.fixture(params=[VringMutex, VringRwLock])
def every_flavour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flavour of vring, in every daemon that the test makes without naming one."""
    defaults = VhostUserDaemon.__init__.__kwdefaults__
    assert defaults is not None
    assert "vring" in defaults
    monkeypatch.setitem(defaults, "vring", request.param)
