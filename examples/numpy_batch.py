"""numpy over a batch: a device that computes, and never looks at one request by itself.

    python examples/numpy_batch.py              # try it with the embedded driver
    python examples/numpy_batch.py SOCKET       # serve it

A request is a point, two little-endian doubles x and y; the answer is its distance from the origin,
a double. All points that wait are one array, their distances one expression. Needs numpy.
"""

from __future__ import annotations

import struct
import sys

try:
    import numpy as np
except ImportError:
    sys.exit("this example needs numpy: pip install numpy")

from vhost_backend import QueueInfo, VirtioDevice, serve
from virtqueue import DONE_FIELDS, Batch, RecordFlags

#: Of a record (`virtqueue.RECORD_FIELDS`) what is needed here, its header read as a point.
POINT = np.dtype(
    {
        "names": ["x", "y", "writable", "readable_length", "writable_length", "flags"],
        "formats": ["<f8", "<f8", "u8", "u4", "u4", "u2"],
        "offsets": [0, 8, 24, 40, 44, 50],
        "itemsize": 64,
    }
)
DONE = np.dtype(DONE_FIELDS)
ANSWER = 8
IN_ONE_PIECE = int(RecordFlags.WRITABLE_CONTIGUOUS)


class Distances(VirtioDevice):
    """A device of no type that virtio knows. Too short a request is filled up with zeroes."""

    device_id = 42

    def handle_batch(self, queue: QueueInfo, batch: Batch) -> None:
        """Answer everything that was waiting."""
        points = np.frombuffer(batch.records, POINT)
        distances = np.hypot(points["x"], points["y"]).astype("<f8")
        fits = (points["readable_length"] == 0) & (points["writable_length"] >= ANSWER)
        np.frombuffer(batch.done, DONE)["written"][:] = np.where(fits, ANSWER, 0)

        # Straight into guest memory, wherever each answer belongs; offsets need not be aligned.
        direct = fits & (points["flags"] & IN_ONE_PIECE != 0) & (queue.window is not None)
        if queue.window is not None:
            memory = np.frombuffer(queue.window, np.uint8)
            places = points["writable"][direct, None] + np.arange(ANSWER, dtype="u8")
            memory[places] = distances[direct].view(np.uint8).reshape(-1, ANSWER)
        # What a driver has scattered over several buffers: rare, and Python's to do.
        for position in np.flatnonzero(fits & ~direct):
            batch[int(position)].write(distances[position].tobytes())


def try_it() -> None:
    """The distances of a hundred points, all asked for at once."""
    from vhost_backend.testing import attached

    points = [(3.0 * number, 4.0 * number) for number in range(100)]
    with attached(Distances()) as session:
        vring = session.vrings[0]
        rooms = {}
        for point in points:
            question, answer = session.allocate(16), session.allocate(ANSWER)
            session.memory.write(question, struct.pack("<dd", *point))
            rooms[vring.submit([(question, 16)], [(answer, ANSWER)], indirect=True)] = answer
        vring.kick()
        answers: dict[int, float] = {}
        while len(answers) < len(points):
            for identity, _ in vring.completions():
                (answers[identity],) = struct.unpack("<d", session.memory.read(rooms[identity], 8))
        for (x, y), identity in list(zip(points, rooms, strict=True))[:3]:
            print(f"({x:g}, {y:g}) is {answers[identity]:g} away")
        print(f"{sum(answers.values()):g} in all")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(Distances(), sys.argv[1])
    elif len(sys.argv) == 1:
        try_it()
    else:
        sys.exit("usage: python examples/numpy_batch.py [SOCKET]")
