"""Judge the figures by the targets, and say so in the summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from comparison.contestants import BACKENDS
from comparison.figures import Measure, Outcome, setups
from comparison.targets import ROWS, Check


@dataclass(frozen=True)
class Verdict:
    """One line of the summary; an unmeasured ratio is None."""

    work: str
    peer: str
    factors: tuple[float, ...]
    ratios: tuple[float | None, ...]
    most: bool = False

    def line(self) -> str:
        """Format the row of the table."""
        sign = "≤" if self.most else "≥"
        wanted = f"{sign} {' / '.join(f'{factor:g}' for factor in self.factors)}"
        measured = " / ".join("-" if r is None else f"{r:.2f}" for r in self.ratios)
        return f"| {self.work} | {self.peer} | {wanted} | {measured} | {self.word()} |"

    def met(self) -> list[bool | None]:
        """Compare each ratio with its bound; an unmeasured one gives None."""
        pairs = zip(self.ratios, self.factors, strict=True)
        return [None if r is None else r <= f if self.most else r >= f for r, f in pairs]

    def word(self) -> str:
        """Return the verdict: one word if all figures share it."""
        words = {True: "met", False: "**missed**", None: "not measured"}
        each = [words[met] for met in self.met()]
        return each[0] if len(set(each)) == 1 else " / ".join(each)


def _check(check: Check, outcomes: list[Outcome], measure: Measure) -> float | None:
    if check.key == "setup_us":
        figures = setups(outcomes).figures
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
    """Judge each target that the outcomes speak of."""
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
    """Judge the memory of an idle block daemon."""
    theirs = [found["Rss"] for name, found in memory.items() if name.startswith("qsd")]
    ours = memory.get("blk")
    ratio = ours["Rss"] / min(theirs) if ours and theirs else None
    work = "resident memory of an idle blk daemon"
    return Verdict(work, "qemu-storage-daemon", (1.0,), (ratio,), most=True)


def summary(rows: Iterable[Verdict]) -> Iterator[str]:
    """Format all verdicts as one table, and count them."""
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
