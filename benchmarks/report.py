"""From the figures of all rounds to Markdown: tables, and what came of each row of targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from backends import BACKENDS
from cases import ROWS, Case, Check

# A figure of one run of the load generator, and what else belongs to it.
Figures = dict[str, Any]


@dataclass
class Outcome:
    """What came of a case: per contestant, figures of each round, or why there are none."""

    case: Case
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """One line of the summary; `ratios` holds None for what was not measured."""

    work: str
    peer: str
    factors: tuple[float, ...]
    ratios: tuple[float | None, ...]
    most: bool = False

    def line(self) -> str:
        """As a row of the table."""
        sign = "≤" if self.most else "≥"
        wanted = f"{sign} {' / '.join(f'{factor:g}' for factor in self.factors)}"
        measured = " / ".join("-" if r is None else f"{r:.2f}" for r in self.ratios)
        return f"| {self.work} | {self.peer} | {wanted} | {measured} | {self.word()} |"

    def met(self) -> list[bool | None]:
        """For each figure whether it is within its bound; None for what was not measured."""
        pairs = zip(self.ratios, self.factors, strict=True)
        return [None if r is None else r <= f if self.most else r >= f for r, f in pairs]

    def word(self) -> str:
        """The verdict: one word when it is the same for all figures."""
        words = {True: "met", False: "**missed**", None: "not measured"}
        each = [words[met] for met in self.met()]
        return each[0] if len(set(each)) == 1 else " / ".join(each)


class Measure:
    """How rounds are summed up.

    Usually by medians over whole turns. With `best`, for a machine that others use at the same
    time: the rate of a turn is that of its best 2 ms, and of latencies and CPU times the least
    count.
    """

    def __init__(self, best: bool) -> None:
        self.best = best

    def value(self, run: Figures, key: str) -> float:
        """One figure of one turn."""
        if self.best and key == "rate":
            key = "peak_rate"
        value = float(run[key])
        if self.best and key == "mib_per_s":
            value *= run["peak_rate"] / (run["rate"] or 1)
        return value

    def typical(self, runs: list[Figures], key: str) -> float:
        """The figure of all rounds."""
        values = [self.value(run, key) for run in runs]
        if self.best and key not in ("rate", "mib_per_s"):
            return min(values)
        return statistics.median(values)

    def ratio(self, outcome: Outcome, name: str, peers: list[str], key: str) -> float | None:
        """Ours to the best peer: the median over the rounds of the ratio within the round."""
        ours = outcome.figures.get(name)
        theirs = [outcome.figures[peer] for peer in peers if peer in outcome.figures]
        if not ours or not theirs:
            return None
        best = max if key == "rate" else min
        if self.best and key != "rate":
            return self.typical(ours, key) / (best(self.typical(runs, key) for runs in theirs) or 1)
        rounds = zip(ours, zip(*theirs, strict=True), strict=True)
        return statistics.median(
            self.value(run, key) / (best(self.value(peer, key) for peer in group) or 1)
            for run, group in rounds
        )


def rate(value: float) -> str:
    """A rate with its unit's prefix."""
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"


PLACEMENTS = {
    "free": "threads where the scheduler puts them",
    "together": "driver and back-end on one processor",
    "apart": "driver and back-end on a processor each",
}


def table(outcome: Outcome, measure: Measure) -> Iterator[str]:
    """One case as Markdown."""
    case = outcome.case
    yield f"#### {case.name} (`{' '.join(case.load)}`; {PLACEMENTS[case.placement]})"
    yield ""
    what = "packets/s" if case.work else "requests/s"
    unit = "packet" if case.work else "request"
    yield (
        f"| back-end | {what} | to the best peer | MiB/s | p50 µs | p99 µs | p99.9 µs "
        f"| CPU µs/{unit} | CPUs |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, runs in outcome.figures.items():
        peers = [
            peer
            for peer in outcome.figures
            if not BACKENDS[peer].ours and ("null" in peer) == ("null" in name)
        ]
        ratio = measure.ratio(outcome, name, peers, "rate") if BACKENDS[name].ours else None
        cells = [BACKENDS[name].what, rate(measure.typical(runs, "rate"))]
        cells.append("" if ratio is None else f"{ratio:.2f}x")
        cells.append(f"{measure.typical(runs, 'mib_per_s'):.0f}")
        cells += [
            f"{measure.typical(runs, key) / 1e3:.1f}" for key in ("p50_ns", "p99_ns", "p999_ns")
        ]
        cells.append(f"{measure.typical(runs, 'cpu_ns_per_request') / 1e3:.2f}")
        cells.append(f"{measure.typical(runs, 'cpus'):.2f}")
        yield f"| {' | '.join(cells)} |"
    for name, reason in outcome.failures.items():
        yield f"| {BACKENDS[name].what} | not measured: {reason} | | | | | | | |"
    yield ""


def _setups(outcomes: list[Outcome]) -> Outcome:
    """Every turn with one device, one queue and few regions: setting up is the same in all."""
    every = Outcome(Case("set-up", "", (), ()))
    for outcome in outcomes:
        case = outcome.case
        few = not any(option in case.load for option in ("--regions=64", "--regions=509"))
        if case.devices == case.queues == 1 and few:
            for name, runs in outcome.figures.items():
                every.figures.setdefault(name, []).extend(runs)
    return every


def _check(check: Check, outcomes: list[Outcome], measure: Measure) -> float | None:
    if check.key == "setup_us":
        figures = _setups(outcomes).figures
        if check.ours not in figures or check.peers not in figures:
            return None
        ours, theirs = (
            measure.typical(figures[name], check.key) for name in (check.ours, check.peers)
        )
        return ours / theirs
    outcome = next((outcome for outcome in outcomes if outcome.case.name == check.case), None)
    if outcome is None:
        return None
    peers = [
        name for name in outcome.figures if not BACKENDS[name].ours and name.startswith(check.peers)
    ]
    return measure.ratio(outcome, check.ours, peers, check.key)


def verdicts(outcomes: list[Outcome], measure: Measure) -> Iterator[Verdict]:
    """What came of the rows that the cases answer; rows of cases that were not run are left out."""
    ran = {outcome.case.name for outcome in outcomes}
    for row in ROWS:
        if not any(not check.case or check.case in ran for check in row.checks):
            continue
        yield Verdict(
            row.work,
            row.peer,
            tuple(check.factor for check in row.checks),
            tuple(_check(check, outcomes, measure) for check in row.checks),
            row.most,
        )


def memory_verdict(memory: dict[str, dict[str, int]]) -> Verdict:
    """The row on the memory of an idle block daemon."""
    theirs = [found["Rss"] for name, found in memory.items() if name.startswith("qsd")]
    ours = memory.get("blk")
    ratio = ours["Rss"] / min(theirs) if ours and theirs else None
    work = "resident memory of an idle blk daemon"
    return Verdict(work, "qemu-storage-daemon", (1.0,), (ratio,), most=True)


def summary(rows: Iterable[Verdict]) -> Iterator[str]:
    """All verdicts as one table, and their count."""
    rows = list(rows)
    yield "| work | peer | target | measured | |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield row.line()
    each = [met for row in rows for met in row.met()]
    yield ""
    yield (
        f"{each.count(True)} of {len(each)} bounds met, {each.count(False)} missed, "
        f"{each.count(None)} not measured."
    )
    yield ""


def setup_table(
    outcomes: list[Outcome], memory: dict[str, dict[str, int]], measure: Measure
) -> Iterator[str]:
    """Connection to first request served, and the memory of an idle daemon."""
    yield (
        "| back-end | connection to first request, ms | idle: resident KiB "
        "| idle: proportional KiB |"
    )
    yield "|---|---|---|---|"
    figures = _setups(outcomes).figures
    for name in BACKENDS:
        runs = figures.get(name)
        if runs:
            idle = memory.get(name, {})
            yield (
                f"| {BACKENDS[name].what} | {measure.typical(runs, 'setup_us') / 1e3:.2f} | "
                f"{idle.get('Rss', '')} | {idle.get('Pss', '')} |"
            )
    yield ""
