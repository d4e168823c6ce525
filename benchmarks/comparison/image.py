"""The disk image that the block devices serve."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

IMAGE_BYTES = 256 << 20


@contextlib.contextmanager
def image_file(folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """Make a folder for sockets, and in it an image of random content in the page cache.

    It lies on a disk, because O_DIRECT on tmpfs reads memory. It is written page by page in random
    order, because a guest does so; docs/performance-decisions.md says what that changes.
    """
    disk = Path("/var/tmp")
    base = folder or (disk if os.access(disk, os.W_OK) else None)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=base) as name:
        image = Path(name) / "image"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
            for page in random.Random(1).sample(range(IMAGE_BYTES >> 12), IMAGE_BYTES >> 12):
                os.pwrite(file.fileno(), os.urandom(1 << 12), page << 12)
            os.fsync(file.fileno())
        yield Path(name), image
