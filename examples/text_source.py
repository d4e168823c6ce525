"""A device in fifteen lines: a source of entropy that has none, and repeats a text.

    python examples/text_source.py              # try it with the embedded driver
    python examples/text_source.py SOCKET       # serve it

QEMU attaches it, next to shared memory (see the README), with

    -chardev socket,id=rng,path=SOCKET,reconnect=1 -device vhost-user-rng-pci,chardev=rng

and a Linux guest then reads the text from /dev/hwrng.
"""

from __future__ import annotations

import sys

from vhost_backend import QueueInfo, Request, VirtioDevice, serve

TEXT = b"The quick brown fox. "


class TextSource(VirtioDevice):
    """virtio-rng (virtio 1.3, 5.4): each request is room to fill."""

    device_id = 4

    def handle(self, queue: QueueInfo, request: Request) -> None:
        """Fill all of it."""
        length = request.writable_length
        request.write((TEXT * (length // len(TEXT) + 1))[:length])


def try_it() -> None:
    """Ask for 50 bytes, as a guest would."""
    from vhost_backend.testing import attached

    with attached(TextSource()) as session:
        room, vring = session.allocate(50), session.vrings[0]
        vring.submit(readable=[], writable=[(room, 50)])
        vring.kick()
        ((_, written),) = vring.completions()
        print(session.memory.read(room, written).decode())


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(TextSource(), sys.argv[1])
    elif len(sys.argv) == 1:
        try_it()
    else:
        sys.exit("usage: python examples/text_source.py [SOCKET]")
