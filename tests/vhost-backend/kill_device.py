"""Kill the back-end's process at random instants while requests run, and check every answer.

    python tests/vhost-backend/kill_device.py --kills 1000 [--packed] [--in-order]
        [--engine c|python]

The front-end keeps the memory of requests in flight and hands it to each new process. Every block
carries sequence numbers: a write that is lost, served twice after a later one, torn, or reported
before it was done shows, and so does a completion of a request that the device does not have.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import vhost_protocol as vp
from vhost_backend import BlockDevice, VirtioFeature
from vhost_backend.devices.blk.device import F_FLUSH
from vhost_backend.testing import BLOCK, BlockWorkload, DeviceProcess

BLOCKS = 192


def kill_repeatedly(
    image: Path,
    kills: int,
    *,
    packed: bool,
    engine: str | None,
    seed: int,
    queue_size: int = 64,
    in_order: bool = False,
) -> str:
    """Kill a disk `kills` times; a sentence of figures. Raises what went wrong."""
    rng = random.Random(seed)
    with open(image, "wb") as file:
        file.truncate(BLOCKS * BLOCK)
    during_set_up = 0
    with (
        DeviceProcess(lambda: BlockDevice(image), engine=engine, timeout=60) as process,
        process.connect(
            features=F_FLUSH | VirtioFeature.IN_ORDER * in_order,
            packed=packed,
            inflight=True,
            queue_size=queue_size,
        ) as session,
    ):
        assert bool(session.features & VirtioFeature.IN_ORDER) == in_order
        work = BlockWorkload(session, blocks=BLOCKS, depth=24, indirect=True, seed=seed)
        for number in range(kills):
            # From within the first request after the start to somewhere in the middle of many.
            end = time.monotonic() + rng.choice((0.0005, 0.003, 0.01)) * rng.random()
            work.submit()
            while time.monotonic() < end:
                work.poll()
                work.submit()
            process.restart()
            while True:
                frontend = process.frontend()
                try:
                    if number % 8 == 3 and during_set_up <= number // 8:
                        # While the next front-end sets it up, too.
                        during_set_up += 1
                        frontend.get_features()
                        process.restart()
                    session.reconnect(frontend)
                except (vp.ConnectionClosed, OSError):
                    continue
                break
            # Something has to get through between two kills.
            if number % 4 == 0:
                work.collect(30.0)
        work.verify(30.0)
    with open(image, "rb") as file:
        data = file.read()
    work.verify_image(lambda offset, length: data[offset : offset + length])
    return (
        f"{kills} kills, {during_set_up} more during set-up, {work.completed} requests, "
        "none lost, none repeated"
    )


def main() -> int:
    """Run the long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--in-order", action="store_true")
    parser.add_argument("--engine")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = kill_repeatedly(
            Path(folder, "disk.img"),
            options.kills,
            packed=options.packed,
            in_order=options.in_order,
            engine=options.engine,
            seed=options.seed,
        )
    ring = ("packed" if options.packed else "split") + ", in order" * options.in_order
    print(f"{ring}, engine {options.engine}: {figures} ({time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
