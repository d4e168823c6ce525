"""A network device that echoes, drops or makes packets, written in two ways.

It handles its rings itself (`VhostUserBackendBase`), because no request of the driver brings a
received packet: the worker of the transmit ring fills the buffers of the receive ring. ``--work``
chooses a forwarding mode of testpmd:

- ``echo`` (io): send every packet back to the driver;
- ``sink`` (rxonly): count and drop the driver's packets;
- ``source`` (txonly): fill the driver's receive buffers.

``records`` touches each packet in Python; in ``batch`` numpy moves a whole batch.
"""

from __future__ import annotations

import argparse
import signal
import struct
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import numpy as np

from vhost_backend import (
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioFeature,
    Vring,
    VringState,
)
from virtqueue import DONE, RECORD_FIELDS, Batch, RecordFlags

F_MRG_RXBUF = 1 << 15
FEATURES = (
    F_MRG_RXBUF
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.VERSION_1
    | VirtioFeature.RING_PACKED
)
# struct virtio_net_hdr: no offloads, and the packet lies in one buffer.
HEADER = struct.pack("<10xH", 1)
RECEIVE, TRANSMIT = 0, 1
BATCH = 128
TURN = 8
SPIN = 0.0001  # seconds at the rings before the worker releases their locks

# Fields of virtqueue.RECORD. SENT, of a transmit chain: readable, readable_length, flags,
# segment_count. ROOM, of a receive chain: writable, writable_length, flags, segment_count.
SENT = struct.Struct("=16xQ16xI4x2xHH10x")
ROOM = struct.Struct("=24xQ12xI2xHH10x")
# The record holds the first 16 bytes of a transmit chain: virtio's header and 4 of the packet.
IN_RECORD = 16 - len(HEADER)
PLAIN = int(RecordFlags.READABLE_CONTIGUOUS)
FREE = int(RecordFlags.WRITABLE_CONTIGUOUS)
WRITTEN = struct.Struct("=I")  # the last field of a DONE entry, from its byte 4
PACKET = bytes((2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xB5)).ljust(60, b"\0")


class Net(VhostUserBackendBase):
    """Serves both rings of a pair with one worker; a style defines `move`, `make` and `count`."""

    def __init__(self, work: str, pairs: int, busy_poll: float) -> None:
        self._pairs = pairs
        self._busy_poll = busy_poll
        self._idle_since = [0.0] * pairs
        self._event = {"echo": self._echo, "sink": self._sink, "source": self._source}[work]
        self.packets = 0

    def num_queues(self) -> int:
        """Return two for each pair."""
        return 2 * self._pairs

    def features(self) -> int:
        """Offer ring features, and mergeable receive buffers, which this device never merges."""
        return FEATURES

    def queues_per_thread(self) -> Sequence[int]:
        """Give each pair a worker."""
        return [3 << 2 * pair for pair in range(self._pairs)]

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        """Serve the pair, after a kick of either ring."""
        with vrings[RECEIVE].get_mut() as receive, vrings[TRANSMIT].get_mut() as transmit:
            if not (receive.running and transmit.running):
                return False
            receive.disable_notification()
            transmit.disable_notification()
            return self._event(receive, transmit, thread_id)

    def _empty(self, ring: VringState, pair: int) -> bool:
        """Look at an empty ring for a while; return whether to come back without a kick."""
        assert ring.queue is not None
        now = time.monotonic()
        if not self._idle_since[pair]:
            self._idle_since[pair] = now
        if now - self._idle_since[pair] >= self._busy_poll:
            return False
        ready, end = ring.queue.ready, now + SPIN
        while not ready():
            if time.monotonic() > end:
                return True
        return True

    def _take(self, ring: VringState, pair: int) -> Batch | bool:
        """Take the next batch, or return whether to come back without a kick."""
        assert ring.queue is not None
        if self._busy_poll and not ring.queue.ready():
            ring.cycle(0)  # completes, and takes nothing
            if self._empty(ring, pair):
                return True
        batch = ring.cycle(BATCH)
        if not batch:
            return False  # the take has asked the driver for kicks
        self._idle_since[pair] = 0.0
        return batch

    def _echo(self, receive: VringState, transmit: VringState, pair: int) -> bool:
        for _ in range(TURN):
            sent = self._take(transmit, pair)
            if isinstance(sent, bool):
                return sent
            assert transmit.queue is not None
            count = len(sent)
            room = receive.cycle(count)
            found = len(room) if room else 0
            if found < count:
                transmit.queue.rewind(count - found)
            if not room:
                transmit.cycle(0)
                return False  # the take has asked the driver for a kick with new buffers
            assert receive.queue is not None
            assert receive.queue.window is not None
            used = self.move(receive.queue.window, sent, room)
            if used < found:
                receive.queue.rewind(found - used)
            receive.cycle(0)
        transmit.cycle(0)
        return True

    def _sink(self, receive: VringState, transmit: VringState, pair: int) -> bool:
        for _ in range(TURN):
            sent = self._take(transmit, pair)
            if isinstance(sent, bool):
                return sent
            self.count(sent)
        transmit.cycle(0)
        return True

    def _source(self, receive: VringState, transmit: VringState, pair: int) -> bool:
        for _ in range(TURN):
            room = self._take(receive, pair)
            if isinstance(room, bool):
                return room
            assert receive.queue is not None
            assert receive.queue.window is not None
            self.make(receive.queue.window, room)
        receive.cycle(0)
        return True

    def move(self, window: memoryview, sent: Batch, room: Batch) -> int:
        """Copy the sent packets into receive buffers; return the number of used buffers."""
        raise NotImplementedError

    def make(self, window: memoryview, room: Batch) -> None:
        """Fill the receive buffers with packets of our own."""
        raise NotImplementedError

    def count(self, sent: Batch) -> None:
        """Count the sent packets."""
        raise NotImplementedError

    def move_slowly(self, sent: Batch, room: Batch) -> int:
        """Move packets of any form through chain objects; drop a packet that does not fit."""
        used = 0
        for chain in sent:
            packet = chain.read()[len(HEADER) :]
            target = room[used]
            if target.writable_length < len(HEADER) + len(packet):
                continue
            target.write(HEADER)
            target.write(packet)
            DONE.pack_into(room.done, used * DONE.size, target.head, 0, 0, target.written)
            used += 1
        return used


class Records(Net):
    """Python touches each packet, in the cheapest form."""

    def move(self, window: memoryview, sent: Batch, room: Batch) -> int:
        """Copy each packet with two slices of the window."""
        put, done, position = WRITTEN.pack_into, room.done, 4
        head, extra = len(HEADER), 16
        for (readable, length, flags, pieces), (writable, space, form, parts) in zip(
            SENT.iter_unpack(sent.records), ROOM.iter_unpack(room.records), strict=True
        ):
            size = extra + length
            if pieces != 1 or parts != 1 or not flags & PLAIN or not form & FREE or size > space:
                return self.move_slowly(sent, room)
            start = writable + head
            window[writable:start] = HEADER
            window[start : writable + size] = window[readable - IN_RECORD : readable + length]
            put(done, position, size)
            position += 8
        return len(sent)

    def make(self, window: memoryview, room: Batch) -> None:
        """Write each packet with one slice."""
        put, done, position = WRITTEN.pack_into, room.done, 4
        packet = HEADER + PACKET
        size = len(packet)
        for writable, space, form, _ in ROOM.iter_unpack(room.records):
            if not form & FREE or size > space:
                raise ValueError("a receive buffer is in pieces, or too short")
            window[writable : writable + size] = packet
            put(done, position, size)
            position += 8

    def count(self, sent: Batch) -> None:
        """Look at each packet's length."""
        for _, length, _, _ in SENT.iter_unpack(sent.records):
            if length + IN_RECORD >= 60:
                self.packets += 1


RECORDS: Any = np.dtype(RECORD_FIELDS)
ENTRIES = np.dtype([("rest", "V4"), ("written", "u4")])


class Batches(Net):
    """numpy moves a batch of packets of one length by one assignment."""

    def __init__(self, work: str, pairs: int, busy_poll: float) -> None:
        super().__init__(work, pairs, busy_poll)
        self._views: dict[int, Any] = {}
        self._window: memoryview | None = None

    def _pieces(self, window: memoryview, size: int) -> Any:
        """View the window as an array of pieces of `size` bytes, one at each byte."""
        if window is not self._window:
            self._views, self._window = {}, window
        view = self._views.get(size)
        if view is None:
            view = np.ndarray((len(window) - size + 1,), f"V{size}", window, 0, (1,))
            self._views[size] = view
        return view

    def move(self, window: memoryview, sent: Batch, room: Batch) -> int:
        """Copy the packets with one assignment, and their headers with another."""
        source, target = np.frombuffer(sent.records, RECORDS), np.frombuffer(room.records, RECORDS)
        lengths = source["readable_length"]
        length = int(lengths[0])
        size = 16 + length
        if (
            (lengths != length).any()
            or (source["segment_count"] != 1).any()
            or (target["segment_count"] != 1).any()
            or not (source["flags"] & target["flags"] >> 1 & PLAIN).all()
            or (target["writable_length"] < size).any()
        ):
            return self.move_slowly(sent, room)
        packets = self._pieces(window, length + IN_RECORD)
        headers = self._pieces(window, len(HEADER))
        to = target["writable"].astype(np.intp)
        headers[to] = np.void(HEADER)
        packets[to + len(HEADER)] = packets[source["readable"].astype(np.intp) - IN_RECORD]
        np.frombuffer(room.done, ENTRIES)["written"] = size
        return len(sent)

    def make(self, window: memoryview, room: Batch) -> None:
        """Write the packets with one assignment."""
        target = np.frombuffer(room.records, RECORDS)
        size = len(HEADER) + len(PACKET)
        if (target["writable_length"] < size).any() or not (target["flags"] & FREE).all():
            raise ValueError("a receive buffer is in pieces, or too short")
        pieces = self._pieces(window, size)
        pieces[target["writable"].astype(np.intp)] = np.void(HEADER + PACKET)
        np.frombuffer(room.done, ENTRIES)["written"] = size

    def count(self, sent: Batch) -> None:
        """Count the whole batch."""
        self.packets += len(sent)


STYLES = {"records": Records, "batch": Batches}


def main() -> None:
    """Serve one of the devices until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket-path", required=True, help="listen here")
    parser.add_argument("--style", choices=sorted(STYLES), default="records", help="way of writing")
    parser.add_argument(
        "--work", choices=("echo", "sink", "source"), default="echo", help="forwarding mode"
    )
    parser.add_argument("--pairs", type=int, default=1, help="pairs of rings (1)")
    parser.add_argument(
        "--busy-poll",
        type=float,
        default=0.0,
        metavar="MICROSECONDS",
        help="look at empty rings for this long before sleeping (0)",
    )
    options = parser.parse_args()
    device = STYLES[options.style](options.work, options.pairs, options.busy_poll / 1e6)
    with VhostUserDaemon("net", device) as daemon:

        def end(number: int, frame: FrameType | None) -> None:
            daemon.shutdown()

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        daemon.serve_forever(options.socket_path)


if __name__ == "__main__":
    main()
