"""Transfers over memory that a test laid out itself, and other builds of the engine."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from virtqueue import SEGMENT, SegmentFlags
from virtqueue.c_library import Library

BUILD = Path(__file__).parents[2] / "packages" / "virtqueue" / "hatch_build.py"
FAULTS = Path(__file__).parent / "c" / "uring_faults.c"
EVERYTHING = "-DVQ_NO_CHOICE"
"""Reads and writes all go through the ring, also those that are better made at once."""
FAULTY = ("-Dsyscall=faulty_syscall", str(FAULTS))


def build(path: Path, *flags: str) -> Library:
    """The engine built with further flags; the test is skipped where nothing can compile it."""
    # The engine itself may have been built by the ziglang of a build environment that is gone.
    if shutil.which("cc") is None and importlib.util.find_spec("ziglang") is None:
        pytest.skip("no C compiler and no ziglang")
    arguments = ["--output", str(path), *(f"--flag={flag}" for flag in flags)]
    subprocess.run([sys.executable, BUILD, *arguments], check=True, capture_output=True)
    return Library(path)


class Pieces:
    """Anonymous memory, and the `SEGMENT` arrays of chains in it."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size, mmap.MAP_SHARED)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._arrays: list[ctypes.Array[ctypes.c_char]] = []

    def chain(self, pieces: Sequence[tuple[int, int]], writable: bool) -> tuple[int, int]:
        """(address, count) of the segments of a chain of (offset, length) pieces."""
        flags = SegmentFlags.WRITABLE if writable else 0
        raw = b"".join(
            SEGMENT.pack(self.base + offset, 0, length, flags, 0) for offset, length in pieces
        )
        array = ctypes.create_string_buffer(raw, len(raw))
        self._arrays.append(array)
        return ctypes.addressof(array), len(pieces)


def ring_fds() -> list[int]:
    """The io_urings that this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[io_uring]":
                found.append(int(name))
        except FileNotFoundError:
            continue  # the listing's own
    return found
