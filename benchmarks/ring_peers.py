"""Take and complete block chains in one process: our engine beside the Rust crate.

``python benchmarks/ring_peers.py`` prints the table. All contestants use the same memory and the
same loop (see rings/ring.py) with 2 or 509 regions. They copy or read each header and write each
status byte. They take turns within a round, so that other load disturbs all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from comparison.builds import PEERS
from comparison.verdicts import Verdict, summary
from rings import engine, loops
from rings.ring import Ring

RUST = PEERS / "ring"
ENGINE, RECORDS = "ours, C engine alone", "ours, Python per request (records)"
BATCHES = (1, 32, 128)
REGIONS = (2, 509)


class Case(NamedTuple):
    """The number of regions and of chains a batch."""

    regions: int
    batch: int


def python_loop(loop: loops.Loop) -> Callable[[Case, float], float]:
    """Measure nanoseconds per chain of a loop in this process."""

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
    """Take the nanoseconds per chain that another program prints."""

    def measure(case: Case, seconds: float) -> float:
        options = [f"--regions={case.regions}", f"--batch={case.batch}", f"--seconds={seconds}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        return float(done.stdout)

    return measure


def contestants() -> dict[str, Callable[[Case, float], float]]:
    """Name every way to take and complete a chain; the programs only if they are built."""
    found = {}
    if RUST.exists():
        found["rust pop"] = program(str(RUST), "--loop=pop")
        found["rust collect"] = program(str(RUST), "--loop=collect")
    if engine.PROGRAM.exists():
        found[ENGINE] = program(str(engine.PROGRAM), engine.library())
    found["ours, a call from Python a batch"] = python_loop(loops.batches)
    found[RECORDS] = python_loop(loops.records)
    found["ours, an object per request"] = python_loop(loops.chains)
    return found


Results = dict[Case, dict[str, list[float]]]

# Contestant, batch, and the multiples of the best Rust loop's rate to reach with 2 and 509 regions.
TARGETS = ((ENGINE, 32, (3.0, 4.0)), (RECORDS, 32, (0.8, 1.3)))
REGIONS_COST = 1.5


def measure(rounds: int, seconds: float) -> Results:
    """Measure nanoseconds per chain for each case, contestant and round."""
    names = contestants()
    cases = [Case(regions, batch) for regions in REGIONS for batch in BATCHES]
    results: Results = {case: {n: [] for n in names} for case in cases}
    for _ in range(rounds):
        for case in cases:
            for name, contestant in names.items():
                results[case][name].append(contestant(case, seconds))
    return results


def best_rust(times: dict[str, list[float]]) -> list[float]:
    """Return the better Rust loop of each round."""
    return [min(pair) for pair in zip(times["rust pop"], times["rust collect"], strict=True)]


def table(results: Results) -> str:
    """Format medians, and rates as multiples of the better Rust loop in the same round."""
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
    """Return the median over the rounds of our multiple of the better Rust loop's rate."""
    times = results.get(case, {})
    if "rust pop" not in times or name not in times:
        return None
    pairs = zip(best_rust(times), times[name], strict=True)
    return statistics.median(rust / ours for rust, ours in pairs)


def verdicts(results: Results) -> list[Verdict]:
    """Judge the targets of the rings."""
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
    """Format the results as JSON, for `hatch run bench`."""
    return json.dumps([[*case, times] for case, times in results.items()])


def loaded(text: str) -> Results:
    """Read the results that `saved` formatted."""
    return {Case(regions, batch): times for regions, batch, times in json.loads(text)}


def main() -> int:
    """Measure, and print the table or the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (5)")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of one turn (0.2)")
    parser.add_argument("--json", action="store_true", help="print the figures of every round")
    options = parser.parse_args()
    engine.build()
    results = measure(options.rounds, options.seconds)
    if options.json:
        print(saved(results))
        return 0
    print(table(results), "", *summary(verdicts(results)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
