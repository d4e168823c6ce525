"""A block device that moves no data, written in three ways.

It shows the cost of the framework. peers/src/bin/device.rs is the same device on the Rust crate.
"""

from __future__ import annotations

import argparse
import struct
from typing import Any

from vhost_backend import QueueInfo, Request, VirtioDevice, serve, serve_all
from virtqueue import DONE, Batch, CHandler, FileAction, FileHandler

SECTOR = 512
CAPACITY = (1 << 30) // SECTOR
# A request that begins up to SAFE and is no longer than LONGEST ends inside the disk, so most
# requests need no arithmetic. `refuse` looks at the others and at flushes again.
LONGEST = 1 << 20
SAFE = CAPACITY - LONGEST // SECTOR
T_IN, T_OUT, T_FLUSH = 0, 1, 4
S_UNSUPP = 2
F_FLUSH, F_MQ = 1 << 9, 1 << 12

# The fields of virtqueue.RECORD that the device needs: the header's type and sector,
# readable_length, writable_length. Skipped fields cost nothing.
BLOCK_RECORD = struct.Struct("=I4xQ24xII16x")


class Null(VirtioDevice):
    """The common part: identity, features, configuration."""

    device_id = 2
    status_byte = True
    features = F_FLUSH | F_MQ

    def __init__(self, queues: int) -> None:
        self.num_queues = queues
        # struct virtio_blk_config up to num_queues; only it and the capacity are not zero.
        self.config = struct.pack("<Q26xH24x", CAPACITY, queues)


class Batches(Null):
    """C handles each batch: it looks the request's type up and lets the request succeed.

    The engine has checked every chain, and filled in success with everything written.
    """

    def batch_handler(self, queue: int) -> CHandler:
        """Return a handler that lets reads, writes and flushes succeed."""
        return FileHandler(-1, 0, dict.fromkeys((T_IN, T_OUT, T_FLUSH), FileAction.SUCCEED))

    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        """Refuse the rest: requests of an unknown type."""
        for position in batch.left:
            head = DONE.unpack_from(batch.done, position * 8)[0]
            DONE.pack_into(batch.done, position * 8, head, S_UNSUPP, 1, 1)


class Records(Null):
    """Python handles each request, in the cheapest form: it writes only the failures."""

    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        """Look at each request's type and sector."""
        for kind, sector, readable_length, writable_length in BLOCK_RECORD.iter_unpack(
            batch.records
        ):
            if (
                kind > T_OUT
                or sector > SAFE
                or readable_length > LONGEST
                or writable_length > LONGEST
            ):
                break
        else:
            return
        self.refuse(batch)

    def refuse(self, batch: Batch) -> None:
        """Fail the wrong requests of a batch. This is rare, so it need not be fast."""
        records = BLOCK_RECORD.iter_unpack(batch.records)
        for position, (kind, sector, readable_length, writable_length) in enumerate(records):
            length = {T_IN: writable_length - 1, T_OUT: readable_length, T_FLUSH: 0}.get(kind)
            if length is None or sector * SECTOR + length > CAPACITY * SECTOR:
                head = DONE.unpack_from(batch.done, position * 8)[0]
                DONE.pack_into(batch.done, position * 8, head, S_UNSUPP, 1, 1)


class Requests(Null):
    """Each request is a call and an object: the comfortable way."""

    handle_batch = VirtioDevice.handle_batch

    def handle(self, queue: QueueInfo, request: Request) -> None:
        """Read the header, and report the whole buffer as written."""
        kind, sector = struct.unpack("<I4xQ", request.header)
        if kind == T_IN:
            request.written = request.writable_length
        elif kind not in (T_OUT, T_FLUSH) or sector > CAPACITY:
            request.status = S_UNSUPP


STYLES = {"batch": Batches, "records": Records, "requests": Requests}


def main() -> None:
    """Serve one of the devices until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--socket-path",
        required=True,
        action="append",
        help="listen here; repeat it for several devices in this process",
    )
    parser.add_argument("--style", choices=sorted(STYLES), default="records", help="way of writing")
    parser.add_argument("--queues", type=int, default=1, help="queues of each device (1)")
    parser.add_argument(
        "--busy-poll",
        type=float,
        metavar="MICROSECONDS",
        help="look at empty rings for this long before sleeping",
    )
    options = parser.parse_args()
    kind = STYLES[options.style]
    more: dict[str, Any] = (
        {} if options.busy_poll is None else {"busy_poll": options.busy_poll / 1e6}
    )
    if len(options.socket_path) == 1:
        serve(kind(options.queues), options.socket_path[0], **more)
    else:
        serve_all([(kind(options.queues), path) for path in options.socket_path], **more)


if __name__ == "__main__":
    main()
