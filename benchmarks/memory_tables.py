"""Measure guest memory: translation, changes of the table, and copies beside memmove.

    python benchmarks/memory_tables.py [--json FILE]

It needs guest-memory only. The actions take turns, so that other load disturbs all alike; the times
are medians. Their growth counts: translation grows as log n, a change of the table slowly, a copy
as memmove.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable

from guest_memory import (
    GuestAddress,
    GuestMemory,
    Iotlb,
    Iova,
    MmapMapper,
    Region,
    UserAddress,
    allocate_memfd,
)

PAGE = 4096
COUNTS = (1, 8, 64, 509)
RUNS = 7


def table(count: int, size: int = PAGE) -> list[Region]:
    """Lay out regions with gaps between them, in one file."""
    return [
        Region(GuestAddress(n * 2 * size), size, UserAddress((1 << 46) + n * 3 * size), n * size)
        for n in range(count)
    ]


def per_call(action: Callable[[], object], calls: int) -> float:
    """Measure nanoseconds for each of the ``calls`` calls that ``action`` makes."""
    start = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - start) / calls


def median(actions: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """Run all actions in turn, several times; return the median of each."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(RUNS):
        for name, (action, calls) in actions.items():
            times[name].append(per_call(action, calls))
    return {name: statistics.median(values) for name, values in times.items()}


def translation() -> dict[str, float]:
    """Measure translate() at random addresses, and again and again at one."""
    actions: dict[str, tuple[Callable[[], object], int]] = {}
    keep = []
    for count in COUNTS:
        fd = allocate_memfd(count * PAGE)
        memory = GuestMemory.map([(region, fd) for region in table(count)])
        os.close(fd)
        keep.append(memory)
        chosen = random.Random(count).choices(memory.regions, k=20_000)
        scattered = [GuestAddress(region.guest_address + 16) for region in chosen]

        def far(memory: GuestMemory = memory, addresses: list[GuestAddress] = scattered) -> None:
            translate = memory.translate
            for address in addresses:
                translate(address, 64, 1)

        def near(memory: GuestMemory = memory, address: GuestAddress = scattered[0]) -> None:
            translate = memory.translate
            for _ in range(20_000):
                translate(address, 64, 1)

        actions[f"translate, random, {count} regions"] = far, 20_000
        actions[f"translate, same region, {count} regions"] = near, 20_000
    return median(actions)


def changes() -> dict[str, float]:
    """Measure changes of the table: of all regions, of one region, of an IOTLB entry."""
    actions: dict[str, tuple[Callable[[], object], int]] = {}
    for count in COUNTS:
        regions = table(count)
        fd = allocate_memfd(count * PAGE)

        def whole(regions: list[Region] = regions, fd: int = fd) -> None:
            GuestMemory.map([(region, fd) for region in regions])

        full = GuestMemory.map([(region, fd) for region in regions])
        middle = regions[count // 2]

        def one(full: GuestMemory = full, middle: Region = middle, fd: int = fd) -> None:
            for _ in range(50):
                full.remove(middle).add(middle, fd)

        actions[f"map and unmap a table of {count}"] = whole, 1
        actions[f"remove + add a region of {count}"] = one, 50
    fd = allocate_memfd(1 << 44)
    huge = table(509, (1 << 44) // 512)

    def sixteen_tib() -> None:
        GuestMemory.map([(region, fd) for region in huge])

    actions["map and unmap 509 regions of 16 TiB together"] = sixteen_tib, 1
    iotlb = Iotlb()
    memory = GuestMemory.map([(table(1)[0], fd)])
    for n in range(2048):
        iotlb.insert(Iova(n * 2 * PAGE), PAGE, UserAddress(1 << 46), 3)

    def miss() -> None:
        for n in range(50):
            iotlb.insert(Iova(n * 2 * PAGE), PAGE, UserAddress(1 << 46), 3)
            memory.with_iotlb(iotlb)

    actions["replace an IOTLB entry of 2048 and take a snapshot"] = miss, 50
    return median(actions)


def copies() -> dict[str, float]:
    """Measure MiB/s of read and write beside memmove over the same memory."""
    result: dict[str, float] = {}
    size = 1 << 26
    fd = allocate_memfd(size)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, size)
    region = Region(GuestAddress(0), size, UserAddress(1 << 46))
    memories = {
        "sealed": GuestMemory.map([(region, fd)]),
        "unsealed, no guard": GuestMemory.map([(region, unsealed)]),
        "unsealed, guarded": GuestMemory.map([(region, unsealed)], MmapMapper(guarded=True)),
    }
    os.close(fd)
    os.close(unsealed)
    block = bytearray(size)
    ours = (ctypes.c_char * size).from_buffer(block)
    for memory in memories.values():
        memory.write(GuestAddress(0), block)
    for length in (64, 512, 4096, 65536, 1 << 20):
        calls = max(20, min(20_000, (1 << 28) // length))
        source = bytes(length)
        target = bytearray(length)
        host = memories["sealed"].translate(GuestAddress(0), length)
        local = ctypes.addressof(ours)
        actions: dict[str, tuple[Callable[[], object], int]] = {}

        def plain(
            length: int = length, calls: int = calls, host: int = host, local: int = local
        ) -> None:
            move = ctypes.memmove
            for _ in range(calls):
                move(host, local, length)

        actions["memmove"] = plain, calls
        for name, memory in memories.items():

            def write(m: GuestMemory = memory, source: bytes = source, calls: int = calls) -> None:
                call = m.write
                for _ in range(calls):
                    call(GuestAddress(0), source)

            def read(m: GuestMemory = memory, length: int = length, calls: int = calls) -> None:
                call = m.read
                for _ in range(calls):
                    call(GuestAddress(0), length)

            def into(m: GuestMemory = memory, b: bytearray = target, calls: int = calls) -> None:
                call = m.read_into
                for _ in range(calls):
                    call(GuestAddress(0), b)

            actions[f"write, {name}"] = write, calls
            actions[f"read, {name}"] = read, calls
            actions[f"read_into, {name}"] = into, calls
        for name, nanoseconds in median(actions).items():
            result[f"{name}, {length} bytes"] = length / nanoseconds * 1e9 / (1 << 20)
    return result


def main() -> int:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs")
    groups = {
        "translation, ns per call": translation(),
        "changes, ns per operation": changes(),
        "copies, MiB/s": copies(),
    }
    for title, figures in groups.items():
        print(f"\n{title}")
        for name, value in figures.items():
            print(f"  {name:<52} {value:>14,.0f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(groups, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
