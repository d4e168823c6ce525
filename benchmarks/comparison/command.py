"""Measure this project's back-ends beside their peers, in one run.

It builds the load generators and the peers, lets the contestants of a case take turns in each
round, and prints Markdown tables: the medians of the figures, and the median over the rounds of the
ratio to the best peer of the same round. A summary compares each target with its figure. The report
names each missing peer with the reason. docs/performance.md says how to read it.

  --short   the cases that matter most, under two minutes once everything is built (default)
  --full    every case, longer and more often, as in docs/performance-results.md; half an hour
  --only    some cases with all their contestants, by name or group; see --list
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ring_peers
from comparison import builds
from comparison.builds import Unavailable
from comparison.cases import CASES, READ_FILE, SHORT_FILE, Case
from comparison.contestants import BACKENDS
from comparison.figures import Measure, Outcome
from comparison.idle import idle_memory
from comparison.image import image_file
from comparison.machine import machine
from comparison.report import setup_table, table, write
from comparison.turns import Runner
from comparison.verdicts import Verdict, memory_verdict, summary, verdicts


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="hatch run bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="measure what matters most (default)")
    length.add_argument("--full", action="store_true", help="measure all, longer and more often")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="measure the cases of the group TEXT and those with TEXT in their name; `rings` means "
        "the rings in one process (repeatable)",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and contestants")
    parser.add_argument(
        "--contestant",
        action="append",
        metavar="NAME",
        choices=sorted(BACKENDS),
        help="measure this contestant only (repeatable; see --list)",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="give each contestant N turns (3; full: 5)"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="measure for S seconds a turn (0.4; full: 1)"
    )
    parser.add_argument(
        "--placement",
        choices=("free", "together", "apart"),
        help="where driver and back-end run, instead of each case's own placement",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="for a machine that others use: take a turn's rate from its best 2 ms, and the least "
        "latency and CPU time of all rounds",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="let perf watch the back-ends in the first round, and write its reports here",
    )
    parser.add_argument("--image-folder", type=Path, help="make the disk image here (/var/tmp)")
    parser.add_argument(
        "--output",
        type=Path,
        help="also write the Markdown to this file, between its `results` marks if it has them",
    )
    parser.add_argument("--json", type=Path, help="write every figure of every round to this file")
    options = parser.parse_args()
    if options.profile and shutil.which("perf") is None:
        parser.error("--profile needs perf")
    return options


def select(options: argparse.Namespace) -> list[Case]:
    """Choose the cases to run."""
    cases = [case for case in CASES if options.full or options.only or case.short]
    if options.only:
        wanted = options.only
        cases = [case for case in cases if any(t == case.group or t in case.name for t in wanted)]
    elif not options.full:
        left_out = set(READ_FILE) - set(SHORT_FILE) | {"null-records-poll"}
        cases = [case.only(set(case.contestants) - left_out) for case in cases]
    if options.contestant:
        cases = [case.only(set(options.contestant)) for case in cases]
    if options.placement:
        cases = [replace(case, placement=options.placement) for case in cases]
    return [case for case in cases if case.contestants]


def describe() -> None:
    """Print the cases and the contestants."""
    for case in CASES:
        short = ", short" if case.short else ""
        print(f"{case.name}  [group {case.group}{short}]")
        print(f"    {' '.join(case.load)}; {', '.join(case.contestants)}")
    print()
    for backend in BACKENDS.values():
        print(f"{backend.name}: {backend.what}")


def ring_results(options: argparse.Namespace) -> str:
    """Run ring_peers.py in a process of its own; return its JSON."""
    rounds, seconds = (7, 0.3) if options.full else (3, 0.1)
    program = str(builds.BENCHMARKS / "ring_peers.py")
    times = [f"--rounds={options.rounds or rounds}", f"--seconds={seconds}"]
    done = subprocess.run(
        [sys.executable, program, "--json", *times], capture_output=True, text=True
    )
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return done.stdout


def header(options: argparse.Namespace, runner: Runner, versions: dict[str, str]) -> list[str]:
    """Say what was measured, on which machine and how."""
    lines = list(machine())
    with contextlib.suppress(Unavailable):
        lines.append(f"- ours: {builds.find_ours()}")
    lines += [f"- peer ({need}): {text}" for need, text in versions.items()]
    lines += [f"- peer ({need}) is **missing**: {why}" for need, why in runner.missing.items()]
    how = "of the best 2 ms and the best round" if options.best else "medians"
    lines.append(f"- {how} of {runner.rounds} turns of {runner.seconds:g} s each; ratios: medians")
    return lines


class Report:
    """The Markdown report, which prints itself while it grows, and the verdicts for its summary."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.body: list[str] = []
        self.rows: list[Verdict] = []

    def add(self, *lines: str) -> None:
        """Print the lines and keep them."""
        print("\n".join(lines), flush=True)
        self.body.extend(lines)

    def add_rings(self, options: argparse.Namespace) -> None:
        """Measure and add the rings in one process."""
        self.add("### Rings in one process", "")
        try:
            results = ring_peers.loaded(ring_results(options))
        except Unavailable as reason:
            self.add(f"not measured: {reason}", "")
        else:
            self.add(ring_peers.table(results), "")
            self.rows += ring_peers.verdicts(results)

    def add_cases(self, cases: list[Case], runner: Runner, folder: Path | None) -> list[Outcome]:
        """Run and add every case, then the set-up times and the memory of idle daemons."""
        outcomes: list[Outcome] = []
        with image_file(folder) as (sockets, image):
            for case in cases:
                if not outcomes or outcomes[-1].case.group != case.group:
                    self.add(f"### {case.group}", "")
                outcomes.append(runner.run(case, sockets, image))
                self.add(*table(outcomes[-1], self.measure))
            memory = idle_memory(sockets, image, runner.missing)
        self.add("### Set-up and memory", "", *setup_table(outcomes, memory, self.measure))
        self.rows += [*verdicts(outcomes, self.measure), memory_verdict(memory)]
        return outcomes


def main() -> int:
    """Build the contestants, run the cases, print the report."""
    options = arguments()
    if options.list:
        describe()
        return 0
    cases = select(options)
    with_rings = not options.contestant and (not options.only or "rings" in options.only)
    try:
        builds.build_load()
    except Unavailable as reason:
        print(f"bench: cannot build the load generators: {reason}", file=sys.stderr)
        return 1
    needs = {BACKENDS[name].needs for case in cases for name in case.contestants}
    versions, missing = builds.prepare(needs | ({"rust"} if with_rings else set()))
    runner, report = Runner(options, missing), Report(Measure(options.best))
    head = header(options, runner, versions)
    print("\n".join(head), "", sep="\n", flush=True)
    if with_rings:
        report.add_rings(options)
    outcomes = report.add_cases(cases, runner, options.image_folder) if cases else []
    top = ["### Summary", "", *summary(report.rows)]
    print("\n".join(top), flush=True)
    if options.output:
        write(options.output, "\n".join([*head, "", *top, *report.body]) + "\n")
    if options.json:
        data = {o.case.name: {"figures": o.figures, "failures": o.failures} for o in outcomes}
        options.json.write_text(json.dumps(data, indent=1))
    return 0
