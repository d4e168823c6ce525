"""Take and complete block chains in one process: our engine beside the Rust crate.

``python benchmarks/rings.py`` prints the table. The memory and the loop are the same for all (see
``peers/src/bin/ring.rs``): a split ring of 512 entries, chains of three direct descriptors with
the header copied or read and the status byte written, 2 or 509 regions. Every header lies in a
page of its own and at an offset of its own: at one offset of regions whose distance is a power of
two they would share a few sets of the caches and of the TLB, and 509 regions would measure those.
Contestants take turns within a round and ratios are medians over the rounds, so that a busy machine
hits all alike.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from guest_memory import GuestAddress, GuestMemory, Region, UserAddress, allocate_memfd
from report import Verdict, summary
from virtqueue import DONE, Batch, DeviceQueue, RingConfig

HERE = Path(__file__).resolve().parent
RUST = HERE / "peers" / "target" / "release" / "ring"
DRIVER = HERE / "rings" / "build" / "engine"

QUEUE = 512
CHAINS = 128
REGION = 2 << 20
STRIDE = 4 << 20
USER = 0x7000_0000_0000
AVAIL = 0x4000
USED = 0x8000
NEXT, WRITE = 1, 2
CAPACITY = 1 << 40
# What begins at this sector or before and is no longer than LONGEST ends inside the disk: that
# needs no arithmetic. Requests that fail the comparison are looked at again.
LONGEST = 1 << 20
SAFE = (CAPACITY - LONGEST) // 512
BATCHES = (1, 32, 128)
REGIONS = (2, 509)

# Of a record (virtqueue.RECORD) what a block device needs to decide: the header's type and sector,
# readable_length, writable_length. Fields that are skipped cost nothing.
BLOCK_RECORD = struct.Struct("=I4xQ24xII16x")

Loop = Callable[[DeviceQueue, memoryview, int, int, int], int]


class Case(NamedTuple):
    """One measurement: nanoseconds per chain of a contestant."""

    regions: int
    batch: int


class Ring:
    """A device queue over memory of its own, and the driver's view of the index to move."""

    def __init__(self, regions: int, batch: int) -> None:
        self._maps: list[mmap.mmap] = []
        pairs = []
        for number in range(regions):
            fd = allocate_memfd(REGION)
            self._maps.append(mmap.mmap(fd, REGION))
            guest = number * STRIDE
            pairs.append((Region(GuestAddress(guest), REGION, UserAddress(USER + guest)), fd))
        self.memory = GuestMemory.map(pairs)
        for _, fd in pairs:
            os.close(fd)
        self._fill(regions)
        config = RingConfig(
            QUEUE, USER, USER + AVAIL, USER + USED, event_idx=True, status_byte=True
        )
        self.queue = DeviceQueue(config, self.memory, base=0, engine="c", batch=batch)
        self.index = memoryview(self._maps[0]).cast("H")[AVAIL // 2 : USED // 2]
        self.avail = 0

    def _put(self, guest: int, data: bytes) -> None:
        number, offset = divmod(guest, STRIDE)
        self._maps[number][offset : offset + len(data)] = data

    def _fill(self, regions: int) -> None:
        others = regions - 1
        for chain in range(CHAINS):
            control = (1 + 2 * chain % others) * STRIDE + 0xC0000 + chain * 4096
            data = (1 + (2 * chain + 1) % others) * STRIDE + 0x10000 + chain * 4096
            head = 3 * chain
            for index, descriptor in enumerate(
                (
                    (control, 16, NEXT, head + 1),
                    (data, 4096, NEXT | WRITE, head + 2),
                    (control + 32, 1, WRITE, 0),
                )
            ):
                self._put(16 * (head + index), struct.pack("<QIHH", *descriptor))
        heads = [slot % CHAINS * 3 for slot in range(QUEUE)]
        # After the ring comes used_event, far behind: no notification is wanted.
        self._put(AVAIL + 4, struct.pack(f"<{QUEUE + 1}H", *heads, 0x8000))


def batches(queue: DeviceQueue, index: memoryview, avail: int, batch: int, turns: int) -> int:
    """One call a batch; nothing per request: what a device in C pays."""
    cycle = queue.cycle
    for _ in range(turns):
        avail = avail + batch & 0xFFFF
        index[1] = avail
        cycle()
    return avail


def records(queue: DeviceQueue, index: memoryview, avail: int, batch: int, turns: int) -> int:
    """Python per request by the record idiom: look at each request, say only what failed."""
    cycle, unpack = queue.cycle, BLOCK_RECORD.iter_unpack
    for _ in range(turns):
        avail = avail + batch & 0xFFFF
        index[1] = avail
        taken = cycle()
        for kind, sector, readable_length, writable_length in unpack(taken.records):
            if kind > 1 or sector > SAFE or readable_length > LONGEST or writable_length > LONGEST:
                break
        else:
            continue
        refuse(taken)
    return avail


def refuse(batch: Batch) -> None:
    """Fail what is wrong in a batch: the rare case, which may take its time."""
    for position, (kind, sector, out, into) in enumerate(BLOCK_RECORD.iter_unpack(batch.records)):
        if kind > 1 or sector * 512 + (out if kind else into - 1) > CAPACITY:
            head = DONE.unpack_from(batch.done, position * 8)[0]
            DONE.pack_into(batch.done, position * 8, head, 1, 1, 1)


def chains(queue: DeviceQueue, index: memoryview, avail: int, batch: int, turns: int) -> int:
    """An object for each request, its header read through it."""
    cycle = queue.cycle
    for _ in range(turns):
        avail = avail + batch & 0xFFFF
        index[1] = avail
        for chain in cycle():
            chain.read(16)
    return avail


def python_loop(loop: Loop) -> Callable[[Case, float], float]:
    """Nanoseconds per chain of a loop in this process."""

    def measure(case: Case, seconds: float) -> float:
        ring = Ring(case.regions, case.batch)
        turns = max(1, 2048 // case.batch)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter_ns()
            ring.avail = loop(ring.queue, ring.index, ring.avail, case.batch, turns)
            best = min(best, (time.perf_counter_ns() - start) / (turns * case.batch))
        ring.queue.close()
        return best

    return measure


def program(*command: str) -> Callable[[Case, float], float]:
    """Nanoseconds per chain that another program prints."""

    def measure(case: Case, seconds: float) -> float:
        options = [f"--regions={case.regions}", f"--batch={case.batch}", f"--seconds={seconds}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        return float(done.stdout)

    return measure


def library() -> str:
    """The engine's library, as this interpreter has loaded it."""
    ring = Ring(2, 1)
    ring.queue.close()
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "libvirtqueue" in line:
                return line.split(None, 5)[5].strip()
    raise RuntimeError("the C engine was not loaded")


def contestants() -> dict[str, Callable[[Case, float], float]]:
    """Every way to take and complete a chain, by name; the Rust ones only where they are built."""
    found = {}
    if RUST.exists():
        found["rust pop"] = program(str(RUST), "--loop=pop")
        found["rust collect"] = program(str(RUST), "--loop=collect")
    if DRIVER.exists():
        found["ours, C engine alone"] = program(str(DRIVER), library())
    found["ours, a call from Python a batch"] = python_loop(batches)
    found["ours, Python per request (records)"] = python_loop(records)
    found["ours, an object per request"] = python_loop(chains)
    return found


Results = dict[Case, dict[str, list[float]]]

ENGINE, RECORDS = "ours, C engine alone", "ours, Python per request (records)"
# Contestant, batch, and for 2 and 509 regions how many times the best Rust loop's rate it has to
# reach.
TARGETS = ((ENGINE, 32, (3.0, 4.0)), (RECORDS, 32, (0.8, 1.3)))
REGIONS_COST = 1.5


def measure(rounds: int, seconds: float) -> Results:
    """Nanoseconds per chain: case, contestant, one for each round."""
    names = contestants()
    cases = [Case(regions, batch) for regions in REGIONS for batch in BATCHES]
    results: Results = {case: {n: [] for n in names} for case in cases}
    for _ in range(rounds):
        for case in cases:
            for name, contestant in names.items():
                results[case][name].append(contestant(case, seconds))
    return results


def best_rust(times: dict[str, list[float]]) -> list[float]:
    """The better Rust loop of each round."""
    return [min(pair) for pair in zip(times["rust pop"], times["rust collect"], strict=True)]


def table(results: Results) -> str:
    """Markdown: medians, and rates as multiples of the better Rust loop's in the same round."""
    cases = list(results)
    names = list(results[cases[0]])
    lines = [
        "| ns per chain (times Rust's rate) | "
        + " | ".join(f"{case.regions} regions, batch {case.batch}" for case in cases)
        + " |",
        "|---|" + "---|" * len(cases),
    ]
    for name in names:
        cells = []
        for case in cases:
            cell = f"{statistics.median(results[case][name]):.0f}"
            ratio = None if name.startswith("rust") else against_rust(results, case, name)
            cells.append(cell if ratio is None else f"{cell} ({ratio:.2f}x)")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_rust(results: Results, case: Case, name: str) -> float | None:
    """The median over the rounds of ours as a multiple of the better Rust loop's rate."""
    times = results.get(case, {})
    if "rust pop" not in times or name not in times:
        return None
    pairs = zip(best_rust(times), times[name], strict=True)
    return statistics.median(rust / ours for rust, ours in pairs)


def verdicts(results: Results) -> list[Verdict]:
    """What came of the rows about rings."""
    rows = []
    for name, batch, factors in TARGETS:
        ratios = tuple(against_rust(results, Case(count, batch), name) for count in REGIONS)
        work = f"take + complete, {name.removeprefix('ours, ')}, batch {batch}: 2 / 509 regions"
        rows.append(Verdict(work, "Rust virtio-queue + vm-memory", factors, ratios))
    cost = []
    for name in (ENGINE, RECORDS):
        few, many = (results.get(Case(count, 32), {}).get(name, []) for count in REGIONS)
        pairs = list(zip(few, many, strict=True))
        cost.append(statistics.median(b / a for a, b in pairs) if pairs else None)
    work = "cost per chain at 509 regions instead of 2: C engine / records"
    return [*rows, Verdict(work, "itself", (REGIONS_COST,) * len(cost), tuple(cost), most=True)]


def saved(results: Results) -> str:
    """As JSON, for run.py."""
    return json.dumps([[*case, times] for case, times in results.items()])


def loaded(text: str) -> Results:
    """What `saved` made."""
    return {Case(regions, batch): times for regions, batch, times in json.loads(text)}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (5)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of one turn (0.2)")
    parser.add_argument("--json", action="store_true", help="print every round's figures")
    options = parser.parse_args()
    subprocess.run(["make", "--silent"], cwd=HERE / "rings", check=True)
    results = measure(options.rounds, options.seconds)
    if options.json:
        print(saved(results))
        return 0
    print(table(results), "", *summary(verdicts(results)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
