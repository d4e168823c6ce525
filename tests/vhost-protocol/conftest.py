"""Makes the helpers beside the tests importable; the folder cannot be a package of that name."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    """Fail when a test leaves more descriptors open than it found."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    after = set(os.listdir("/proc/self/fd"))
    assert len(after) <= len(before), f"left open: {sorted(after - before)}"


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """A few descriptors to pass."""
    made = [os.memfd_create(f"passed-{n}") for n in range(3)]
    yield made
    for fd in made:
        os.close(fd)


@pytest.fixture
def full_listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A listener on `full` that takes no more connections before one is accepted."""
    path = str(tmp_path / "full")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        yield listener
