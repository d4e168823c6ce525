"""Keep the data path from getting slower: count what does not depend on the machine's load.

``python benchmarks/guard.py`` takes less than a minute and ends with status 1 when a count exceeds
its bound. Each count is the same on every run of the same code:

- the machine instructions of the C engine's ``vq_cycle`` for a chain: valgrind's callgrind counts
  them over rings/engine.c. They depend on the compiler: the bounds leave 15 % over gcc 12 -O2.
- the function calls and the bytecode instructions of a queue for a batch, over rings/loops.py.
- the bytecode instructions of a worker from a kick to its next sleep, for a single request of a
  null device. Python's counts depend on its version: the bounds leave 25 % over CPython 3.11.

The guard does not see waiting: code that stalls has the same instructions.

Raise a bound only together with the reason beside it. When a change makes a count much smaller,
lower the bound in the same change, or a later change can lose the gain unnoticed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from devices import null
from rings import engine, loops
from rings.ring import Ring
from vhost_backend.testing import attached

CHAINS = 12800
BATCH = 32
TURNS = 4


class Engine(NamedTuple):
    """Instructions for each chain in the C engine's ``vq_cycle``."""

    name: str
    bound: int
    options: str
    reason: str


class WakeUp(NamedTuple):
    """Bytecode instructions of a worker for a single request."""

    name: str
    bytecodes: int
    style: str
    reason: str


class Python(NamedTuple):
    """Bytecode instructions and function calls of a loop for each batch of 32."""

    name: str
    bytecodes: int
    calls: int
    loop: loops.Loop
    reason: str


# One line a bound. When a count falls, lower its bound to 15 % (Python: 25 %) above it.
# fmt: off
ENGINE = (
    Engine("split", 605, "", "three plain descriptors, all checks, record, done entry, completion"),
    Engine("split, batch 1", 1250, "--batch=1", "a whole cycle: ring, memory, barrier"),
    Engine("split, 509 regions", 690, "--regions=509", "and two searches over the regions"),
    Engine("split, indirect", 895, "--indirect", "and finding the table, and a walk out of line"),
    Engine("packed", 820, "--packed", "as split, and the wrap counter of every descriptor"),
    Engine("packed, indirect", 805, "--packed --indirect", "one slot of the ring and the table"),
)
PYTHON = (
    Python("a call a batch", 125, 3, loops.batches, "one call into the engine for one batch"),
    Python("records", 980, 4, loops.records, "23 bytecodes a record, and the call"),
    Python("chain objects", 6800, 265, loops.chains, "an object, its segments, 16 bytes copied"),
)
WAKE_UPS = (
    WakeUp("wake-up, batches in C", 5, "batch", "C sleeps, handles, completes and signals"),
    WakeUp("wake-up, records", 145, "records", "a call back from C, the ring's lock, one record"),
    WakeUp("wake-up, handle()", 275, "requests", "and a request object and its handler"),
)
# fmt: on


class Bytecodes:
    """Counts the bytecode instructions of the frames that `enter` traces."""

    def __init__(self) -> None:
        self.count = 0

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Trace a frame: a function for `sys.settrace`."""
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.count += event == "opcode"
        return self._step


class Calls:
    """Counts function calls, of Python and of C."""

    def __init__(self) -> None:
        self.count = 0

    def enter(self, frame: FrameType, kind: str, argument: Any) -> None:
        """Count an event: a function for `sys.setprofile`."""
        self.count += kind in ("call", "c_call")


def instructions(case: Engine, library: str) -> int:
    """Have callgrind count the instructions of ``vq_cycle`` for each chain."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--toggle-collect=vq_cycle"),
            f"--callgrind-out-file={folder}/out",
            *(str(engine.PROGRAM), library, f"--chains={CHAINS}", *case.options.split()),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"guard: {case.name}: {done.stderr.strip().splitlines()[-1]}")
    return int(found[1]) // CHAINS


def for_each_batch(case: Python, counter: Bytecodes | Calls, install: Callable[[Any], None]) -> int:
    """Run the loop while `install` feeds the counter; return the count for each batch."""
    ring = Ring(2, BATCH)
    avail = case.loop(ring.queue, ring.index, 0, BATCH, 1)
    install(counter.enter)
    try:
        case.loop(ring.queue, ring.index, avail, BATCH, TURNS)
    finally:
        install(None)
    ring.queue.close()
    return counter.count // TURNS


def wake_up(style: str) -> int:
    """Return the median of the worker's bytecode instructions for one request.

    A worker that is still awake when the next request arrives does less for it. The pause lets it
    go to sleep.
    """
    counter = Bytecodes()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        if threading.current_thread().name.endswith("-control"):
            sys.settrace(None)
            return None
        sys.settrace(counter.enter)
        return counter.enter(frame, event, argument)

    each = []
    threading.settrace(enter)
    try:
        with attached(null.STYLES[style](1), engine="c") as session:
            header, data, status = (session.allocate(size) for size in (16, 4096, 1))
            ring = session.vrings[0]
            for _ in range(15):
                before = counter.count
                ring.submit(readable=[(header, 16)], writable=[(data, 4096), (status, 1)])
                ring.kick()
                ring.completions()
                time.sleep(0.01)
                each.append(counter.count - before)
    finally:
        threading.settrace(None)
    return int(statistics.median(each))


def check(name: str, what: str, count: int, bound: int, reason: str) -> bool:
    """Print one line; return whether the count is within its bound."""
    good = count <= bound
    print(f"{'ok' if good else 'TOO MANY':8} {name}: {count} {what}, bound {bound}")
    if not good:
        print(f"         the bound: {reason}")
    return good


def main() -> int:
    """Count and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", help="count in this build of the C engine (the installed one)")
    options = parser.parse_args()
    good = True
    if shutil.which("valgrind") is None:
        print("guard: valgrind is not installed", file=sys.stderr)
        return 1
    engine.build()
    library = options.library or engine.library()
    for case in ENGINE:
        count = instructions(case, library)
        good &= check(case.name, "instructions a chain", count, case.bound, case.reason)
    for python in PYTHON:
        name, reason = python.name, python.reason
        count = for_each_batch(python, Bytecodes(), sys.settrace)
        good &= check(name, "bytecodes a batch", count, python.bytecodes, reason)
        count = for_each_batch(python, Calls(), sys.setprofile)
        good &= check(name, "calls a batch", count, python.calls, reason)
    for wake in WAKE_UPS:
        count = wake_up(wake.style)
        good &= check(wake.name, "bytecodes a request", count, wake.bytecodes, wake.reason)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
