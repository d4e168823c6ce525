"""Format the figures as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comparison.contestants import BACKENDS
from comparison.figures import Measure, Outcome, setups


def rate(value: float) -> str:
    """Format a rate with its unit's prefix."""
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"


PLACEMENTS = {
    "free": "threads where the scheduler puts them",
    "together": "driver and back-end on one processor",
    "apart": "driver and back-end on a processor each",
}


def table(outcome: Outcome, measure: Measure) -> Iterator[str]:
    """Format one case as a Markdown table."""
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


def setup_table(
    outcomes: list[Outcome], memory: dict[str, dict[str, int]], measure: Measure
) -> Iterator[str]:
    """Format the times from connection to first request, and the memory of idle daemons."""
    yield (
        "| back-end | connection to first request, ms | idle: resident KiB "
        "| idle: proportional KiB |"
    )
    yield "|---|---|---|---|"
    figures = setups(outcomes).figures
    for name in BACKENDS:
        runs = figures.get(name)
        if runs:
            idle = memory.get(name, {})
            yield (
                f"| {BACKENDS[name].what} | {measure.typical(runs, 'setup_us') / 1e3:.2f} | "
                f"{idle.get('Rss', '')} | {idle.get('Pss', '')} |"
            )
    yield ""


def write(path: Path, text: str) -> None:
    """Write the report to `path`: between its `results` marks, or as the whole file."""
    begin, end = "<!-- results: begin -->\n", "<!-- results: end -->\n"
    old = path.read_text() if path.exists() else ""
    before, mark, rest = old.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}" if mark else text)
