"""Measure this project's back-ends beside their peers, in one run.

``python benchmarks/run.py`` builds the load generator and the peers, lets every contestant of a
case take its turn in each round (so that a busy machine hits all alike), and prints Markdown:
medians of the figures, and the median over the rounds of the ratio to the best peer of the same
round. A peer that cannot be built or started is named with the reason. ``--short`` takes under two
minutes once things are built; ``--full`` is what docs/performance.md shows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import backends
from backends import BACKENDS, LOAD, Place, Unavailable, started

IMAGE_BYTES = 256 << 20

# A figure of one run of the load generator, and what else belongs to it.
Figures = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What one of ours has to reach against the best peer: a rate or, with `most`, a cost."""

    ours: str
    key: str
    factor: float
    most: bool = False


@dataclass(frozen=True)
class Case:
    """One load, and who takes part."""

    name: str
    group: str
    load: tuple[str, ...]
    contestants: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    queues: int = 1
    short: bool = False


@dataclass
class Outcome:
    """What came of a case: per contestant, figures of each round, or why there are none."""

    case: Case
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


NULL = ("rust-null", "null-records", "null-requests", "null-batch")
FILE = ("rust-file", "qsd-threads", "qsd-io_uring", "qsd-native", "blk")
SHORT_FILE = ("rust-file", "qsd-threads", "blk")
RUST_FILE = ("rust-file", "blk")


def _null_cases() -> Iterator[Case]:
    wanted = {1: (0.9, 0.85, 1.0), 32: (1.0, 0.4, 1.2), 128: (1.0, 0.3, 2.0)}
    for depth, factors in wanted.items():
        names = ("null-records", "null-requests", "null-batch")
        targets = [Target(n, "rate", f) for n, f in zip(names, factors, strict=True)]
        if depth == 1:
            targets += [Target(name, "p99_ns", 1.2, most=True) for name in names]
        load: tuple[str, ...] = (f"--depth={depth}",)
        yield Case(f"null, depth {depth}", "null", load, NULL, tuple(targets), short=True)
    polled = (Target("null-records", "p99_ns", 1.2, most=True),)
    yield Case("null, depth 1, driver polls", "null", ("--poll",), NULL, polled)
    load = ("--depth=32", "--regions=509")
    yield Case("null, depth 32, 509 regions", "null", load, NULL)
    yield Case("null, depth 32, 2 queues", "null", ("--depth=32",), NULL, queues=2)
    yield Case("null, depth 32, packed", "null", ("--depth=32", "--packed"), NULL[1:])


def _file_cases() -> Iterator[Case]:
    for depth, (qemu, rust) in {1: (2.0, 1.0), 32: (3.0, 1.2), 128: (3.0, 1.2)}.items():
        load: tuple[str, ...] = (f"--depth={depth}",)
        targets = [
            Target("blk/qsd", "rate", qemu),
            Target("blk/rust-file", "rate", rust),
        ]
        if depth == 1:
            targets.append(Target("blk", "p99_ns", 1.2, most=True))
        if depth == 32:
            targets.append(Target("blk", "cpu_ns_per_request", 1.0, most=True))
        yield Case(
            f"4 KiB random read, depth {depth}", "file", load, FILE, tuple(targets), short=True
        )
    for depth, factor in {1: 1.0, 32: 1.2, 128: 1.2}.items():
        load = (f"--depth={depth}", "--write-percent=100")
        targets = [Target("blk/rust-file", "rate", factor)]
        yield Case(
            f"4 KiB random write, depth {depth}", "file", load, FILE[:3] + FILE[-1:], tuple(targets)
        )
    two = (Target("blk/rust-file", "rate", 1.2),)
    yield Case(
        "4 KiB random read, depth 32, 2 queues", "file", ("--depth=32",), FILE, two, queues=2
    )
    polled = (Target("blk", "p99_ns", 1.2, most=True),)
    yield Case("4 KiB random read, depth 1, driver polls", "file", ("--poll",), SHORT_FILE, polled)


def _scale_cases() -> Iterator[Case]:
    for queues in (1, 2, 4, 8):
        load: tuple[str, ...] = ("--depth=32",)
        yield Case(f"queues: {queues}", "queues", load, (*RUST_FILE, "null-batch"), queues=queues)
    for kib in (4, 16, 64, 256, 1024):
        load = ("--depth=8", f"--block={kib * 1024}")
        yield Case(f"request: {kib} KiB", "size", load, RUST_FILE)
    for regions in (2, 8, 64, 509):
        load = ("--depth=32", f"--regions={regions}")
        yield Case(f"regions: {regions}", "regions", load, NULL)


CASES = (*_null_cases(), *_file_cases(), *_scale_cases())


# --- measuring ---


def load_once(case: Case, place: Place, seconds: float) -> Figures:
    """Run the load generator once; what it reports."""
    command = [
        *(str(LOAD), f"--socket={place.socket}", f"--queues={case.queues}"),
        *(f"--seconds={seconds}", f"--warm-up={min(0.3, seconds / 2)}"),
        *case.load,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(done.stderr.strip().removeprefix("load: ") or f"exit {done.returncode}")
    figures: Figures = json.loads(done.stdout)
    return figures


def run_case(
    case: Case, place: Path, image: Path, rounds: int, seconds: float, missing: dict[str, str]
) -> Outcome:
    """All rounds of one case."""
    outcome = Outcome(case)
    for turn in range(rounds):
        names = [name for name in case.contestants if name not in outcome.failures]
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            backend = BACKENDS[name]
            where = Place(place / f"{name}.sock", image, case.queues)
            try:
                if backend.needs in missing:
                    raise Unavailable(missing[backend.needs])
                with started(backend, where):
                    outcome.figures.setdefault(name, []).append(load_once(case, where, seconds))
            except Unavailable as reason:
                outcome.failures[name] = str(reason)
                outcome.figures.pop(name, None)
    return outcome


def idle_memory(place: Path, image: Path, missing: dict[str, str]) -> dict[str, dict[str, int]]:
    """KiB of an idle block daemon that nobody is connected to: resident, and proportional."""
    found = {}
    for name in FILE:
        if BACKENDS[name].needs in missing:
            continue
        with contextlib.suppress(Unavailable):
            where = Place(place / f"{name}.sock", image, 1)
            with started(BACKENDS[name], where) as process:
                time.sleep(0.5)
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
            found[name] = {key: int(fields[key].split()[0]) for key in ("Rss", "Pss")}
    return found


# --- reporting ---


best_only = False


def _typical(runs: list[Figures], key: str) -> Any:
    """The median over the rounds; the best, and the rate of the best window, where asked for."""
    if not best_only:
        return statistics.median(run[key] for run in runs)
    if key == "mib_per_s":
        return max(run[key] * run["peak_rate"] / run["rate"] for run in runs)
    if key == "rate":
        return max(run["peak_rate"] for run in runs)
    return min(run[key] for run in runs)


def _peers(outcome: Outcome, target: Target) -> list[str]:
    wanted = target.ours.partition("/")[2]
    return [name for name in outcome.figures if not BACKENDS[name].ours and name.startswith(wanted)]


def _ratio(outcome: Outcome, name: str, peers: list[str], key: str, most: bool) -> float | None:
    """The median over the rounds of the ratio to the best of `peers` in the same round."""
    ours = outcome.figures.get(name)
    theirs = [outcome.figures[peer] for peer in peers]
    if not ours or not theirs:
        return None
    best = min if most else max
    if best_only:
        ratio: float = _typical(ours, key) / best(_typical(runs, key) for runs in theirs)
        return ratio
    pairs = zip(ours, zip(*theirs, strict=True), strict=True)
    ratios: list[float] = [run[key] / best(peer[key] for peer in group) for run, group in pairs]
    return statistics.median(ratios)


def _rate(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"


def table(outcome: Outcome) -> Iterator[str]:
    """One case as Markdown."""
    yield f"#### {outcome.case.name} (`{' '.join(outcome.case.load)}`)"
    yield ""
    yield (
        "| back-end | requests/s | to the best peer | MiB/s | p50 µs | p99 µs | p99.9 µs "
        "| CPU µs/request | CPUs |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    peers = [name for name in outcome.figures if not BACKENDS[name].ours]
    for name, runs in outcome.figures.items():
        ratio = _ratio(outcome, name, peers, "rate", most=False) if BACKENDS[name].ours else None
        yield (
            f"| {BACKENDS[name].what} | {_rate(_typical(runs, 'rate'))} | "
            f"{'' if ratio is None else f'{ratio:.2f}x'} | {_typical(runs, 'mib_per_s'):.0f} | "
            + " | ".join(
                f"{_typical(runs, key) / 1e3:.1f}" for key in ("p50_ns", "p99_ns", "p999_ns")
            )
            + f" | {_typical(runs, 'cpu_ns_per_request') / 1e3:.2f} "
            + f"| {_typical(runs, 'cpus'):.2f} |"
        )
    for name, reason in outcome.failures.items():
        yield f"| {BACKENDS[name].what} | not measured: {reason} | | | | | | | |"
    yield ""


LABELS = {"rate": "rate", "p99_ns": "p99", "cpu_ns_per_request": "CPU per request"}


def verdicts(outcomes: list[Outcome]) -> Iterator[str]:
    """Every target, and whether it was met."""
    yield "| target | wanted | measured | |"
    yield "|---|---|---|---|"
    for outcome in outcomes:
        for target in outcome.case.targets:
            name, _, group = target.ours.partition("/")
            against = f" against {group}" if group else ""
            label = f"{outcome.case.name}: {BACKENDS[name].what}, {LABELS[target.key]}{against}"
            ratio = _ratio(outcome, name, _peers(outcome, target), target.key, target.most)
            sign = "≤" if target.most else "≥"
            if ratio is None:
                yield f"| {label} | {sign} {target.factor:g}x | | not measured |"
                continue
            met = ratio <= target.factor if target.most else ratio >= target.factor
            verdict = "met" if met else "**missed**"
            yield f"| {label} | {sign} {target.factor:g}x | {ratio:.2f}x | {verdict} |"
    yield ""


def setup_table(outcomes: list[Outcome], memory: dict[str, dict[str, int]]) -> Iterator[str]:
    """Connection to first request served, and the memory of an idle daemon."""
    yield (
        "| back-end | connection to first request, ms | idle: resident KiB "
        "| idle: proportional KiB |"
    )
    yield "|---|---|---|---|"
    for name in BACKENDS:
        runs = [
            run
            for outcome in outcomes
            if outcome.case.queues == 1 and "--regions=509" not in outcome.case.load
            for run in outcome.figures.get(name, [])
        ]
        if runs:
            idle = memory.get(name, {})
            yield (
                f"| {BACKENDS[name].what} | {_typical(runs, 'setup_us') / 1e3:.2f} | "
                f"{idle.get('Rss', '')} | {idle.get('Pss', '')} |"
            )
    yield ""


def machine() -> Iterator[str]:
    """What was measured on."""
    model = "unknown processor"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    yield f"- date: {time.strftime('%Y-%m-%d', time.gmtime())}"
    yield f"- machine: {model}, {os.cpu_count()} CPUs, Linux {platform.release()}"
    name = f"{platform.python_implementation()} {platform.python_version()}"
    yield f"- interpreter: {name} ({Path(sys.executable).resolve()}; {platform.python_compiler()})"
    load = os.getloadavg()
    yield f"- load average when the run began: {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f}"


def prepare(wanted: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Build what is needed; versions, and why something is missing."""
    versions, missing = {}, {}
    builders = {"rust": backends.build_rust, "qemu": backends.find_qemu}
    for need in sorted(wanted - {""}):
        try:
            versions[need] = builders[need]()
        except Unavailable as reason:
            missing[need] = str(reason)
    return versions, missing


@contextlib.contextmanager
def image_file(folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """A folder for sockets and an image with random content, on tmpfs where there is one."""
    shm = Path("/dev/shm")
    base = folder or (shm if os.access(shm, os.W_OK) else None)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=base) as name:
        image = Path(name) / "image"
        with image.open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        yield Path(name), image


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="the cases that matter most (default)")
    length.add_argument("--full", action="store_true", help="every case, longer and more often")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="cases whose name or group has TEXT, or `rings`",
    )
    parser.add_argument(
        "--contestant", action="append", choices=sorted(BACKENDS), help="only these"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each contestant")
    parser.add_argument("--seconds", type=float, metavar="S", help="measured time of one turn")
    parser.add_argument(
        "--best",
        action="store_true",
        help="best rounds, and the rate of their best 2 ms, not medians: for a busy machine",
    )
    parser.add_argument("--image-folder", type=Path, help="where the image is made (tmpfs)")
    parser.add_argument(
        "--output",
        type=Path,
        help="write the Markdown to this file, too, between its `results` marks if it has them",
    )
    parser.add_argument("--json", type=Path, help="write every figure of every round to this file")
    return parser.parse_args()


def select(options: argparse.Namespace) -> list[Case]:
    """The cases to run."""
    cases = [case for case in CASES if options.full or options.only or case.short]
    if options.only:
        cases = [
            case for case in cases if any(t == case.group or t in case.name for t in options.only)
        ]
    if not options.full and not options.only:
        short = set(NULL) | set(SHORT_FILE)
        cases = [
            _narrow(case, tuple(name for name in case.contestants if name in short))
            for case in cases
        ]
    if options.contestant:
        wanted = set(options.contestant)
        cases = [
            _narrow(case, tuple(name for name in case.contestants if name in wanted))
            for case in cases
        ]
    return [case for case in cases if case.contestants]


def _narrow(case: Case, contestants: tuple[str, ...]) -> Case:
    return Case(
        case.name, case.group, case.load, contestants, case.targets, case.queues, case.short
    )


def rings(options: argparse.Namespace) -> Iterator[str]:
    """The rings in one process; see rings.py."""
    yield "### Rings in one process"
    yield ""
    rounds, seconds = (5, 0.3) if options.full else (3, 0.1)
    program = str(backends.HERE / "rings.py")
    command = [sys.executable, program, f"--rounds={rounds}", f"--seconds={seconds}"]
    done = subprocess.run(command, capture_output=True, text=True)
    yield (
        done.stdout
        if not done.returncode
        else f"not measured: {done.stderr.strip().splitlines()[-1]}"
    )
    yield ""


def write(path: Path, text: str) -> None:
    """Put the results into a file: between its two marks where it has them, else as its content."""
    begin, end = "<!-- results: begin -->\n", "<!-- results: end -->\n"
    old = path.read_text() if path.exists() else ""
    before, mark, rest = old.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}" if mark else text)


def main() -> int:
    """Build, run, print."""
    global best_only
    options = arguments()
    best_only = options.best
    rounds = options.rounds or (7 if options.full else 3)
    seconds = options.seconds or (2.0 if options.full else 0.4)
    cases = select(options)
    with_rings = not options.contestant and (not options.only or "rings" in options.only)
    header = list(machine())
    try:
        backends.build_load()
    except Unavailable as reason:
        print(f"the load generator cannot be built: {reason}", file=sys.stderr)
        return 1
    needs = {BACKENDS[name].needs for case in cases for name in case.contestants}
    versions, missing = prepare(needs | ({"rust"} if with_rings else set()))
    with contextlib.suppress(Unavailable):
        header.append(f"- ours: {backends.build_ours()}")
    header += [f"- peer ({need}): {text}" for need, text in versions.items()]
    header += [f"- peer ({need}) is missing: {reason}" for need, reason in missing.items()]
    figure = "the best (rates: of the best 2 ms)" if best_only else "medians"
    header.append(f"- {figure} of {rounds} rounds of {seconds:g} s for each contestant of a case")

    lines = [*header, ""]
    print("\n".join(lines), flush=True)
    outcomes = []
    with image_file(options.image_folder) as (place, image):
        group = ""
        for case in cases:
            outcome = run_case(case, place, image, rounds, seconds, missing)
            outcomes.append(outcome)
            part = [f"### {case.group}", ""] if case.group != group else []
            group = case.group
            part += table(outcome)
            print("\n".join(part), flush=True)
            lines += part
        memory = idle_memory(place, image, missing) if outcomes else {}
    if with_rings:
        part = list(rings(options))
        print("\n".join(part), flush=True)
        lines += part
    if outcomes:
        part = ["### Set-up and memory", "", *setup_table(outcomes, memory)]
        part += ["### Targets", "", *verdicts(outcomes)]
        print("\n".join(part), flush=True)
        lines += part
    if options.output:
        write(options.output, "\n".join(lines) + "\n")
    if options.json:
        data = {o.case.name: {"figures": o.figures, "failures": o.failures} for o in outcomes}
        options.json.write_text(json.dumps(data, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
