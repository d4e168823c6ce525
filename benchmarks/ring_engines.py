"""Nanoseconds per chain of each way to use `virtqueue`, both engines side by side.

    python benchmarks/ring_engines.py [--regions 2 509] [--batches 1 32 128] [--seconds 0.3]

A split ring of 1024 entries holds 256 block requests (a header, 4 KiB of data, a status) in direct
descriptors. Every sample is a new device queue over the same published ring, so the time excludes
the driver's work. Compare only the figures of one run.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress, allocate_memfd
from virtqueue import (
    RECORD,
    DeviceQueue,
    DriverQueue,
    EngineName,
    RingConfig,
    available_engines,
    ring_layout,
)

SIZE = 1024
CHAINS = 256
REGION = 1 << 20
USER = 0x7F00_0000_0000


def make_memory(regions: int) -> GuestMemory:
    """Map regions of 1 MiB with gaps between them."""
    fd = allocate_memfd(regions * REGION)
    rows = [
        Region(
            GuestAddress(2 * n * REGION),
            REGION,
            UserAddress(USER + 2 * n * REGION),
            mmap_offset=n * REGION,
        )
        for n in range(regions)
    ]
    memory = GuestMemory.map([(row, fd) for row in rows])
    os.close(fd)
    return memory


def raw(device: DeviceQueue) -> None:
    """Take and complete, and look at nothing."""
    while device.cycle():
        pass


def records(device: DeviceQueue) -> None:
    """Unpack each record, and write the status byte of each write request."""
    window = device.window
    assert window is not None
    batch = device.cycle()
    while batch:
        for header, _, _, status, _, wlen, _, _, _, _ in RECORD.iter_unpack(batch.records):
            if header[0] == 1 and wlen:
                window[status] = 0
        batch = device.cycle()


def chains(device: DeviceQueue) -> None:
    """Read each header through a chain object."""
    batch = device.cycle()
    while batch:
        for chain in batch:
            chain.read(16)
        batch = device.cycle()


def measure(
    memory: GuestMemory, engine: EngineName, batch: int, seconds: float
) -> dict[str, float]:
    """Return the median nanoseconds per chain of each way."""
    layout = ring_layout(SIZE)
    config = RingConfig(
        SIZE,
        USER + layout.descriptor,
        USER + layout.driver,
        USER + layout.device,
        status_byte=True,
    )
    memory.write(GuestAddress(0), bytes(layout.size))
    driver = DriverQueue(config, memory)
    regions = len(memory)
    for number in range(CHAINS):
        where = 2 * REGION * (number % (regions - 1) + 1)
        memory.write(GuestAddress(where), b"\x01" + bytes(15))
        driver.add([(where, 16)], [(where + 4096, 4096), (where + 8192, 1)])
    driver.publish()
    results: dict[str, float] = {}
    ways: tuple[tuple[str, Callable[[DeviceQueue], None]], ...] = (
        ("take + complete", raw),
        ("records", records),
        ("chains", chains),
    )
    for name, way in ways:
        times: list[float] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until or not times:
            memory.write(GuestAddress(layout.device), bytes(4))
            device = DeviceQueue(config, memory, engine=engine, batch=batch)
            started = time.perf_counter_ns()
            way(device)
            times.append((time.perf_counter_ns() - started) / CHAINS)
            assert device.completed == CHAINS
            device.close()
        results[name] = statistics.median(times)
    return results


def main() -> None:
    """Measure, and print a line for each engine, number of regions and batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--regions", type=int, nargs="+", default=[2, 509], help="numbers of regions"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 32, 128], help="chains a batch"
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each way (0.3)")
    options = parser.parse_args()
    print(f"Python {platform.python_version()} ({sys.executable}), {platform.machine()}, ns/chain")
    for engine in available_engines():
        for regions in options.regions:
            memory = make_memory(regions)
            for batch in options.batches:
                found = measure(memory, engine, batch, options.seconds)
                cells = "  ".join(f"{name} {value:7.0f}" for name, value in found.items())
                print(f"{engine:6}  {regions:3} regions  batch {batch:3}  {cells}", flush=True)


if __name__ == "__main__":
    main()
