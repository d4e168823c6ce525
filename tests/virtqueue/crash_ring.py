"""Kill a device process at random instants while it completes out of order.

    python tests/virtqueue/crash_ring.py --kills 1000 [--packed] [--event-idx] [--engine c|python]

The driver in this process checks that each chain comes back once, with what its request asked
for, whatever happens to the processes that serve it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from virtqueue_rig import Rig

from guest_memory import GuestMemory
from virtqueue import InflightRegion, inflight_size


def serve(rig: Rig, seed: int) -> None:
    random_ = random.Random(seed)
    # A mapping of its own, as another process has.
    rig.memory = GuestMemory.map([(rig.memory.regions[0], rig.fd)])
    device = rig.new_device(base=None)
    held: list[Any] = []
    while True:
        held += list(device.take(random_.randint(1, 8)))
        random_.shuffle(held)
        for _ in range(random_.randint(0, len(held))):
            chain = held.pop()
            chain.write(chain.read())
            device.complete(chain)
        device.publish()
        if random_.random() < 0.3:
            device.give_back(held)
            held = [chain for chain in held if not chain.completed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--event-idx", action="store_true")
    parser.add_argument("--in-order", action="store_true")
    parser.add_argument("--engine")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    size = 61 if options.packed else 64
    rig = Rig(
        size=size,
        packed=options.packed,
        engine=options.engine,
        event_idx=options.event_idx,
        in_order=options.in_order,
        device=False,
    )
    shared = mmap.mmap(-1, inflight_size(size, options.packed))
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(shared))
    rig.inflight = InflightRegion(address, len(shared), shared)
    slots = [(rig.room(8), rig.room(16)) for _ in range(size)]
    idle = list(range(size))
    open_: dict[int, tuple[int, int]] = {}
    number = collected = 0

    def drive(until: float, offering: bool = True) -> None:
        nonlocal number, collected
        while time.monotonic() < until and (offering or open_):
            while offering and rig.driver.free >= 3 and idle:
                slot = idle.pop()
                text, room = slots[slot]
                number += 1
                rig.memory.write(text[0], number.to_bytes(8, "little"))
                rig.memory.write(room[0], bytes(8))
                head = rig.driver.add(
                    [(text[0], 5), (text[0] + 5, 3)], [room], random_.random() < 0.3
                )
                open_[head] = (number, slot)
            rig.driver.publish()
            for head, written in rig.driver.collect():
                expected, slot = open_.pop(head)
                found = rig.memory.read(slots[slot][1][0], 8)
                if written != 8 or found != expected.to_bytes(8, "little"):
                    raise SystemExit(f"chain {expected} came back with {found!r}, {written} bytes")
                idle.append(slot)
                collected += 1

    # Loaded once here, so that a child spends its short life on the ring.
    rig.new_device().close()
    shared[:] = bytes(len(shared))
    killed = 0
    while True:
        last = killed == options.kills
        child = os.fork()
        if not child:
            with contextlib.suppress(KeyboardInterrupt):
                serve(rig, options.seed + killed)
            os._exit(1)
        try:
            if last:
                drive(time.monotonic() + 60, offering=False)
            else:
                drive(time.monotonic() + random_.uniform(0.001, 0.03))
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"the device process ended by itself: {status}")
        if last:
            break
        killed += 1
    if open_:
        raise SystemExit(f"{len(open_)} chains were lost")
    print(f"{killed} kills, {number} chains offered, {collected} returned, none lost or repeated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
