"""Two disks on two sockets, served by one process.

    python examples/two_disks.py IMAGE SOCKET IMAGE SOCKET

Each has a daemon of its own: threads, memory and front-ends are not shared. Any number will do.
"""

from __future__ import annotations

import sys

from vhost_backend import BlockDevice, serve_all

if __name__ == "__main__":
    images, sockets = sys.argv[1::2], sys.argv[2::2]
    if not images or len(images) != len(sockets):
        sys.exit("usage: python examples/two_disks.py IMAGE SOCKET [IMAGE SOCKET ...]")
    serve_all((BlockDevice(image), socket) for image, socket in zip(images, sockets, strict=True))
