"""A disk of coroutines: each request takes its own time, so they complete in any order.

Usage: unordered_disk SOCKET IMAGE. At its end it says how many requests an earlier one has waited
for in vain, and how many were given up because the ring stopped.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys

from vhost_backend import Queue, Request, VirtioDevice, serve

READ, WRITE, FLUSH = 0, 1, 4
FLUSHES = 1 << 9


class UnorderedDisk(VirtioDevice):
    """virtio-blk with what a kernel needs at least."""

    device_id = 2
    status_byte = True
    features = FLUSHES

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.config = struct.pack("<Q", os.fstat(self._fd).st_size // 512)
        self._waits = random.Random(9)
        self._begun = 0
        self._last = 0
        self.overtaken = 0
        self.given_up = 0

    async def handle(self, queue: Queue, request: Request) -> None:
        self._begun += 1
        number = self._begun
        kind, _, sector = struct.unpack("<IIQ", request.read(16))
        try:
            await asyncio.sleep(self._waits.uniform(0, 0.02))
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if kind == READ:
            request.write(os.pread(self._fd, request.writable_length - 1, sector * 512))
        elif kind == WRITE:
            os.pwrite(self._fd, request.read(), sector * 512)
        elif kind != FLUSH:
            request.status = 2
        self.overtaken += number < self._last
        self._last = max(self._last, number)

    def close(self) -> None:
        os.close(self._fd)
        print(
            f"{self.overtaken} of {self._begun} were overtaken, {self.given_up} given up",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    serve(UnorderedDisk(sys.argv[2]), sys.argv[1])
