"""A source of entropy that has none: it repeats a text. Usage: text_source SOCKET."""

from __future__ import annotations

import sys

from vhost_backend import Queue, Request, VirtioDevice, serve

TEXT = b"The quick brown fox. "


class TextSource(VirtioDevice):
    """virtio-rng."""

    device_id = 4

    def handle(self, queue: Queue, request: Request) -> None:
        length = request.writable_length
        request.write((TEXT * (length // len(TEXT) + 1))[:length])


if __name__ == "__main__":
    serve(TextSource(), sys.argv[1])
