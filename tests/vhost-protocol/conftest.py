"""Makes the helpers beside the tests importable; the folder cannot be a package of that name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

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
