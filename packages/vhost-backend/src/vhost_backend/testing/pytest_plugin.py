"""Fixtures for pytest; the only module that imports pytest.

- `attach(device, **options)`: a `DriverSession` with the device, in this process; see `attached`.
- `device_process(make, **options)`: a `DeviceProcess`, to be killed and restarted.

At its end a test closes what it has opened, in reverse order, and fails if its device has logged an
error. `with expect_errors(pattern):` is for errors that the test expects. To have the fixtures,
write in the top conftest.py:

    pytest_plugins = ["vhost_backend.testing.pytest_plugin"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import pytest

from ..backend import VhostUserBackend
from ..device.base import VirtioDevice
from ..driver import DriverSession
from .harness import attached
from .logged import raise_pending
from .process import DeviceProcess


class Attach(Protocol):
    """The type of the fixture `attach`."""

    def __call__(self, device: VirtioDevice | VhostUserBackend, **options: Any) -> DriverSession:
        """Attach a driver to `device`; `options` are those of `vhost_backend.testing.attached`."""


class StartProcess(Protocol):
    """The type of the fixture `device_process`."""

    def __call__(
        self, make: Callable[[], VirtioDevice | VhostUserBackend], **options: Any
    ) -> DeviceProcess:
        """Start a process; `options` are those of `vhost_backend.testing.DeviceProcess`."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail the test when its device has logged an error."""
    yield
    raise_pending()


@pytest.fixture
def attach() -> Iterator[Attach]:
    """`attach(device, **options)` runs a device and returns a driver's session with it."""
    with contextlib.ExitStack() as stack:
        yield lambda device, **options: stack.enter_context(attached(device, **options))


@pytest.fixture
def device_process() -> Iterator[StartProcess]:
    """`device_process(make, **options)` runs a device in a process that a test may kill."""
    with contextlib.ExitStack() as stack:
        yield lambda make, **options: stack.enter_context(DeviceProcess(make, **options))
