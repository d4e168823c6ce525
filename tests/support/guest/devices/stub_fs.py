"""A file system device without files, to move its state: it counts what is asked of it.

`statfs` tells the guest the count (as the number of inodes), so a guest sees whether its device has
arrived with it. Usage: stub_fs SOCKET [--refuse]; the second refuses to load any state.
"""

from __future__ import annotations

import struct
import sys

from vhost_backend import QueueInfo, Request, VirtioDevice, serve

STATFS, INIT = 17, 26
ENOSYS = 38

# The headers and answers of linux/fuse.h.
IN_HEADER = struct.Struct("=IIQQIIII")
OUT_HEADER = struct.Struct("=IiQ")
INIT_OUT = struct.pack("=IIIIHHIIHH32x", 7, 31, 4096, 0, 8, 6, 4096, 1, 1, 0)


class StubFs(VirtioDevice):
    """virtio-fs by its numbers only; QEMU itself answers for its configuration space."""

    device_id = 26
    num_queues = 2  # one of them for what must not wait

    def __init__(self, *, refuse: bool) -> None:
        self.count = 0
        self._refuse = refuse

    def handle(self, queue: QueueInfo, request: Request) -> None:
        _, operation, unique, *_ = IN_HEADER.unpack(request.read(IN_HEADER.size))
        if not request.writable_length:
            return
        self.count += 1
        error, answer = 0, b""
        if operation == INIT:
            answer = INIT_OUT
        elif operation == STATFS:
            answer = struct.pack("=QQQQQIIII24x", 0, 0, 0, self.count, 0, 4096, 255, 4096, 0)
        else:
            error = -ENOSYS
        request.write(OUT_HEADER.pack(OUT_HEADER.size + len(answer), error, unique) + answer)

    def save_state(self) -> bytes:
        print(f"saved {self.count}", file=sys.stderr, flush=True)
        return struct.pack("<Q", self.count)

    def load_state(self, version: int, state: bytes) -> None:
        if self._refuse:
            raise ValueError("this one takes nobody in")
        (self.count,) = struct.unpack("<Q", state)
        print(f"loaded {self.count}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve(StubFs(refuse="--refuse" in sys.argv), sys.argv[1])
