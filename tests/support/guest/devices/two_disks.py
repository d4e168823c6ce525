"""Two disks on two sockets, served by one process. Usage: two_disks IMAGE SOCKET IMAGE SOCKET."""

from __future__ import annotations

import sys

from vhost_backend import BlockDevice, serve_all

if __name__ == "__main__":
    images, sockets = sys.argv[1::2], sys.argv[2::2]
    serve_all((BlockDevice(image), socket) for image, socket in zip(images, sockets, strict=True))
