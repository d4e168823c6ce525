"""Run the turns of each case: a fresh back-end, and a load generator for each of its devices."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
from argparse import Namespace
from pathlib import Path

from comparison.builds import LOAD, NETLOAD, Unavailable
from comparison.cases import Case
from comparison.contestants import BACKENDS, Place
from comparison.figures import Figures, Outcome
from comparison.processes import confined, started
from comparison.profile import profiled


def generator(case: Case, socket: Path, seconds: float) -> list[str]:
    """Return the load generator's command for one device."""
    base = (str(NETLOAD), f"--direction={case.work}", f"--pairs={case.queues}")
    if not case.work:
        base = (str(LOAD), f"--queues={case.queues}", "--connect-timeout=20")
    times = (f"--seconds={seconds}", f"--warm-up={min(0.3, seconds / 2)}")
    return [*base, f"--socket={socket}", *times, *case.load]


def load_once(case: Case, place: Place, seconds: float) -> Figures:
    """Load every device of the back-end once, and return the figures."""
    with confined(place.driver):
        running = [
            subprocess.Popen(
                generator(case, socket, seconds),
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
        # On a busy machine a turn can pass without a completed request: its figures are not JSON.
        raise Unavailable("the load generator counted nothing in a turn") from None


def together(runs: list[Figures]) -> Figures:
    """Join the figures of several devices in one process: add the rates, take medians of the rest.

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
    # The devices had their best 2 ms at different times, so the sum of these is no rate.
    typical["peak_rate"] = typical["rate"]
    typical["cpu_ns_per_request"] = typical["cpus"] * 1e9 / (typical["rate"] or 1)
    return typical


def place_of(case: Case, folder: Path, image: Path, name: str) -> Place:
    """Choose sockets and processors for one turn."""
    sockets = tuple(folder / f"{name}-{number}.sock" for number in range(case.devices))
    cpus = sorted(os.sched_getaffinity(0))
    driver, back_end = {
        "free": (frozenset[int](), frozenset[int]()),
        "together": (frozenset(cpus[:1]), frozenset(cpus[:1])),
        "apart": (frozenset(cpus[:1]), frozenset(cpus[-1:])),
    }[case.placement]
    return Place(sockets, image, case.queues, case.work, driver, back_end)


class Runner:
    """Runs the turns of a case, with the number and length that the options ask for."""

    def __init__(self, options: Namespace, missing: dict[str, str]) -> None:
        self.rounds: int = options.rounds or (5 if options.full else 3)
        self.seconds: float = options.seconds or (1.0 if options.full else 0.4)
        self.profile: Path | None = options.profile
        self.missing = missing

    def run(self, case: Case, folder: Path, image: Path) -> Outcome:
        """Run all rounds of one case."""
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
        with started(backend, place) as process, contextlib.ExitStack() as stack:
            if self.profile and not turn:
                stack.enter_context(profiled(self.profile, f"{case.name}, {name}", process.pid))
            return load_once(case, place, self.seconds)
