"""A network device of one queue pair that sends every frame back, and counts what passes.

An ARP request is answered for whatever address it asks for, and a ping by its target; every other
frame comes back as it was. Usage: echo_net SOCKET [--connect]; with the second it connects to a
front-end that listens there. When it ends it prints its counts as one line of JSON.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType

from vhost_backend import VhostUserBackendBase, VhostUserDaemon, VirtioFeature, Vring
from virtqueue import Chain

RECEIVE, TRANSMIT = 0, 1
BATCH = 64
TURNS = 16  # then the worker looks whether a ring is to be stopped

# struct virtio_net_hdr: no offloads, and the frame lies in one buffer.
HEADER = bytes(10) + b"\1\0"
OUR_MAC = bytes.fromhex("02000000ec40")
ARP, IPV4, ICMP, ECHO_REQUEST = b"\x08\x06", b"\x08\x00", 1, 8


@dataclass
class Counts:
    """Frames and their bytes without virtio's header, as the device sees them."""

    received: int = 0
    received_bytes: int = 0
    echoed: int = 0
    echoed_bytes: int = 0
    too_long: int = 0


class EchoNet(VhostUserBackendBase):
    """Takes a receive buffer only when there is a frame for it: a stop finds nothing held back."""

    def __init__(self) -> None:
        self.counts = Counts()

    def num_queues(self) -> int:
        """One to receive, one to transmit."""
        return 2

    def features(self) -> int:
        """What concerns the rings; nothing of a network device's own."""
        return (
            VirtioFeature.VERSION_1
            | VirtioFeature.RING_PACKED
            | VirtioFeature.INDIRECT_DESC
            | VirtioFeature.EVENT_IDX
        )

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Move frames from one ring to the other, whichever of them was kicked."""
        return all(self._move(*vrings) for _ in range(TURNS))

    def _move(self, receive_ring: Vring, transmit_ring: Vring) -> bool:
        """One batch; False when a ring has nothing to give and has asked for kicks."""
        with receive_ring.get_mut() as receive, transmit_ring.get_mut() as transmit:
            room = receive.take(BATCH)
            if not room:
                return False
            sent = transmit.take(len(room)) or ()
            assert receive.queue is not None
            receive.queue.rewind(len(room) - len(sent))
            for frame, buffer in zip(sent, room, strict=True):
                receive.add_used(buffer, self._echo(frame.read()[len(HEADER) :], buffer))
                transmit.add_used(frame, 0)
            receive.signal_used_queue()
            transmit.signal_used_queue()
            return bool(sent)

    def _echo(self, frame: bytes, buffer: Chain) -> int:
        """Answer one frame; how many bytes of the buffer are used."""
        counts = self.counts
        counts.received += 1
        counts.received_bytes += len(frame)
        reply = answer(frame)
        if buffer.writable_length < len(HEADER) + len(reply):
            counts.too_long += 1
            return 0
        buffer.write(HEADER)
        buffer.write(reply)
        counts.echoed += 1
        counts.echoed_bytes += len(reply)
        return buffer.written


def answer(frame: bytes) -> bytes:
    """What comes back for an Ethernet frame."""
    kind = frame[12:14]
    if kind == ARP and frame[20:22] == b"\0\1":
        sender, target = frame[22:32], frame[38:42]
        return sender[:6] + OUR_MAC + frame[12:20] + b"\0\2" + OUR_MAC + target + sender
    # An IPv4 header without options; its checksum does not change when addresses change places.
    if kind == IPV4 and frame[14] == 0x45 and frame[23] == ICMP and frame[34] == ECHO_REQUEST:
        (checksum,) = struct.unpack_from(">H", frame, 36)
        checksum += ECHO_REQUEST << 8
        checksum = (checksum & 0xFFFF) + (checksum >> 16)
        addresses = frame[30:34] + frame[26:30]
        icmp = struct.pack(">xxH", checksum) + frame[38:]
        return frame[6:12] + frame[:6] + frame[12:26] + addresses + icmp
    return frame


def main(path: str, *, connect: bool) -> None:
    """Serve until SIGTERM."""
    device = EchoNet()
    with VhostUserDaemon("echo", device) as daemon:

        def end(number: int, frame: FrameType | None) -> None:
            daemon.shutdown()

        signal.signal(signal.SIGTERM, end)
        if connect:
            daemon.start_client(path, reconnect=True)
            daemon.wait()
        else:
            daemon.serve_forever(path)
    print(json.dumps(asdict(device.counts)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], connect="--connect" in sys.argv)
