"""The figures of all rounds, and how they become one figure or one ratio."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from comparison.cases import Case

# One turn of a load generator: the JSON object that it printed.
Figures = dict[str, Any]


@dataclass
class Outcome:
    """A case's figures of each round for each contestant, or the reason why there are none."""

    case: Case
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


class Measure:
    """Sum the rounds up: by medians over whole turns, or by their best moments.

    `best` is for a machine that others use at the same time: the best 2 ms give the rate of a turn,
    and the least value of all rounds counts for latencies and CPU times.
    """

    def __init__(self, best: bool) -> None:
        self.best = best

    def value(self, run: Figures, key: str) -> float:
        """Return one figure of one turn."""
        if self.best and key == "rate":
            key = "peak_rate"
        value = float(run[key])
        if self.best and key == "mib_per_s":
            value *= run["peak_rate"] / (run["rate"] or 1)
        return value

    def typical(self, runs: list[Figures], key: str) -> float:
        """Return the figure that stands for all rounds."""
        values = [self.value(run, key) for run in runs]
        if self.best and key not in ("rate", "mib_per_s"):
            return min(values)
        return statistics.median(values)

    def ratio(self, outcome: Outcome, name: str, peers: list[str], key: str) -> float | None:
        """Return the median over the rounds of ours to the round's best peer."""
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


def setups(outcomes: list[Outcome]) -> Outcome:
    """Gather the turns that set up alike: those with one device, one queue and few regions."""
    every = Outcome(Case("set-up", "", (), ()))
    for outcome in outcomes:
        case = outcome.case
        few = not any(option in case.load for option in ("--regions=64", "--regions=509"))
        if case.devices == case.queues == 1 and few:
            for name, runs in outcome.figures.items():
                every.figures.setdefault(name, []).extend(runs)
    return every
