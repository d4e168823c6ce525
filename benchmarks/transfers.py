"""Microseconds per request of each way to move a batch between guest memory and a file.

    python benchmarks/transfers.py [--folders /var/tmp /dev/shm] [--batches 1 32 128]
        [--length 4096] [--seconds 1] [--cases warm cold ...]

The ways are:

- ``single``: system calls one by one, in a build of the engine for this benchmark alone;
- ``calls``: `Transfer`;
- ``ring``: every read and write through io_uring, in the same special build;
- ``chosen``: `Transfer(uring=True)`.

They take turns in random order, a batch each, at random places of a file of 256 MiB. Compare only
the medians of one run.

``cold`` drops the file's pages before each batch, ``half`` those of every other request; ``direct``
passes the page cache, ``durable`` writes with RWF_DSYNC.

``--gil`` measures the cost of releasing the interpreter's lock for a batch in the page cache, alone
and beside a thread that computes. It prints means.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from virtqueue import SEGMENT, Operation, TransferFlags
from virtqueue.c_library import Library
from virtqueue.native.transfer import TransferItem

SIZE = 256 << 20
BUILD = Path(__file__).parents[1] / "packages" / "virtqueue" / "hatch_build.py"
CASES = {
    # operation, flags of the file, flags of the item, requests made cold (1: all, 2: every other)
    "warm": (Operation.READ, 0, 0, 0),
    "cold": (Operation.READ, 0, 0, 1),
    "half": (Operation.READ, 0, 0, 2),
    "direct": (Operation.READ, os.O_DIRECT, 0, 0),
    "write": (Operation.WRITE, 0, 0, 0),
    "direct-write": (Operation.WRITE, os.O_DIRECT, 0, 0),
    "durable": (Operation.WRITE, 0, TransferFlags.DSYNC, 0),
    "direct-durable": (Operation.WRITE, os.O_DIRECT, TransferFlags.DSYNC, 0),
}

WAYS = ("single", "calls", "ring", "chosen")

Run = Callable[[int], int]


class Batch:
    """Requests of one piece each, in shared memory like a guest's."""

    def __init__(self, count: int, length: int) -> None:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, count * length)
        self.memory = mmap.mmap(fd, count * length)
        os.close(fd)
        self.memory.write(os.urandom(count * length))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.count, self.length = count, length
        self.items = (TransferItem * count)()
        self.segments = ctypes.create_string_buffer(count * SEGMENT.size)
        self.address = ctypes.addressof(self.segments)
        self.base = base

    def fill(self, operation: Operation, flags: int, random_: random.Random) -> list[int]:
        """Choose new places in the file; return their offsets."""
        places = random_.sample(range(SIZE // self.length), self.count)
        for n, place in enumerate(places):
            writable = int(operation is Operation.READ)
            SEGMENT.pack_into(
                self.segments,
                n * SEGMENT.size,
                self.base + n * self.length,
                0,
                self.length,
                writable,
                0,
            )
            item = self.items[n]
            item.segments, item.segment_count = self.address + n * SEGMENT.size, 1
            item.operation, item.flags = operation, flags
            item.length, item.offset = self.length, place * self.length
        return [place * self.length for place in places]


def ways(batch: Batch, plain: Library, everything: Library, held: bool = False) -> dict[str, Run]:
    """Return each way as a function of the file; `held` keeps the interpreter's lock."""
    items, count = ctypes.c_void_p(ctypes.addressof(batch.items)), ctypes.c_uint32(batch.count)

    def by_calls(library: Library) -> Run:
        function = (library.held if held else library.released).vq_transfer

        def run(fd: int) -> int:
            done: int = function(ctypes.c_int(fd), items, count)
            return done

        return run

    def by_ring(library: Library) -> Run:
        ring = ctypes.c_void_p()
        entries = ctypes.c_uint32(min(batch.count, 256))
        result = library.held.vq_uring_open(entries, ctypes.byref(ring))
        if result:
            raise SystemExit(f"no io_uring: {os.strerror(-result)}")
        function = (library.held if held else library.released).vq_uring_transfer

        def run(fd: int) -> int:
            done: int = function(ring, ctypes.c_int(fd), items, count)
            return done

        return run

    made = (by_calls(everything), by_calls(plain), by_ring(everything), by_ring(plain))
    return dict(zip(WAYS, made, strict=True))


def make_file(folder: str) -> str:
    """Write a file of random content; return its path."""
    handle, path = tempfile.mkstemp(prefix="transfers-", dir=folder)
    for _ in range(SIZE >> 20):
        os.write(handle, os.urandom(1 << 20))
    os.fsync(handle)
    os.close(handle)
    return path


def measure(
    path: str,
    case: str,
    batch: Batch,
    runs: dict[str, Run],
    seconds: float,
    average: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Return the average microseconds per request of each way."""
    operation, file_flags, item_flags, cold = CASES[case]
    random_ = random.Random(1)
    fd = os.open(path, os.O_RDWR | file_flags)
    try:
        if not file_flags and not cold:
            for place in range(0, SIZE, 1 << 20):
                os.pread(fd, 1 << 20, place)
        times: dict[str, list[float]] = {name: [] for name in runs}
        until = time.monotonic() + seconds
        name = next(iter(runs))
        while time.monotonic() < until or len(times[name]) < 5:
            for name, run in random_.sample(list(runs.items()), len(runs)):
                places = batch.fill(operation, item_flags, random_)
                if cold:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                if cold == 2:
                    for place in places[::2]:
                        os.pread(fd, batch.length, place)
                started = time.perf_counter_ns()
                done = run(fd)
                times[name].append((time.perf_counter_ns() - started) / batch.count / 1000)
                if done != batch.count:
                    raise SystemExit(f"{name}: {batch.items[0].result}")
        return {name: average(values) for name, values in times.items()}
    finally:
        os.close(fd)


@contextmanager
def computing() -> Iterator[None]:
    """Run a thread that never releases the interpreter's lock by itself."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(100))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure_gil(path: str, options: argparse.Namespace, libraries: tuple[Library, Library]) -> None:
    """Print the microseconds per batch with the interpreter's lock kept and released."""
    print("\n| lock | other thread | batch | µs/batch |\n|---|---|---|---|")
    for busy in (False, True):
        for count in options.batches:
            batch = Batch(count, options.length)
            runs = {
                "released": ways(batch, *libraries)["chosen"],
                "kept": ways(batch, *libraries, held=True)["chosen"],
            }
            # A thread sometimes waits long for the lock: a median would hide it.
            with computing() if busy else nullcontext():
                found = measure(path, "warm", batch, runs, options.seconds, statistics.fmean)
            for lock in ("kept", "released"):
                other = "computes" if busy else "none"
                print(f"| {lock} | {other} | {count} | {found[lock] * count:.1f} |", flush=True)


def main() -> None:
    """Build the special engine, measure in each folder, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folders", nargs="+", default=["/var/tmp", "/dev/shm"], help="for the file"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 32, 128], help="requests a batch"
    )
    parser.add_argument("--length", type=int, default=4096, help="bytes of a request (4096)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row (1)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--gil", action="store_true", help="measure the lock instead")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {options.length} bytes")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "libvirtqueue.so")
        command = [sys.executable, str(BUILD), "--flag=-DVQ_NO_CHOICE", "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        libraries = (Library(), Library(output))
        for place in options.folders:
            path = make_file(place)
            try:
                if options.gil:
                    print(f"\n{place}")
                    measure_gil(path, options, libraries)
                    continue
                print(f"\n{place}\n\n| case | batch | {' | '.join(WAYS)} |\n|{'---|' * 6}")
                for case in options.cases:
                    for count in options.batches:
                        batch = Batch(count, options.length)
                        runs = ways(batch, *libraries)
                        try:
                            found = measure(path, case, batch, runs, options.seconds)
                        except OSError as error:  # tmpfs may refuse O_DIRECT
                            print(f"| {case} | {count} | {error.strerror} | | | |", flush=True)
                            continue
                        cells = " | ".join(f"{found[name]:.2f}" for name in runs)
                        print(f"| {case} | {count} | {cells} |", flush=True)
            finally:
                os.unlink(path)


if __name__ == "__main__":
    main()
