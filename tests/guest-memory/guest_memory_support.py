"""Helpers of these tests: files to map, a mapper that maps on demand, a look at our own process."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest_memory import GuestAddress, Mapping, Region, UserAddress

USER = 1 << 46


def region(
    guest: int, size: int, offset: int = 0, *, user: int | None = None, flags: int = 0
) -> Region:
    """A region whose user addresses follow from its guest addresses."""
    if user is None:
        user = (guest + USER) % (1 << 64)
    return Region(GuestAddress(guest), size, UserAddress(user), offset, flags)


@contextmanager
def memfd(size: int, seals: int = 0) -> Iterator[int]:
    """An open memfd; ``seals`` as for F_ADD_SEALS."""
    import fcntl

    fd = os.memfd_create("guest-memory-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seals:
            fcntl.fcntl(fd, 1033, seals)
        yield fd
    finally:
        os.close(fd)


SEALED = 2 | 4
NAME = "guest-memory-test"


def mapped(name: str = NAME) -> int:
    """How many mappings of this process show ``name``."""
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def open_fds() -> set[str]:
    """Open descriptors of this process, as ``number -> target`` strings."""
    result = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            result.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:  # the listing's own descriptor
            continue
    return result


class DemandMapping:
    """Memory that is there only while it is pinned: each pin is a copy of a page range."""

    def __init__(self, owner: "DemandMapper", region: Region) -> None:
        self.owner = owner
        self.region = region
        self.size = region.size
        self.page_size = 4096
        self.host_address = None
        self.poisoned = False
        self.closed = 0

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        offset = address - self.region.guest_address
        assert length > 0
        assert offset >= 0
        assert offset + length <= self.size
        with self.owner.lock:
            if self.owner.refuse:
                raise self.owner.refuse
            self.owner.pins += 1
            self.owner.history.append((address, length, access))
        return ctypes.addressof(self.owner.memory(self.region)) + offset, (self, address)

    def unpin(self, token: Any) -> None:
        assert token[0] is self
        with self.owner.lock:
            self.owner.pins -= 1

    def close(self) -> None:
        self.closed += 1
        self.owner.closed += 1


class DemandMapper:
    """Maps on demand, over plain memory of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pins = 0
        self.closed = 0
        self.count = 0
        self.refuse: Exception | None = None
        self.history: list[tuple[int, int, int]] = []
        self._memory: dict[Region, Any] = {}

    def memory(self, region: Region) -> Any:
        """The bytes behind a region."""
        return self._memory[region]

    def map(self, region: Region, fd: int | None) -> Mapping:
        self.count += 1
        self._memory[region] = (ctypes.c_ubyte * region.size)()
        return DemandMapping(self, region)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with this folder importable."""
    environment = dict(os.environ)
    folder = str(Path(__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        [folder, *(path for path in sys.path if path and Path(path).exists())]
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
