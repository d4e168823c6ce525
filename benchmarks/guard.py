"""Keep the data path from getting slower: counts that do not depend on the machine's mood.

``python benchmarks/guard.py`` takes less than a minute and ends with status 1 when a count is above
its bound. Two kinds of count, both the same on every run of the same code:

- machine instructions for each chain inside the C engine's ``vq_cycle`` (valgrind's callgrind over
  ``rings/engine.c``). They depend on the compiler, so the bounds leave 15 % over gcc 12 -O2.
- Python function calls and bytecode instructions that the queue spends on a batch in the idioms of
  ``rings.py``, and bytecode instructions that a worker spends from one kick to its next sleep, for
  a single request of a null device (`sys.setprofile`, `sys.settrace`). They depend on the
  interpreter's version, so the bounds leave 25 % over CPython 3.11.

What they cannot see is waiting: code that stalls costs the same instructions.

A bound is raised only together with the reason for it, beside it. When a change makes a count much
smaller, lower the bound in the same change: otherwise the gain can be lost again unseen.
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
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import rings
from devices import null
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
    """Bytecode instructions of a worker for one request that comes alone."""

    name: str
    bytecodes: int
    style: str
    reason: str


class Python(NamedTuple):
    """Bytecode instructions, and function calls, of a loop for each batch of 32."""

    name: str
    bytecodes: int
    calls: int
    loop: rings.Loop
    reason: str


# One line a bound. Where a count falls, move its bound down to 15 % (Python: 25 %) above it.
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
    Python("a call a batch", 125, 3, rings.batches, "one call into the engine for one batch"),
    Python("records", 980, 4, rings.records, "23 bytecodes a record, and the call"),
    Python("chain objects", 6800, 265, rings.chains, "an object, its segments, 16 bytes copied"),
)
WAKE_UPS = (
    WakeUp("wake-up, batches in C", 5, "batch", "C sleeps, handles, completes and signals"),
    WakeUp("wake-up, records", 145, "records", "a call back from C, the ring's lock, one record"),
    WakeUp("wake-up, handle()", 275, "requests", "and a request object and its handler"),
)
# fmt: on


def instructions(case: Engine, library: str) -> int:
    """Instructions for each chain that callgrind counts inside ``vq_cycle``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--toggle-collect=vq_cycle"),
            f"--callgrind-out-file={folder}/out",
            *(str(rings.DRIVER), library, f"--chains={CHAINS}", *case.options.split()),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"guard: {case.name}: {done.stderr.strip().splitlines()[-1]}")
    return int(found[1]) // CHAINS


def bytecodes(case: Python) -> int:
    """Bytecode instructions for each batch."""
    ring = rings.Ring(2, BATCH)
    count = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return local

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return local

    return _counted(case, ring, sys.settrace, enter, lambda: count)


def calls(case: Python) -> int:
    """Function calls, of Python and of C, for each batch."""
    ring = rings.Ring(2, BATCH)
    count = 0

    def event(frame: FrameType, kind: str, argument: Any) -> None:
        nonlocal count
        count += kind in ("call", "c_call")

    return _counted(case, ring, sys.setprofile, event, lambda: count)


def _counted(
    case: Python,
    ring: rings.Ring,
    install: Callable[[Any], None],
    hook: Any,
    count: Callable[[], int],
) -> int:
    avail = case.loop(ring.queue, ring.index, 0, BATCH, 1)
    install(hook)
    try:
        case.loop(ring.queue, ring.index, avail, BATCH, TURNS)
    finally:
        install(None)
    ring.queue.close()
    return count() // TURNS


def wake_up(style: str) -> int:
    """Bytecode instructions of the worker for one request; the middle of a few.

    A worker that has not gone back to sleep when the next request comes does less for it: hence the
    pause between them.
    """
    count = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return local

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return local

    def choose(frame: FrameType, event: str, argument: Any) -> Any:
        if threading.current_thread().name.endswith("-control"):
            sys.settrace(None)
            return None
        sys.settrace(enter)
        return enter(frame, event, argument)

    each = []
    threading.settrace(choose)
    try:
        with attached(null.STYLES[style](1), engine="c") as session:
            header, data, status = (session.allocate(size) for size in (16, 4096, 1))
            ring = session.vrings[0]
            for _ in range(15):
                before = count
                ring.submit(readable=[(header, 16)], writable=[(data, 4096), (status, 1)])
                ring.kick()
                ring.completions()
                time.sleep(0.01)
                each.append(count - before)
    finally:
        threading.settrace(None)
    return int(statistics.median(each))


def check(name: str, what: str, count: int, bound: int, reason: str) -> bool:
    """Print one line; whether the count is within its bound."""
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
    parser.add_argument("--library", help="the C engine to count (the installed one)")
    options = parser.parse_args()
    good = True
    if shutil.which("valgrind") is None:
        print("guard: valgrind is not installed", file=sys.stderr)
        return 1
    subprocess.run(["make", "--silent"], cwd=Path(rings.HERE, "rings"), check=True)
    library = options.library or rings.library()
    for engine in ENGINE:
        count = instructions(engine, library)
        good &= check(engine.name, "instructions a chain", count, engine.bound, engine.reason)
    for python in PYTHON:
        name = python.name
        good &= check(name, "bytecodes a batch", bytecodes(python), python.bytecodes, python.reason)
        good &= check(name, "calls a batch", calls(python), python.calls, python.reason)
    for wake in WAKE_UPS:
        count = wake_up(wake.style)
        good &= check(wake.name, "bytecodes a request", count, wake.bytecodes, wake.reason)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
