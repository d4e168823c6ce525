"""A disk of coroutines: each request takes its own time, so they complete in any order.

    python examples/unordered_disk.py                   # try it with the embedded driver
    python examples/unordered_disk.py SOCKET IMAGE      # serve it

QEMU attaches it as any vhost-user disk (see the README). At its end it says how many requests have
completed after one that came later, and how many were given up because the ring was stopped.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys
import tempfile

from vhost_backend import QueueInfo, Request, VirtioDevice, serve

READ, WRITE, FLUSH = 0, 1, 4
UNSUPPORTED = 2
F_FLUSH = 1 << 9
SECTOR = 512


class UnorderedDisk(VirtioDevice):
    """virtio-blk (virtio 1.3, 5.2) with what a kernel needs at least."""

    device_id = 2
    status_byte = True
    features = F_FLUSH

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size // SECTOR * SECTOR
        self.config = struct.pack("<Q", self._size // SECTOR)
        self._waits = random.Random(9)
        self._last = 0
        self.begun = 0
        self.overtaken = 0
        self.given_up = 0

    async def handle(self, queue: QueueInfo, request: Request) -> None:
        """Wait up to 20 ms, as for a distant store, then do what was asked."""
        self.begun += 1
        number = self.begun
        kind, sector = struct.unpack("<I4xQ", request.read(16))
        try:
            await asyncio.sleep(self._waits.uniform(0, 0.02))
        except asyncio.CancelledError:
            # The ring is stopped, and whoever goes on with it executes the request.
            self.given_up += 1
            raise
        offset = sector * SECTOR
        length = request.writable_length if kind == READ else request.readable_length - 16
        if kind in (READ, WRITE) and (length % SECTOR or offset + length > self._size):
            request.status = self.error_status
        elif kind == READ:
            request.write(os.pread(self._fd, length, offset))
        elif kind == WRITE:
            os.pwrite(self._fd, request.read(), offset)
        elif kind == FLUSH:
            os.fdatasync(self._fd)
        else:
            request.status = UNSUPPORTED
        self.overtaken += number < self._last
        self._last = max(self._last, number)

    def close(self) -> None:
        """Close the image and say how it went."""
        os.close(self._fd)
        print(
            f"{self.overtaken} of {self.begun} were overtaken, {self.given_up} given up",
            file=sys.stderr,
            flush=True,
        )


def try_it() -> None:
    """Read eight sectors at once, and show in which order they come."""
    from vhost_backend.testing import BlockDriver, attached

    with tempfile.NamedTemporaryFile() as image:
        image.write(b"".join(bytes([number]) * SECTOR for number in range(8)))
        image.flush()
        device = UnorderedDisk(image.name)
        with attached(device) as session:
            driver = BlockDriver(session, depth=8)
            for number in range(8):
                driver.submit(READ, number, length=SECTOR, tag=number)
            driver.kick()
            while driver.in_flight:
                for completion, data in driver.collect():
                    print(f"sector {completion.tag} holds {data[0]}")
        device.close()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(UnorderedDisk(sys.argv[2]), sys.argv[1])
    elif len(sys.argv) == 1:
        try_it()
    else:
        sys.exit("usage: python examples/unordered_disk.py [SOCKET IMAGE]")
