"""A disk on something that is no file: an image below, changes above it, compressed in memory.

    python examples/overlay_disk.py                     # try it with the embedded driver
    python examples/overlay_disk.py SOCKET IMAGE        # serve it

The image is never written; what a guest changes is gone when the process ends. QEMU attaches it as
any vhost-user disk (see the README). Whatever can read and write a range fits in the same way:
replace `Overlay`.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import zlib

from vhost_backend import QueueInfo, Request, VirtioDevice, serve

READ, WRITE, FLUSH = 0, 1, 4
UNSUPPORTED = 2
SECTOR = 512
CLUSTER = 16384


class Overlay:
    """`size` bytes: those of the file at `path` until they are written."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size // SECTOR * SECTOR
        self._changed: dict[int, bytes] = {}

    def _cluster(self, number: int) -> bytes:
        packed = self._changed.get(number)
        if packed is not None:
            return zlib.decompress(packed)
        return os.pread(self._fd, CLUSTER, number * CLUSTER).ljust(CLUSTER, b"\0")

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from byte `offset`."""
        first, last = offset // CLUSTER, (offset + length - 1) // CLUSTER
        data = b"".join(self._cluster(number) for number in range(first, last + 1))
        return data[offset - first * CLUSTER :][:length]

    def write(self, offset: int, data: bytes) -> None:
        """Put `data` at byte `offset`."""
        while data:
            number, start = divmod(offset, CLUSTER)
            piece, data = data[: CLUSTER - start], data[CLUSTER - start :]
            cluster = bytearray(self._cluster(number))
            cluster[start : start + len(piece)] = piece
            self._changed[number] = zlib.compress(cluster, 1)
            offset += len(piece)

    @property
    def held(self) -> int:
        """Bytes of memory that the changes take up."""
        return sum(map(len, self._changed.values()))

    def close(self) -> None:
        """Forget the changes."""
        self._changed.clear()
        os.close(self._fd)


class OverlayDisk(VirtioDevice):
    """virtio-blk (virtio 1.3, 5.2). It offers no FLUSH: there is nothing to be made durable."""

    device_id = 2
    status_byte = True

    def __init__(self, path: str) -> None:
        self.store = Overlay(path)
        self.config = struct.pack("<Q", self.store.size // SECTOR)

    def handle(self, queue: QueueInfo, request: Request) -> None:
        """Read or write; a range that is not on the disk is an I/O error."""
        kind, sector = struct.unpack("<I4xQ", request.read(16))
        offset = sector * SECTOR
        length = request.writable_length if kind == READ else request.readable_length - 16
        if kind not in (READ, WRITE):
            request.status = UNSUPPORTED
        elif length % SECTOR or offset + length > self.store.size:
            request.status = self.error_status
        elif kind == READ:
            request.write(self.store.read(offset, length))
        else:
            self.store.write(offset, request.read())

    def close(self) -> None:
        """Forget the changes."""
        self.store.close()


def try_it() -> None:
    """Change a megabyte of a disk and see that its image is as it was."""
    from vhost_backend.testing import BlockDriver, attached

    content = b"as it was".ljust(SECTOR) * 4096
    with tempfile.NamedTemporaryFile() as image:
        image.write(content)
        image.flush()
        device = OverlayDisk(image.name)
        with attached(device) as session:
            driver = BlockDriver(session)
            driver.write(4096, b"changed".ljust(SECTOR) * 2048)
            print(driver.read(4096, SECTOR).decode().strip())
            print(driver.read(0, SECTOR).decode().strip())
        print(f"1 MiB of changes takes {device.store.held / 1024:.0f} KiB")
        device.close()
        image.seek(0)
        print("the image is", "as it was" if image.read() == content else "damaged")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(OverlayDisk(sys.argv[2]), sys.argv[1])
    elif len(sys.argv) == 1:
        try_it()
    else:
        sys.exit("usage: python examples/overlay_disk.py [SOCKET IMAGE]")
