"""Measure this project's back-ends beside their peers, in one run.

It builds the load generator and the peers, lets every contestant of a case take its turn in each
round (so that a busy machine hits all alike), and prints Markdown: medians of the figures, and the
median over the rounds of the ratio to the best peer of the same round. In the end comes a summary:
every target, what was measured for it, and whether it was met. A peer that cannot be built or
started is named with the reason. docs/performance.md says what is measured and how to read it.

  --short   the cases that matter most, under two minutes once things are built (the default)
  --full    every case, longer and more often: what docs/performance.md shows; about half an hour
  --only    some cases, with all their contestants, by name or group; see --list
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import backends
from backends import BACKENDS, Place, Unavailable, confined, started
from cases import CASES, READ_FILE, SHORT_FILE, Case
from report import Figures, Measure, Outcome, memory_verdict, setup_table, summary, table, verdicts

IMAGE_BYTES = 256 << 20


# --- measuring ---


def generator(case: Case, place: Place, socket: Path, seconds: float) -> list[str]:
    """The load generator's command for one device."""
    base = (str(backends.NETLOAD), f"--direction={case.work}", f"--pairs={case.queues}")
    if not case.work:
        base = (str(backends.LOAD), f"--queues={case.queues}", "--connect-timeout=20")
    times = (f"--seconds={seconds}", f"--warm-up={min(0.3, seconds / 2)}")
    return [*base, f"--socket={socket}", *times, *case.load]


def load_once(case: Case, place: Place, seconds: float) -> Figures:
    """Load every device of the back-end once; what was measured."""
    with confined(place.driver):
        running = [
            subprocess.Popen(
                generator(case, place, socket, seconds),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for socket in place.sockets
        ]
    ended = [(process, *process.communicate()) for process in running]
    for process, _, errors in ended:
        if process.returncode:
            text = errors.strip().removeprefix("load: ") or f"exit {process.returncode}"
            raise Unavailable(text)
    try:
        return together([json.loads(output) for _, output, _ in ended])
    except ValueError:
        # A turn in which nothing was served, on a machine that is busy: a mean of nothing.
        raise Unavailable("the load generator counted nothing in a turn") from None


def together(runs: list[Figures]) -> Figures:
    """The figures of several devices in one process as one: rates add up, the rest is typical.

    Each generator saw the CPU time of the whole process.
    """
    if len(runs) == 1:
        return runs[0]
    typical = {
        key: statistics.median(run[key] for run in runs)
        for key, value in runs[0].items()
        if isinstance(value, (int, float))
    }
    for key in ("rate", "mib_per_s", "requests"):
        typical[key] = sum(run[key] for run in runs)
    # Each had its best 2 ms at another time: no such rate of all together ever was.
    typical["peak_rate"] = typical["rate"]
    typical["cpu_ns_per_request"] = typical["cpus"] * 1e9 / (typical["rate"] or 1)
    return typical


def place_of(case: Case, folder: Path, image: Path, name: str) -> Place:
    """Sockets and processors for one turn."""
    sockets = tuple(folder / f"{name}-{number}.sock" for number in range(case.devices))
    cpus = sorted(os.sched_getaffinity(0))
    driver, back_end = {
        "free": (frozenset[int](), frozenset[int]()),
        "together": (frozenset(cpus[:1]), frozenset(cpus[:1])),
        "apart": (frozenset(cpus[:1]), frozenset(cpus[-1:])),
    }[case.placement]
    return Place(sockets, image, case.queues, case.work, driver, back_end)


class Runner:
    """Runs cases: where files are, how long, and what is missing."""

    def __init__(self, options: argparse.Namespace, missing: dict[str, str]) -> None:
        self.rounds: int = options.rounds or (5 if options.full else 3)
        self.seconds: float = options.seconds or (1.0 if options.full else 0.4)
        self.profile: Path | None = options.profile
        self.missing = missing

    def run(self, case: Case, folder: Path, image: Path) -> Outcome:
        """All rounds of one case."""
        outcome = Outcome(case)
        for turn in range(self.rounds):
            names = [name for name in case.contestants if name not in outcome.failures]
            first = turn % len(names) if names else 0
            for name in names[first:] + names[:first]:
                try:
                    figures = self._turn(case, name, place_of(case, folder, image, name), turn)
                except Unavailable as reason:
                    outcome.failures[name] = str(reason)
                    outcome.figures.pop(name, None)
                else:
                    outcome.figures.setdefault(name, []).append(figures)
        return outcome

    def _turn(self, case: Case, name: str, place: Place, turn: int) -> Figures:
        backend = BACKENDS[name]
        if backend.needs in self.missing:
            raise Unavailable(self.missing[backend.needs])
        with started(backend, place) as process, self._profiled(case, name, process.pid, turn):
            return load_once(case, place, self.seconds)

    @contextlib.contextmanager
    def _profiled(self, case: Case, name: str, pid: int, turn: int) -> Iterator[None]:
        """Have perf look on in the first round, and write where the time went to a file."""
        if self.profile is None or turn:
            yield
            return
        self.profile.mkdir(parents=True, exist_ok=True)
        base = self.profile / f"{case.name}, {name}".replace("/", "-")
        data = base.with_name(base.name + ".data")
        record = ["perf", "record", "--quiet", "--event=cpu-clock", f"--pid={pid}", f"-o{data}"]
        with subprocess.Popen(record, stderr=subprocess.DEVNULL) as perf:
            try:
                yield
            finally:
                perf.send_signal(signal.SIGINT)
        report = [
            "perf",
            "report",
            "--stdio",
            "--sort=dso,symbol",
            "--percent-limit=1",
            f"-i{data}",
        ]
        text = subprocess.run(report, capture_output=True, text=True).stdout
        base.with_name(base.name + ".txt").write_text(text)
        data.unlink(missing_ok=True)

    def idle_memory(self, folder: Path, image: Path) -> dict[str, dict[str, int]]:
        """KiB of an idle block daemon that nobody is connected to: resident, and proportional."""
        found = {}
        for name in READ_FILE:
            if BACKENDS[name].needs in self.missing:
                continue
            with contextlib.suppress(Unavailable):
                with started(BACKENDS[name], Place((folder / f"{name}.sock",), image)) as process:
                    time.sleep(0.5)
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
                found[name] = {key: int(fields[key].split()[0]) for key in ("Rss", "Pss")}
        return found


# --- what the run says of itself ---


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


BUILDERS: dict[str, Callable[[], str]] = {
    "rust": backends.build_rust,
    "qemu": backends.find_qemu,
    "dpdk": backends.find_dpdk,
}


def prepare(wanted: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Build what is needed; versions, and why something is missing."""
    versions, missing = {}, {}
    for need in sorted(wanted - {""}):
        try:
            versions[need] = BUILDERS[need]()
        except Unavailable as reason:
            missing[need] = str(reason)
    return versions, missing


@contextlib.contextmanager
def image_file(folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """A folder for sockets and an image of random content, which is in the page cache afterwards.

    On a disk's file system: on tmpfs, past the page cache (O_DIRECT) is through it all the same.
    Its pages came one by one, as a guest leaves them: those of a file that was written from start
    to end are large folios, and ext4 looks at every block of one for each write to a part of it.
    """
    disk = Path("/var/tmp")
    base = folder or (disk if os.access(disk, os.W_OK) else None)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=base) as name:
        image = Path(name) / "image"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
            for page in random.Random(1).sample(range(IMAGE_BYTES >> 12), IMAGE_BYTES >> 12):
                os.pwrite(file.fileno(), os.urandom(1 << 12), page << 12)
            os.fsync(file.fileno())
        yield Path(name), image


# --- the command ---


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hatch run bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="the cases that matter most (default)")
    length.add_argument("--full", action="store_true", help="every case, longer and more often")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="cases of the group TEXT or with TEXT in their name; `rings` for the rings in one "
        "process (can be given more than once)",
    )
    parser.add_argument("--list", action="store_true", help="name the cases and contestants")
    parser.add_argument(
        "--contestant",
        action="append",
        metavar="NAME",
        choices=sorted(BACKENDS),
        help="only these contestants (see --list)",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="turns of each contestant (3; full: 5)"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="measured time of one turn (0.4; full: 1)"
    )
    parser.add_argument(
        "--placement",
        choices=("free", "together", "apart"),
        help="where driver and back-end may run, instead of what each case says",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="for a machine that others use: the rate of a turn is that of its best 2 ms, and of "
        "latencies and CPU times the least of all rounds counts",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="have perf watch the back-ends in the first round, and write where their time went",
    )
    parser.add_argument("--image-folder", type=Path, help="where the image is made (/var/tmp)")
    parser.add_argument(
        "--output",
        type=Path,
        help="write the Markdown to this file, too, between its `results` marks if it has them",
    )
    parser.add_argument("--json", type=Path, help="write every figure of every round to this file")
    options = parser.parse_args()
    if options.profile and shutil.which("perf") is None:
        parser.error("--profile needs perf")
    return options


def select(options: argparse.Namespace) -> list[Case]:
    """The cases to run."""
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
    """Print cases and contestants."""
    for case in CASES:
        short = ", short" if case.short else ""
        print(f"{case.name}  [group {case.group}{short}]")
        print(f"    {' '.join(case.load)}; {', '.join(case.contestants)}")
    print()
    for backend in BACKENDS.values():
        print(f"{backend.name}: {backend.what}")


def ring_results(options: argparse.Namespace) -> str:
    """The rings in one process as rings.py's JSON."""
    rounds, seconds = (7, 0.3) if options.full else (3, 0.1)
    program = str(backends.HERE / "rings.py")
    times = [f"--rounds={options.rounds or rounds}", f"--seconds={seconds}"]
    done = subprocess.run(
        [sys.executable, program, "--json", *times], capture_output=True, text=True
    )
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return done.stdout


def write(path: Path, text: str) -> None:
    """Put the results into a file: between its two marks where it has them, else as its content."""
    begin, end = "<!-- results: begin -->\n", "<!-- results: end -->\n"
    old = path.read_text() if path.exists() else ""
    before, mark, rest = old.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}" if mark else text)


def main() -> int:
    """Build, run, print."""
    options = arguments()
    if options.list:
        describe()
        return 0
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
    header += [f"- peer ({need}) is **missing**: {reason}" for need, reason in missing.items()]
    runner, measure = Runner(options, missing), Measure(options.best)
    how = "of the best 2 ms and the best round" if options.best else "medians"
    header.append(f"- {how} of {runner.rounds} turns of {runner.seconds:g} s each; ratios: medians")
    print("\n".join(header), "", sep="\n", flush=True)

    body: list[str] = []

    def add(*lines: str) -> None:
        print("\n".join(lines), flush=True)
        body.extend(lines)

    rows = []
    if with_rings:
        add("### Rings in one process", "")
        try:
            import rings

            results = rings.loaded(ring_results(options))
            add(rings.table(results), "")
            rows += rings.verdicts(results)
        except Unavailable as reason:
            add(f"not measured: {reason}", "")
    outcomes: list[Outcome] = []
    with image_file(options.image_folder) as (folder, image):
        for case in cases:
            if not outcomes or outcomes[-1].case.group != case.group:
                add(f"### {case.group}", "")
            outcomes.append(runner.run(case, folder, image))
            add(*table(outcomes[-1], measure))
        memory = runner.idle_memory(folder, image) if outcomes else {}
    if outcomes:
        add("### Set-up and memory", "", *setup_table(outcomes, memory, measure))
        rows += [*verdicts(outcomes, measure), memory_verdict(memory)]
    top = ["### Summary", "", *summary(rows)]
    print("\n".join(top), flush=True)
    if options.output:
        write(options.output, "\n".join([*header, "", *top, *body]) + "\n")
    if options.json:
        data = {o.case.name: {"figures": o.figures, "failures": o.failures} for o in outcomes}
        options.json.write_text(json.dumps(data, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
